"""Whose limits count for which session: one account for a key with all its sessions, else one for each session.

Who has used his account up is cut off. A key is then not let in for a while, longer each time: else whoever floods
would come back at once, with a burst of everything. Where there are no keys, nothing but the address tells who comes
back, and others may share that: there the new connection begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
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


class _Key(Generic[AccountT]):
    """What is known of a key.

    Attributes:
        account: what all its sessions may do.
        garbage: how often it has brought what means nothing.
        begun: how many sessions it has begun.
        models: how much it has told of models in that.
        outside_until: when it may come in again, None where it was never cut off.
        penalty_s: for how long it was to stay outside the last time.
    """

    __slots__ = ("account", "begun", "garbage", "models", "outside_until", "penalty_s")

    def __init__(self, account: AccountT) -> None:
        self.account: AccountT = account
        self.garbage = TokenBucket(_GARBAGE_PER_S, _GARBAGE_BURST)
        self.begun = TokenBucket(_SESSIONS_PER_S, _SESSIONS_BURST)
        self.models = TokenBucket(_MODELS_PER_S, _MODELS_BURST)
        self.outside_until: float | None = None
        self.penalty_s = 0.0


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
        #: By public key; as many as there are on the list.
        self._keys: dict[str, _Key[AccountT]] = {}

    def _key(self, identity: Identity) -> _Key[AccountT]:
        key = self._keys.get(identity.key)
        if key is None:
            key = self._keys[identity.key] = _Key(self._make(self._limits))
        return key

    def begin(self, identity: Identity | None, now: float, models: int = 0) -> str:
        """Account for a session that a key begins; return why it may not, "" where it may.

        Args:
            identity: whose key it is; None where there are no keys, and nothing is counted.
            now: the time.
            models: how many models it tells of.
        """
        if identity is None:
            return ""
        key, most = self._key(identity), self._limits.connections_per_peer
        if most and key.account.sessions >= most:
            return f"too many connections with this key: at most {most}"
        wait_s = key.begun.take(1, now) or key.models.take(models, now)
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
        return not self._key(identity).garbage.take(_COSTLY if size_bytes > MAX_MESSAGE_BYTES else 1, now)

    def of(self, identity: Identity | None) -> AccountT:
        """Return the account of a session that begins."""
        return self._make(self._limits) if identity is None else self._key(identity).account

    def punish(self, identity: Identity | None, now: float) -> None:
        """Let a key that was cut off not in for a while."""
        if identity is None or not self._limits.penalty_s:
            return
        key, seconds = self._key(identity), self._limits.penalty_s
        if key.outside_until is not None:
            if now < key.outside_until:
                return  # another session of those that were there: it has not come back
            if now < key.outside_until + FORGET_S:
                seconds = min(2 * key.penalty_s, max(MAX_PENALTY_S, seconds))
        key.outside_until, key.penalty_s = now + seconds, seconds

    def outside_s(self, identity: Identity | None, now: float) -> float:
        """Return for how many seconds more a key is not let in, 0 where it is."""
        key = None if identity is None else self._keys.get(identity.key)
        return 0.0 if key is None or key.outside_until is None else max(0.0, key.outside_until - now)

    def keep(self, allowed: Allowed) -> None:
        """Forget the keys that are on no list any more."""
        for key in self._keys.keys() - allowed.by_key.keys():
            del self._keys[key]
