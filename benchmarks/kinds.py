"""Which ends belong to which relay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ends import Ends
from nats_ends import NatsEnds
from relays import BARE, BROKER, NATS, PROXY, Relay
from zmtp_ends import BareEnds, BrokerEnds, ProxyEnds

KINDS: dict[str, type[Ends]] = {PROXY: ProxyEnds, BARE: BareEnds, NATS: NatsEnds, BROKER: BrokerEnds}


@contextmanager
def ends_of(relay: Relay, *, workers: int = 1, clients: int, streams: int = 0, slots: int) -> Iterator[Ends]:
    """Connect workers and clients to a relay, and close them in the end; see `Ends`."""
    ends = KINDS[relay.name](relay, workers, clients, streams, slots)
    try:
        yield ends
    finally:
        ends.close()
