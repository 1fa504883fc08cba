"""Messages without an end: libzmq keeps a message until its last frame is there, and bounds neither frames nor bytes.

Nobody sees such a message but the kernel, which counts what a TCP connection has brought. So a connection that has
brought more than any message may have, without a message of it being read meanwhile, is cut. Counts are looked at
only while the process grows, since there may be thousands of connections and nearly always nothing to find. Peers on
an ipc socket are not counted: they run under the broker's own account.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping

from ..protocol.limits import MAX_BODY_BYTES, MAX_MESSAGE_BYTES
from ..transport.connections import ConnectionId

#: How often to look: what a fast network brings meanwhile is some hundred megabytes at most.
LOOK_S = 0.1
#: The same while the process grows.
CLOSE_LOOK_S = 0.05
#: What a look at one connection takes.
_LOOK_AT_ONE_S = 12e-6
#: By how much the least of its memory is taken to rise from one look to the next: half a gigabyte is kept no more for
#: growth after some seconds.
_RISE_BYTES = 4 * 1024 * 1024
#: The process grows: by so much since it was smallest lately.
_GROWTH_BYTES = 32 * 1024 * 1024
#: The longest message, with its envelope, and a margin for what comes around it.
MOST_BYTES = MAX_MESSAGE_BYTES + 2 * MAX_BODY_BYTES
#: Where memory grows between two looks by so much, and so many times of what all connections have brought meanwhile,
#: the one with the most that is unread is cut, if that is so much.
_TINY_GROWTH_BYTES = 16 * 1024 * 1024
_TINY_FACTOR = 6
_TINY_FRAMES_BYTES = 256 * 1024
#: The same for who has not introduced himself.
MOST_STRANGER_BYTES = 4 * 1024 * 1024


class Inflow:
    """What connections bring while nothing of it is read.

    Attributes:
        look_at: when to look again.
    """

    def __init__(
        self,
        bytes_in: Callable[[ConnectionId], int | None],
        now: float,
        memory: Callable[[], int] | None = None,
    ) -> None:
        """Have seen nothing.

        Args:
            bytes_in: returns what a connection has brought so far in bytes, None where that is not known.
            now: the time.
            memory: returns the bytes of memory that the process has; by default what the system says.
        """
        self.look_at = now + LOOK_S
        self._bytes_in = bytes_in
        self._memory = memory or resident_bytes
        self._least = self._memory()
        #: The memory at the last look, and what each connection had brought by then.
        self._before: tuple[int, Mapping[ConnectionId, int]] = (0, {})
        #: What each connection had brought when a message of it was read last, and how many had been read then.
        self._marks: dict[ConnectionId, tuple[int, int]] = {}

    def look(
        self, now: float, connections: Callable[[], Iterable[tuple[ConnectionId, int | None]]]
    ) -> list[ConnectionId]:
        """Look if it is time.

        Args:
            now: the time.
            connections: returns those that are open, each with how many messages of it were read in its session; None
                where it has none.

        Returns:
            The connections that are to be cut.
        """
        if now < self.look_at:
            return []
        memory = self._memory()
        grows = memory >= self._least + _GROWTH_BYTES
        # What the process has kept for a while is not what grows now; the system gets little of it back.
        self._least = min(memory, self._least + _RISE_BYTES)
        self.look_at = now + (CLOSE_LOOK_S if grows else LOOK_S)
        if not grows:
            self._marks.clear()
            self._before = 0, {}
            return []
        found, marks = [], {}
        unread: dict[ConnectionId, int] = {}
        brought_by: dict[ConnectionId, int] = {}
        for connection, read in connections():
            brought = self._bytes_in(connection)
            if brought is None:
                continue
            messages = -1 if read is None else read
            mark = self._marks.get(connection)
            if mark is None and read is None:
                mark = (0, messages)  # all that a stranger has brought counts
            if mark is None or mark[1] != messages:
                mark = (brought, messages)
            marks[connection] = mark
            unread[connection], brought_by[connection] = brought - mark[0], brought
            if brought - mark[0] > (MOST_STRANGER_BYTES if read is None else MOST_BYTES):
                found.append(connection)
        self._marks = marks
        # A look at ten thousand takes a tenth of a second: a tenth of the time at most is spent so.
        self.look_at = max(self.look_at, now + 10 * _LOOK_AT_ONE_S * len(marks))
        if not found:
            found = self._tiny_frames(memory, brought_by, unread)
        self._before = memory, brought_by
        return found

    def _tiny_frames(
        self, memory: int, brought_by: Mapping[ConnectionId, int], unread: Mapping[ConnectionId, int]
    ) -> list[ConnectionId]:
        """Return the connection with the most unread where the process has grown by far more than all have brought.

        A frame takes 64 bytes of memory, and as few as two on the wire.
        """
        memory_before, before = self._before
        brought = sum(count - before.get(connection, 0) for connection, count in brought_by.items())
        most = max(unread, key=unread.__getitem__, default=None)
        if not before or most is None or unread[most] < _TINY_FRAMES_BYTES:
            return []
        return [most] if memory - memory_before > _TINY_GROWTH_BYTES + _TINY_FACTOR * brought else []


def resident_bytes() -> int:
    """Return the memory that this process has in use; 0 where the system has no /proc."""
    if sys.platform != "linux":
        return 0
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no descriptor left for the moment
        return 0
