"""What peers have not taken yet: kept per peer and in order, for a while and up to a size. No sockets, no clock.

A ROUTER cannot tell when one peer's queue has room again, so what was refused is tried again and again. A peer that
takes nothing for too long, or for which too much piles up, is lost; nobody else notices it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..transport.pump import Outcome
from .metrics import Pending

#: A reader that pauses is served again this soon after it goes on; a hundred looks a second cost next to nothing.
RETRY_S = 0.01
#: One that reads, and only more slowly than others send, is looked at again at once. Libzmq takes half a queue (500
#: messages) at a time, so the longer pause would let it have 50,000 a second at most: a quarter of the rate.
RETRY_READING_S = 0.001
#: Sends in one round, for all peers together: one or two milliseconds, and then everybody else has his turn.
ROUND_SENDS = 500
#: When the loop itself stood still for longer than this, the time is not counted against the peers.
_LATE_S = 1.0


@dataclass(frozen=True, slots=True)
class Loss:
    """A peer that nothing can be sent to any more; `stalled` if it is there and does not read."""

    peer: bytes
    why: str
    stalled: bool = False


@dataclass(slots=True, eq=False)
class _Queue:
    """What one peer has not taken: at least one message, and when it took its last one."""

    messages: deque[Sequence[bytes]]
    bytes: int
    took_at: float


class Backlog:
    """All peers of one socket that have not taken everything.

    Attributes:
        peers: what is kept, by routing id. While it is empty, a message may be sent without asking here.
    """

    def __init__(
        self, send: Callable[[Sequence[bytes]], Outcome], limit_bytes: int, timeout_s: float, pending: Pending
    ) -> None:
        """Make an empty backlog.

        Args:
            send: sends one message, whose first frame is the routing id, without waiting.
            limit_bytes: a peer for which as much is kept already is lost with the next message.
            timeout_s: a peer that has taken nothing for so long is lost.
            pending: where to write down how much is kept.
        """
        self.peers: dict[bytes, _Queue] = {}
        self._send = send
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._pending = pending
        self._retry_at = 0.0

    def send(self, frames: Sequence[bytes], now: float) -> Loss | None:
        """Send a message, or keep it behind those that the peer has not taken; return the peer's loss."""
        peer = frames[0]
        queue = self.peers.get(peer)
        if queue is None:
            outcome = self._send(frames)
            if outcome is not Outcome.FULL:
                return None if outcome is Outcome.SENT else _gone(peer)
            if not self.peers:
                self._retry_at = now + RETRY_READING_S
            queue = self.peers[peer] = _Queue(deque(), 0, now)
            self._pending.peers += 1
        elif queue.bytes >= self._limit_bytes:
            # The last of them may go beyond it: one long message is no reason to lose anybody.
            self._drop(peer)
            return Loss(peer, f"it has stopped reading: {queue.bytes} bytes wait", stalled=True)
        queue.messages.append(frames)
        self._count(queue, _size(frames))
        return None

    def send_last(self, frames: Sequence[bytes]) -> bool:
        """Send the last message of a session, if it can be sent; what is kept of the session is dropped.

        Returns:
            Whether it was sent.
        """
        if frames[0] in self.peers:
            self._drop(frames[0])
        return self._send(frames) is Outcome.SENT

    def retry(self, now: float) -> list[Loss]:
        """Send again what is due, a bounded number of messages; return the peers that are lost."""
        if not self.peers or now < self._retry_at:
            return []
        late_s = now - self._retry_at
        if late_s > _LATE_S:
            for queue in self.peers.values():
                queue.took_at += late_s
        losses, left, reading = [], ROUND_SENDS, False
        for peer in list(self.peers):
            if left == 0:
                break
            sends, loss = self._resend(peer, left, now)
            left -= sends
            reading = reading or sends > 1
            if loss is not None:
                self._drop(peer)
                losses.append(loss)
            elif peer in self.peers:
                self.peers[peer] = self.peers.pop(peer)  # behind those whose turn has not come
        self._retry_at = now + (RETRY_READING_S if reading else RETRY_S)
        return losses

    def next_deadline(self) -> float | None:
        """Return when to call `retry`; None where nothing is kept."""
        return self._retry_at if self.peers else None

    def _resend(self, peer: bytes, limit: int, now: float) -> tuple[int, Loss | None]:
        """Send what is kept for a peer, up to `limit` messages; return the number of sends, and the peer's loss."""
        queue = self.peers[peer]
        for sends in range(1, limit + 1):
            outcome = self._send(queue.messages[0])
            if outcome is Outcome.GONE:
                return sends, _gone(peer)
            if outcome is Outcome.FULL:
                stalled = now - queue.took_at >= self._timeout_s
                why = f"it has stopped reading: it took nothing for {self._timeout_s:g} s, {queue.bytes} bytes wait"
                return sends, Loss(peer, why, stalled=True) if stalled else None
            queue.took_at = now
            self._count(queue, -_size(queue.messages.popleft()))
            if not queue.messages:
                self._drop(peer)
                return sends, None
        return limit, None

    def _count(self, queue: _Queue, size_bytes: int) -> None:
        queue.bytes += size_bytes
        self._pending.bytes += size_bytes

    def _drop(self, peer: bytes) -> None:
        self._pending.bytes -= self.peers.pop(peer).bytes
        self._pending.peers -= 1


def _size(frames: Sequence[bytes]) -> int:
    return sum(map(len, frames))


def _gone(peer: bytes) -> Loss:
    return Loss(peer, "its connection is gone")
