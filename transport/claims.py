"""Which routing ids a ROUTER can have given, so that peers that have claimed one for themselves are found."""

from __future__ import annotations

import zmq

#: Ids that a ROUTER gives: a zero and a number that grows by one with each connection.
_ID_BYTES = 5
_ID_NUMBERS = 2**32


class Claims:
    """Tells the ids that a ROUTER has drawn from those that peers have claimed.

    libzmq aborts the process when a claimed one is drawn later (4.3.5, socket_base.cpp: "Assertion failed: ok"), so
    nobody may keep one.
    """

    def __init__(self, router: zmq.Socket[bytes]) -> None:
        """Find out the first id that a ROUTER gives: it is not bound yet, and not watched."""
        self._first = _draw_id(router)

    def drawn(self, peer: bytes, accepted: int) -> bool:
        """Tell whether a routing id is one that the ROUTER can have given.

        Args:
            peer: the id.
            accepted: connections that have come to the ROUTER so far; one drew an id before they did.
        """
        if len(peer) != _ID_BYTES or peer[0]:
            return False
        return (int.from_bytes(peer[1:], "big") - self._first) % _ID_NUMBERS <= accepted


def _draw_id(router: zmq.Socket[bytes]) -> int:
    """Return the number of the first id that a ROUTER gives, by having it given to a connection of our own."""
    endpoint = f"inproc://tokenmq-first-{id(router)}"
    router.bind(endpoint)
    probe = router.context.socket(zmq.DEALER)
    try:
        probe.connect(endpoint)
        probe.send(b"")
        return int.from_bytes(router.recv_multipart()[0][1:], "big")
    finally:
        probe.close(linger=0)
        router.unbind(endpoint)
