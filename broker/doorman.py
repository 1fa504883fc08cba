"""Which connections of one ROUTER may stay: pure, events and the time in, connections to close out.

A connection is a stranger until it has introduced itself, by a HELLO or READY that was let in. Strangers cost a file
descriptor and memory and have shown nothing, so there may be few of them, and not for long.

What a ROUTER's monitor tells and what its peers send come by two ways, in any order: a peer may be introduced before
its connection is known, or after it has gone.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from .limits import Limits
from .meters import TokenBucket

#: A connection: file descriptor and inode. The first may be used again at once, the second is not.
ConnectionId = tuple[int, int]

#: A stranger's HELLO may be in the ROUTER's queue while thousands of honest peers come back together. Until then only
#: those above the limit of all connections go.
_PATIENCE_S = 1.0
#: Whoever looks this much later than it should have was busy or asleep, and has not read what strangers sent.
_LATE_S = 0.5
#: The burst of new connections from one address, in seconds' worth of their rate; and for how many addresses it is
#: remembered.
_RATE_BURST_S = 10
_MOST_RATES = 16_384
#: Last words are to leave before the connection does.
_LAST_WORDS_S = 0.2
#: An introduction without a connection waits so long for it: the monitor is never as far behind. It is kept for so
#: many, since those of connections that are gone come here too.
_EARLY_S = 10.0
_MOST_EARLY = 16_384


class Why(str, Enum):
    """Why a connection is closed; the value is for logs."""

    FULL = "too many connections"
    STRANGERS = "too many connections that have not introduced themselves"
    SILENT = "it has not introduced itself in time"
    ADDRESS = "too many connections from its address"
    RATE = "too many new connections a second from its address"
    ACCOUNT = "too many connections with its key"
    DISMISSED = "it was sent away"


class Close(NamedTuple):
    """A connection that is to be closed; the doorman has forgotten it.

    Attributes:
        connection: which one.
        why: why.
        who: its account, or else its address, "" for a stranger of this machine.
    """

    connection: ConnectionId
    why: Why
    who: str


class _Connection:
    """One that is open.

    Attributes:
        address: where it comes from, for logs.
        machine: what it is counted by, "" for this machine.
        peer: its routing id, None for a stranger.
        account: whose it is, None for a stranger and where there are no keys.
    """

    __slots__ = ("account", "address", "machine", "peer")

    def __init__(self, address: str, machine: str) -> None:
        self.address = address
        self.machine = machine
        self.peer: bytes | None = None
        self.account: str | None = None


class _Early(NamedTuple):
    """An introduction whose connection is not known."""

    peer: bytes
    account: str | None
    until: float


class Doorman:
    """The connections of one ROUTER. Each call takes constant time but for what it closes."""

    def __init__(self, limits: Limits) -> None:
        """Have no connections."""
        self._most = limits.connections or math.inf
        self._most_strangers = limits.handshakes or math.inf
        self._most_of_one = limits.connections_per_peer or math.inf
        self._greeting_s = limits.greeting_s or math.inf
        self._rate = limits.connections_per_s
        #: How quickly connections came from each machine, the latest last.
        self._rates: OrderedDict[str, TokenBucket] = OrderedDict()
        #: No stranger has had its time before; it moves on when the doorman was late.
        self._lenient_until = -math.inf
        self._now = -math.inf
        self._open: dict[ConnectionId, _Connection] = {}
        #: Those without a peer, since when, oldest first. Not dicts: the first of one is slow to find when many went
        #: before it.
        self._strangers: OrderedDict[ConnectionId, float] = OrderedDict()
        self._early: OrderedDict[ConnectionId, _Early] = OrderedDict()
        #: Those that have been sent away, and when they are closed.
        self._leaving: OrderedDict[ConnectionId, float] = OrderedDict()
        self._by_peer: dict[bytes, ConnectionId] = {}
        self._by_account: dict[str, dict[ConnectionId, None]] = {}
        self._by_machine: dict[str, int] = {}
        self._closed: dict[Why, int] = dict.fromkeys(Why, 0)

    def accepted(self, connection: ConnectionId, address: str, now: float) -> list[Close]:
        """Note a new connection.

        Args:
            connection: which one.
            address: the other side's, without a port; "" for ipc.
            now: seconds of a monotonic clock.
        """
        now = self._at(now)
        if connection in self._open:
            return []
        record = _Connection(address, machine_of(address))
        self._open[connection] = record
        self._strangers[connection] = now
        if record.machine:
            self._by_machine[record.machine] = self._by_machine.get(record.machine, 0) + 1
            if self._by_machine[record.machine] > self._most_of_one:
                return [self._close(connection, Why.ADDRESS)]
            if self._rate and self._bucket(record.machine).take(1, now):
                return [self._close(connection, Why.RATE)]
        early = self._early.pop(connection, None)
        found = self.introduced(connection, early.peer, early.account, now) if early else []
        if len(self._open) > self._most:
            # The oldest stranger has had the longest time, and the newest may be an honest one; but a few are to be
            # expected, and are no reason to let more in.
            if len(self._strangers) > self._most_strangers:
                found.append(self._close(next(iter(self._strangers)), Why.STRANGERS))
            else:
                found.append(self._close(connection, Why.FULL))
        return found

    def _bucket(self, machine: str) -> TokenBucket:
        bucket = self._rates.get(machine)
        if bucket is None:
            bucket = self._rates[machine] = TokenBucket(self._rate, self._rate * _RATE_BURST_S)
            if len(self._rates) > _MOST_RATES:
                self._rates.popitem(last=False)
        self._rates.move_to_end(machine)
        return bucket

    def introduced(self, connection: ConnectionId, peer: bytes, account: str | None, now: float) -> list[Close]:
        """Note that a connection is a peer's; the latest such news counts.

        Args:
            connection: which one.
            peer: its routing id.
            account: the key that it has shown, or a name that stands for it; None without keys.
            now: seconds of a monotonic clock.
        """
        now = self._at(now)
        record = self._open.get(connection)
        if record is None:
            self._early.pop(connection, None)
            self._early[connection] = _Early(peer, account, now + _EARLY_S)
            if len(self._early) > _MOST_EARLY:
                self._early.popitem(last=False)
            return []
        if record.peer == peer and record.account == account:
            return []
        self._strangers.pop(connection, None)
        self._forget_peer(connection, record)
        record.peer, record.account = peer, account
        self._by_peer[peer] = connection
        if account is not None:
            self._leave_machine(record)  # it counts by its key from now on: many may share an address
            of_account = self._by_account.setdefault(account, {})
            of_account[connection] = None
            if len(of_account) > self._most_of_one:
                return [self._close(connection, Why.ACCOUNT)]
        return []

    def closed(self, connection: ConnectionId) -> None:
        """Note that a connection is gone; one that is not known is fine too."""
        self._early.pop(connection, None)
        if connection in self._open:
            self._drop(connection)

    def dismiss(self, connection: ConnectionId, now: float) -> None:
        """Close a connection in a moment, when what was sent to it has left; one that is not known is fine too."""
        if connection in self._open and connection not in self._leaving:
            self._leaving[connection] = self._at(now) + _LAST_WORDS_S

    def is_leaving(self, connection: ConnectionId) -> bool:
        """Tell whether a connection was dismissed."""
        return connection in self._leaving

    def tick(self, now: float) -> list[Close]:
        """Close those whose time is up."""
        now = self._at(now)
        found = []
        while self._leaving and next(iter(self._leaving.values())) <= now:
            found.append(self._close(next(iter(self._leaving)), Why.DISMISSED))
        if self._strangers:
            self._be_lenient(now)
            while self._strangers and self._greeting_ends() <= now:
                found.append(self._close(next(iter(self._strangers)), Why.SILENT))
            while self._strangers and self._patience_ends() <= now:
                found.append(self._close(next(iter(self._strangers)), Why.STRANGERS))
        while self._early and next(iter(self._early.values())).until <= now:
            self._early.popitem(last=False)
        return found

    def next_deadline(self) -> float | None:
        """Return when `tick` has something to do, None for never."""
        found = [self._greeting_ends(), self._patience_ends()] if self._strangers else []
        found += islice(self._leaving.values(), 1)
        found += (early.until for early in islice(self._early.values(), 1))
        earliest = min(found, default=math.inf)
        return earliest if earliest < math.inf else None

    def peers(self) -> list[tuple[ConnectionId, bytes | None]]:
        """Return all connections, each with the peer that was introduced, None for a stranger."""
        return [(connection, record.peer) for connection, record in self._open.items()]

    def of_peer(self, peer: bytes) -> ConnectionId | None:
        """Return the connection that was introduced with this routing id."""
        return self._by_peer.get(peer)

    def of_account(self, account: str) -> list[ConnectionId]:
        """Return all connections that were introduced with this key, oldest introduction first."""
        return list(self._by_account.get(account, ()))

    @property
    def open(self) -> int:
        """How many connections there are."""
        return len(self._open)

    @property
    def strangers(self) -> int:
        """How many of them have not introduced themselves."""
        return len(self._strangers)

    @property
    def closed_by(self) -> Mapping[Why, int]:
        """How many were to be closed so far, by reason."""
        return self._closed

    def _at(self, now: float) -> float:
        # The queues are in the order of their times because no time is before another one's.
        self._now = max(self._now, now)
        return self._now

    def _be_lenient(self, now: float) -> None:
        due = next(iter(self._strangers.values())) + self._greeting_s
        if now > due + _LATE_S and self._lenient_until < due:
            self._lenient_until = now + _PATIENCE_S

    def _greeting_ends(self) -> float:
        return max(next(iter(self._strangers.values())) + self._greeting_s, self._lenient_until)

    def _patience_ends(self) -> float:
        if len(self._strangers) <= self._most_strangers:
            return math.inf
        return max(next(iter(self._strangers.values())) + _PATIENCE_S, self._lenient_until)

    def _close(self, connection: ConnectionId, why: Why) -> Close:
        record = self._drop(connection)
        self._closed[why] += 1
        return Close(connection, why, record.account or record.address)

    def _drop(self, connection: ConnectionId) -> _Connection:
        record = self._open.pop(connection)
        self._strangers.pop(connection, None)
        self._leaving.pop(connection, None)
        self._forget_peer(connection, record)
        self._leave_machine(record)
        return record

    def _leave_machine(self, record: _Connection) -> None:
        if record.machine:
            self._by_machine[record.machine] -= 1
            if not self._by_machine[record.machine]:
                del self._by_machine[record.machine]
            record.machine = ""

    def _forget_peer(self, connection: ConnectionId, record: _Connection) -> None:
        if record.peer is not None and self._by_peer.get(record.peer) == connection:
            del self._by_peer[record.peer]
        if record.account is not None:
            of_account = self._by_account[record.account]
            del of_account[connection]
            if not of_account:
                del self._by_account[record.account]

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        strangers = {connection for connection, record in self._open.items() if record.peer is None}
        assert set(self._strangers) == strangers
        assert set(self._leaving) <= set(self._open)
        assert not set(self._early) & set(self._open)
        assert len(self._early) <= _MOST_EARLY
        assert len(self._open) <= self._most
        for times in (
            self._strangers.values(),
            self._leaving.values(),
            (found.until for found in self._early.values()),
        ):
            in_order = list(times)
            assert in_order == sorted(in_order)
        for peer, connection in self._by_peer.items():
            assert self._open[connection].peer == peer
        machines: dict[str, int] = {}
        accounts: dict[str, set[ConnectionId]] = {}
        for connection, record in self._open.items():
            if record.machine:
                machines[record.machine] = machines.get(record.machine, 0) + 1
            if record.account is not None:
                accounts.setdefault(record.account, set()).add(connection)
        assert self._by_machine == machines
        assert {account: set(found) for account, found in self._by_account.items()} == accounts
        assert max(machines.values(), default=0) <= self._most_of_one
        assert max(map(len, accounts.values()), default=0) <= self._most_of_one


@lru_cache(4096)
def machine_of(address: str) -> str:
    """Return by what the connections from an address are counted together, "" for those of this machine.

    An IPv6 address counts by its first 64 bits: whoever has one has all that begin so.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""  # ipc has none
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    if ip.is_loopback:
        return ""
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((ip, 64), strict=False))
    return str(ip)
