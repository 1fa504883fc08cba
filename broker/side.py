"""One of a broker's two ROUTERs, and how what comes there becomes an event for the core.

Who has a session is read as the protocol says. Who has none may begin one: its connection is looked at first, and
lost where it brings anything else. Nothing here waits, and what is too long or in too many frames is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import zmq

from ..protocol.codec import decode
from ..protocol.errors import ProtocolError
from ..protocol.identity import Identity
from ..protocol.messages import Message
from ..transport.connections import ConnectionId
from ..transport.pump import Swallow, another, rest
from .access import Access
from .entry import Entry
from .events import Event

_TOO_MANY_FRAMES = "a message of more frames than any has"
#: As what a message counts that keeps all others waiting: nobody may send two.
_COSTLY_BYTES = 1 << 40
#: Messages that are read in no time, whatever they are.
_SMALL_BYTES = 1024
#: While a side is deaf, its peers are excused this often.
_EXCUSE_S = 0.1


class Side:
    """One ROUTER.

    Attributes:
        socket: the ROUTER.
        endpoints: where it listens.
        entry: its connections.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        endpoints: list[str],
        entry: Entry,
        access: Access | None,
        sessions: Container[bytes],
        good: Callable[[bytes, Message, Sequence[bytes], Identity | None], Event],
        bad: Callable[[bytes, ProtocolError, int], Event],
        most_bytes: int,
        most_stranger_bytes: int,
        too_much: Callable[[bytes, bytes, float], str] = lambda _peer, _message, _now: "",
    ) -> None:
        """Have heard nobody.

        Args:
            socket: the ROUTER, bound.
            endpoints: where.
            entry: watches it.
            access: knows whose keys are whose; None where there are no keys.
            sessions: the peers that have a session, as the core keeps them.
            good: makes the event for a message.
            bad: makes the event for what is none.
            most_bytes: bytes that the first frame of a message may have.
            most_stranger_bytes: the same for who has no session.
            too_much: says of a peer, a message's first frame and the time why it is not even read; "" where it is.
        """
        self.socket = socket
        self.endpoints = endpoints
        self.entry = entry
        self._access = access
        self._sessions = sessions
        self._good, self._bad = good, bad
        self._most_bytes = most_bytes
        self._most_stranger_bytes = most_stranger_bytes
        self._too_much = too_much
        self._swallow = Swallow(socket)
        self._deaf_since: float | None = None
        #: Who is being heard without a session, its connection and whose key it has shown.
        self._stranger: tuple[ConnectionId, Identity | None] | None = None

    def take(self, peer: bytes, frame: zmq.Frame, now: float) -> Event | None:
        """Read a message whose first frame after the routing id has been received, uncopied.

        Returns:
            What to tell the core, and then `heard`; None for nothing.
        """
        if peer not in self._sessions:
            return self._from_stranger(peer, frame, now)
        frames = rest(self.socket, frame, uncopied=True)
        try:
            if frames is None:
                self._swallow.begin()
                raise ProtocolError(_TOO_MANY_FRAMES)
            if len(frames[0]) > self._most_bytes:
                raise ProtocolError(f"a message of {len(frames[0])} bytes, expected at most {self._most_bytes}")
            if len(frames[0]) > _SMALL_BYTES and (why := self._too_much(peer, frames[0], now)):
                return self._bad(peer, ProtocolError(why), _COSTLY_BYTES)
            return self._good(peer, decode(frames), frames, None)
        except ProtocolError as error:
            return self._bad(peer, error, _COSTLY_BYTES if frames is None else sum(map(len, frames)))

    def heard(self, peer: bytes, reached: bool, now: float) -> None:
        """Draw the conclusions for a peer's connection, when the core has taken what it said.

        Args:
            peer: who was heard.
            reached: an answer to it could be sent. If not, its connection is gone, and what is known of it may be
                another's by now: nothing is done to that.
            now: the time.
        """
        stranger, self._stranger = self._stranger, None
        if stranger is None:
            if peer not in self._sessions:
                self.entry.end(peer, now)
        elif reached and peer in self._sessions:
            self.entry.introduce(stranger[0], peer, stranger[1], now)
        elif reached:
            self.entry.dismiss(stranger[0], now)

    def go_on(self, now: float) -> float | None:
        """Take more of a message off that nobody reads, if there is one; it keeps all others of this side waiting.

        Returns:
            None where the side can be heard again. Else for how many seconds its peers are to be excused.
        """
        since = self._deaf_since
        if since is None and not self._swallow.under_way:
            return None
        if since is None:
            since = self._deaf_since = now
        done = self._swallow.go_on()
        if not done and now < since + _EXCUSE_S:
            return 0.0
        self._deaf_since = None if done else now
        return now - since

    @property
    def deaf(self) -> bool:
        """Whether a message that nobody reads keeps the others waiting."""
        return self._swallow.under_way

    def _from_stranger(self, peer: bytes, frame: zmq.Frame, now: float) -> Event | None:
        connection, wrong = self.entry.meet(peer, frame, now)
        # Libzmq closes a descriptor after it has told so; this has it take note. Whoever can be sent to after this
        # line has had its connection still when the one above looked at the descriptor.
        another(self.socket)
        size_bytes = len(frame.buffer)
        frames: list[bytes] | None = []
        if connection is None or wrong or size_bytes > self._most_stranger_bytes:
            if frame.more:
                self._swallow.begin()
            wrong = wrong or f"expected a peer to introduce itself, got {size_bytes} bytes or more"
        else:
            frames = rest(self.socket, frame)
            if frames is None:
                self._swallow.begin()
                wrong = _TOO_MANY_FRAMES
        if connection is None:
            return None
        identity = None if self._access is None else self._access.who(frame)
        self._stranger = connection, identity
        try:
            if wrong or frames is None:
                raise ProtocolError(wrong)
            return self._good(peer, decode(frames), frames, identity)
        except ProtocolError as error:
            return self._bad(peer, error, size_bytes)
