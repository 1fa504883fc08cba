"""Whose limits count for which session: one account for a key with all its sessions, else one for each session.

Who has used his account up is cut off. A key is then not let in for a while, longer each time: else whoever floods
would come back at once, with a burst of everything. Where there are no keys, nothing but the address tells who comes
back, and others may share that: there the new connection begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ..protocol.identity import Allowed, Identity
from ..protocol.limits import MAX_MESSAGE_BYTES
from .limits import Limits
from .meters import Account, Refusal, TokenBucket, WorkerAccount

#: Nobody knows when a worker will be free for what waits; it may ask again so often.
_QUEUED_RETRY_S = 1.0
#: Penalties double up to this: who has mended his program is not to wait for longer.
MAX_PENALTY_S = 300.0
#: A key that has behaved for so long begins with the first penalty again.
FORGET_S = 3600.0


class ClientAccount(Account):
    """What a client may do, and what it has under way.

    Attributes:
        sessions: those that there are with it.
        open: its requests that have no answer yet.
        queued_bytes: payloads and attachments of those that wait for a worker.
    """

    __slots__ = ("_most_queued", "open", "queued_bytes", "sessions")

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        super().__init__(limits)
        self._most_queued = limits.queued_bytes
        self.sessions = 0
        self.open = 0
        self.queued_bytes = 0

    def admit(self, size_bytes: int, now: float) -> Refusal | None:
        """Account for a request, or tell why it is refused."""
        if self.queued_bytes and self._most_queued and self.queued_bytes + size_bytes > self._most_queued:
            return Refusal(_QUEUED_RETRY_S, f"more than {self._most_queued} bytes of its requests wait already")
        return self.request(size_bytes, self.open, now)


class KeyedWorker(WorkerAccount):
    """What a worker may do.

    Attributes:
        sessions: those that there are with it.
    """

    __slots__ = ("sessions",)

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        super().__init__(limits)
        self.sessions = 0


@dataclass(slots=True)
class _Penalty:
    """How long a key stays outside.

    Attributes:
        until: when it may come in again.
        seconds: how long that was this time.
    """

    until: float
    seconds: float


#: Messages without any meaning, of all sessions with a key: one program in a fleet may be broken. One that keeps all
#: others waiting counts for more.
_GARBAGE_PER_S = 2
_GARBAGE_BURST = 20
_COSTLY = 10
#: Sessions that a key may begin, a second and at once: a fleet of thousands with one key starts together. More than
#: handshakes allow would be no bound.
_SESSIONS_PER_S = 200
_SESSIONS_BURST = 8_192
#: The same for the models that its workers tell of: a thousand take four milliseconds.
_MODELS_PER_S = 5_000
_MODELS_BURST = 200_000
AccountT = TypeVar("AccountT", ClientAccount, KeyedWorker)


class Accounts(Generic[AccountT]):
    """The accounts of one side: all clients', or all workers'."""

    def __init__(self, kind: Callable[[Limits], AccountT], limits: Limits) -> None:
        """Have none.

        Args:
            kind: makes one.
            limits: what each peer may do.
        """
        self._make: Callable[[Limits], AccountT] = kind
        self._limits = limits
        #: By key; as many as there are keys on the list.
        self._by_key: dict[str, AccountT] = {}
        self._penalties: dict[str, _Penalty] = {}
        #: How often each key has brought what means nothing.
        self._garbage: dict[str, TokenBucket] = {}
        #: How many sessions each key has begun, and how much it has told of models in that.
        self._begun: dict[str, tuple[TokenBucket, TokenBucket]] = {}

    def begin(self, identity: Identity | None, now: float, models: int = 0) -> str:
        """Account for a session that a key begins; return why it may not, "" where it may.

        Args:
            identity: whose key it is; None where there are no keys, and nothing is counted.
            now: the time.
            models: how many models it tells of.
        """
        if identity is None:
            return ""
        most = self._limits.connections_per_peer
        if most and self.of(identity).sessions >= most:
            return f"too many connections with this key: at most {most}"
        begun = self._begun.get(identity.key)
        if begun is None:
            begun = TokenBucket(_SESSIONS_PER_S, _SESSIONS_BURST), TokenBucket(_MODELS_PER_S, _MODELS_BURST)
            self._begun[identity.key] = begun
        wait_s = begun[0].take(1, now) or begun[1].take(models, now)
        return f"this key begins too many sessions: try again in {wait_s:.1f} s" if wait_s else ""

    def garbage(self, identity: Identity | None, size_bytes: int, now: float) -> bool:
        """Account for a message without any meaning, which ends a session; False when a key has brought too many.

        Args:
            identity: whose key it is; None where there are no keys, and nothing is counted.
            size_bytes: how large it was.
            now: the time.
        """
        if identity is None:
            return True
        bucket = self._garbage.get(identity.key)
        if bucket is None:
            bucket = self._garbage[identity.key] = TokenBucket(_GARBAGE_PER_S, _GARBAGE_BURST)
        return not bucket.take(_COSTLY if size_bytes > MAX_MESSAGE_BYTES else 1, now)

    def of(self, identity: Identity | None) -> AccountT:
        """Return the account of a session that begins."""
        if identity is None:
            return self._make(self._limits)
        account = self._by_key.get(identity.key)
        if account is None:
            account = self._by_key[identity.key] = self._make(self._limits)
        return account

    def punish(self, identity: Identity | None, now: float) -> None:
        """Let a key that was cut off not in for a while."""
        if identity is None or not self._limits.penalty_s:
            return
        former = self._penalties.get(identity.key)
        if former is not None and now < former.until:
            return  # another session of those that were there: it has not come back
        seconds = self._limits.penalty_s
        if former is not None and now < former.until + FORGET_S:
            seconds = min(2 * former.seconds, max(MAX_PENALTY_S, seconds))
        self._penalties[identity.key] = _Penalty(now + seconds, seconds)

    def outside_s(self, identity: Identity | None, now: float) -> float:
        """Return for how many seconds more a key is not let in, 0 where it is."""
        penalty = None if identity is None else self._penalties.get(identity.key)
        return 0.0 if penalty is None else max(0.0, penalty.until - now)

    def keep(self, allowed: Allowed) -> None:
        """Forget the keys that are on no list any more."""
        for key in self._by_key.keys() - allowed.by_key.keys():
            del self._by_key[key]
        for key in self._garbage.keys() - allowed.by_key.keys():
            del self._garbage[key]
        for key in self._begun.keys() - allowed.by_key.keys():
            del self._begun[key]
        for key in self._penalties.keys() - allowed.by_key.keys():
            del self._penalties[key]
