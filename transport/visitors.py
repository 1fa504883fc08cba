"""Which connections a worker's door keeps: pure, connections and the time in, connections to cut out.

Whoever comes is a stranger until it has said what a client says first. A stranger costs a file descriptor and has
shown nothing, so it has little time, and it makes room for whoever comes later. Those that have shown something are
not cut for anybody who comes later.
"""

from __future__ import annotations

import math
from collections import OrderedDict

#: A connection: file descriptor and inode.
ConnectionId = tuple[int, int]

#: Time for the first word. Clients have it ready as soon as they are connected.
GREETING_S = 5.0
#: Whoever looks so much later than the last time was asleep, and has not read what strangers said meanwhile: they
#: have a little time more.
_LATE_S = 2.5
_PATIENCE_S = 1.0


class Visitors:
    """The connections that are to stay. Each call takes constant time but for what it returns."""

    def __init__(self, most: int) -> None:
        """Have none, and keep at most so many."""
        self._most = most
        #: When each stranger came, the oldest first.
        self._strangers: OrderedDict[ConnectionId, float] = OrderedDict()
        #: The others, each with its routing id.
        self._known: dict[ConnectionId, bytes] = {}
        self._peers: dict[bytes, ConnectionId] = {}
        self._now = -math.inf
        self._looked_at = self._lenient_until = -math.inf

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._strangers) + len(self._known)

    def __contains__(self, connection: ConnectionId) -> bool:
        """Tell whether a connection is there, and is to stay."""
        return connection in self._strangers or connection in self._known

    def knows(self, peer: bytes) -> bool:
        """Tell whether a routing id is that of one who has shown something."""
        return peer in self._peers

    def arrived(self, connection: ConnectionId, now: float) -> ConnectionId | None:
        """Take in a connection.

        Returns:
            Which one is to be cut for it, forgotten already: the oldest stranger, this one itself where there is no
            other. None where there is room.
        """
        self._now = max(self._now, now)  # the strangers are in the order of their times
        self._strangers[connection] = self._now
        if len(self) <= self._most:
            return None
        return self._strangers.popitem(last=False)[0]

    def attached(self, connection: ConnectionId, peer: bytes) -> None:
        """Note that one who is there has said what a client says, by this routing id."""
        self.left(connection)
        before = self._peers.pop(peer, None)
        if before is not None:
            del self._known[before]  # gone: libzmq has given its id free
        self._known[connection] = peer
        self._peers[peer] = connection

    def left(self, connection: ConnectionId) -> None:
        """Forget one that is gone, or that is cut."""
        self._strangers.pop(connection, None)
        peer = self._known.pop(connection, None)
        if peer is not None:
            del self._peers[peer]

    def overdue(self, now: float) -> list[ConnectionId]:
        """Return the strangers whose time is up: they are to be cut, and forgotten already. Call it each second."""
        # Not twice in a row, or a loop that is always late would never cut any.
        if now > self._looked_at + _LATE_S and self._lenient_until <= self._looked_at:
            self._lenient_until = now + _PATIENCE_S
        self._looked_at = now
        found: list[ConnectionId] = []
        while self._strangers and now >= self._lenient_until:
            connection, came = next(iter(self._strangers.items()))
            if now < came + GREETING_S:
                break
            del self._strangers[connection]
            found.append(connection)
        return found

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        assert len(self) <= self._most
        assert not self._strangers.keys() & self._known.keys()
        assert {peer: connection for connection, peer in self._known.items()} == self._peers
        assert len(self._known) == len(self._peers)
        times = list(self._strangers.values())
        assert times == sorted(times)
