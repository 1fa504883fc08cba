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
from .limits import Limits
from .meters import Account, Refusal, WorkerAccount

#: Nobody knows when a worker will be free for what waits; it may ask again so often.
_QUEUED_RETRY_S = 1.0
#: Penalties double up to this: who has mended his program is not to wait for longer.
MAX_PENALTY_S = 300.0
#: A key that has behaved for so long begins with the first penalty again.
FORGET_S = 3600.0


class ClientAccount(Account):
    """What a client may do, and what it has under way.

    Attributes:
        open: its requests that have no answer yet.
        queued_bytes: payloads and attachments of those that wait for a worker.
    """

    __slots__ = ("_most_queued", "open", "queued_bytes")

    def __init__(self, limits: Limits) -> None:
        """Have used nothing."""
        super().__init__(limits)
        self._most_queued = limits.queued_bytes
        self.open = 0
        self.queued_bytes = 0

    def admit(self, size_bytes: int, now: float) -> Refusal | None:
        """Account for a request, or tell why it is refused."""
        if self.queued_bytes and self._most_queued and self.queued_bytes + size_bytes > self._most_queued:
            return Refusal(_QUEUED_RETRY_S, f"more than {self._most_queued} bytes of its requests wait already")
        return self.request(size_bytes, self.open, now)


@dataclass(slots=True)
class _Penalty:
    """How long a key stays outside.

    Attributes:
        until: when it may come in again.
        seconds: how long that was this time.
    """

    until: float
    seconds: float


AccountT = TypeVar("AccountT", ClientAccount, WorkerAccount)


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
        for key in self._penalties.keys() - allowed.by_key.keys():
            del self._penalties[key]
