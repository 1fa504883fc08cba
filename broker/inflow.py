"""Messages without an end: libzmq keeps a message until its last frame is there, and bounds neither frames nor bytes.

Nobody sees such a message but the kernel, which counts what a TCP connection has brought. So a connection that has
brought more than any message may have, without a message of it being read meanwhile, is cut. Counts are looked at
only while the process grows, since there may be thousands of connections and nearly always nothing to find. Peers on
an ipc socket are not counted: they run under the broker's own account.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

from ..protocol.limits import MAX_BODY_BYTES, MAX_MESSAGE_BYTES
from ..transport.connections import ConnectionId

#: How often to look: what a fast network brings meanwhile is some hundred megabytes at most.
LOOK_S = 0.25
#: The process grows: by so much since it was smallest lately.
_GROWTH_BYTES = 64 * 1024 * 1024
#: The longest message, with its envelope, and a margin for what comes around it.
MOST_BYTES = MAX_MESSAGE_BYTES + 2 * MAX_BODY_BYTES
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
        self.look_at = now + LOOK_S
        memory = self._memory()
        if memory < self._least + _GROWTH_BYTES:
            # Slowly up: what the process has kept for a while is not what grows now.
            self._least = min(memory, self._least + _GROWTH_BYTES // 64)
            self._marks.clear()
            return []
        found, marks = [], {}
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
            if brought - mark[0] > (MOST_STRANGER_BYTES if read is None else MOST_BYTES):
                found.append(connection)
        self._marks = marks
        return found


def resident_bytes() -> int:
    """Return the memory that this process has in use; 0 where the system has no /proc."""
    if sys.platform != "linux":
        return 0
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no descriptor left for the moment
        return 0
