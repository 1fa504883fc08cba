"""Which brokers a world has, who is registered where, and what workers are called there."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .broker import SimBroker
    from .kinds import Kind
    from .world import World


@dataclass(frozen=True, slots=True)
class Layout:
    """The brokers of a world: side by side, or some below others.

    Attributes:
        names: of all brokers by endpoint, those above first.
        uplinks: the brokers directly above each one.
    """

    names: dict[str, str]
    uplinks: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, kind: Kind, random: Random) -> Layout:
        """Draw one of this kind: of a tree, one or two roots, and one or two brokers below them or one another."""
        if not kind.tree:
            endpoints = [f"tcp://broker-{number}:1" for number in range(random.choice(kind.brokers))]
            return cls(dict.fromkeys(endpoints, "broker"), dict.fromkeys(endpoints, ()))
        roots = tuple(f"tcp://root-{number}:1" for number in range(random.randint(1, 2)))
        names, uplinks = dict.fromkeys(roots, "root"), dict[str, tuple[str, ...]](dict.fromkeys(roots, ()))
        first, second = "tcp://mid-0:1", "tcp://mid-1:1"
        names[first], uplinks[first] = "mid-0", roots
        if random.random() < 0.6:
            names[second], uplinks[second] = "mid-1", random.choice([roots, roots, (first,)])
        return cls(names, uplinks)

    @property
    def roots(self) -> tuple[str, ...]:
        return tuple(endpoint for endpoint, above in self.uplinks.items() if not above)

    @property
    def mids(self) -> tuple[str, ...]:
        return tuple(endpoint for endpoint, above in self.uplinks.items() if above)

    def homes_of_workers(self, random: Random, least: int) -> list[tuple[str, ...]]:
        """Draw the brokers that each worker registers at: none is left without a worker, here or below it."""
        if not self.mids:
            return [self.roots] * random.randint(least, 3)
        more = random.choices([self.roots, self.mids, *((mid,) for mid in self.mids)], k=random.randint(0, 2))
        return [*((mid,) for mid in self.mids), *more]

    def home_of_client(self, random: Random) -> tuple[str, ...]:
        """Draw the brokers that a client knows, in its order."""
        drawn = random.choice([self.roots, self.roots, self.mids, (*self.roots, *self.mids)]) or self.roots
        return tuple(random.sample(drawn, len(drawn)))


def paths(world: World, endpoint: str) -> dict[str, bool]:
    """Return what workers may be called for a client of this broker, and brokers below it; with whether it is one."""
    found = {worker.name: False for worker in world.workers if endpoint in worker.settings.brokers}
    for child in world.brokers[endpoint].children:
        found[child.settings.name] = True
        below = paths(world, child.name)
        found |= {f"{child.settings.name}/{path}": is_broker for path, is_broker in below.items()}
    return found


def members(world: World, broker: SimBroker) -> dict[str, int]:
    """Return who lives and registers at a broker, workers and brokers: incarnations by name."""
    workers = {
        worker.name: worker.core._incarnation
        for worker in world.workers
        if worker.alive and broker.name in worker.settings.brokers
    }
    return workers | {child.settings.name: child.incarnation for child in broker.children if child.alive}


def knows_its_children(broker: SimBroker) -> bool:
    """Tell whether a broker knows what those below it have, and that nothing is under way there."""
    for child in broker.children:
        session = broker.core.registry.by_name.get(child.settings.name)
        if session is None or session.others or not session.takes_requests:
            return False
        told, below = session.ready, [worker.ready for worker in child.core.registry]
        if told.slots != sum(ready.slots for ready in below):
            return False
        if set(told.brokers) != {child.core.id}.union(*(ready.brokers for ready in below)):
            return False
        if [info.resumes for info in told.models] != [any(info.resumes for ready in below for info in ready.models)]:
            return False
    return True
