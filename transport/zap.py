"""Who is let in at a handshake: a ZAP handler for the CURVE sockets of one context (ZeroMQ RFC 27).

It runs in the loop that waits for the sockets themselves, so that what it knows needs no lock, and so that nobody is
admitted while nobody listens. libzmq asks one handler for all sockets of a context; the domain tells them apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq
from zmq.auth import Authenticator

from .pump import Pump, receive

#: Handshakes that are answered in one round: an answer takes some 30 us, the handshake itself ten times as long.
_BATCH = 64
#: pyzmq's own account of each handshake has no place among our log lines.
_LOGGER = logging.getLogger("tokenmq.zap")
_LOGGER.addHandler(logging.NullHandler())
_LOGGER.propagate = False


class Zap(Authenticator):
    """The handler: pyzmq reads and answers, `admits` decides.

    A connection's messages then carry the key that it has shown, as 40 characters of Z85, in their User-Id.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], pump: Pump, admits: Callable[[str, str, str], bool]
    ) -> None:
        """Listen, and have the pump wait; call it before the first socket with a domain is bound.

        Args:
            context: whose sockets ask.
            pump: waits for what they ask.
            admits: tells whether a key may come in; called with the domain, the key in Z85, and the address that it
                comes from. It must not raise.
        """
        super().__init__(context, log=_LOGGER)
        self._admits = admits
        self._pump = pump
        self._address = ""
        self.start()
        pump.watch(self.zap_socket)

    def answer(self) -> None:
        """Answer the handshakes that wait, a bounded number of them."""
        for _ in range(_BATCH):
            messages = receive(self.zap_socket, 1)  # a REP answers each before it takes the next one
            if not messages:
                return
            frames = messages[0]
            self._address = frames[3].decode("ascii", "replace") if len(frames) > 3 else ""
            # A coroutine that waits for nothing, since the provider below is no coroutine: one step ends it.
            step = self.handle_zap_message(frames)
            try:
                step.send(None)
            except StopIteration:
                continue
            step.close()  # not reached as pyzmq is; the handshake then ends in its own time

    def serve(self, *domains: str) -> None:
        """Admit to these domains, and to no others, whoever `admits` lets in."""
        for domain in domains:
            self.configure_curve_callback(domain, self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Decide on a handshake; pyzmq calls it."""
        return self._admits(domain, key.decode("ascii"), self._address)

    def close(self) -> None:
        """Answer nothing more."""
        self._pump.forget(self.zap_socket)
        self.stop()


def key_of(frame: Any) -> str | None:
    """Return the key that the sender of an uncopied frame has shown; None where it had to show none."""
    try:
        key = frame.get("User-Id")
    except zmq.ZMQError:
        return None
    return str(key) or None
