"""What goes wrong in a world: each fault strikes one node or link, and heals."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .broker import SimBroker
from .client import SimClient
from .kinds import FAULTS, TREE_FAULTS
from .layout import paths
from .net import Link, Node
from .peer import Peer
from .worker import SimWorker

if TYPE_CHECKING:
    from .world import World


class Faults:
    """The faults of one world.

    Attributes:
        struck: how often each has happened.
        rolling: a rolling restart is under way.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.struck: Counter[str] = Counter()
        self.rolling = False
        self._random = world.random
        self._clock = world.clock

    def strike(self) -> None:
        """Let one of the kind's faults happen, somewhere."""
        name = self._random.choice(FAULTS + TREE_FAULTS if self.world.kind.tree else FAULTS)
        self.struck[f"fault {name}"] += 1
        getattr(self, name)()

    def strike_door(self) -> None:
        """Let something happen to a connection past the broker, if there is one."""
        doors = [worker.door for worker in self.world.workers if worker.door is not None and worker.alive]
        links = [link for door in doors for link, _ in door.peers.values()]
        if not links:
            return
        random, link = self.world.direct_random, self.world.direct_random.choice(links)
        what = random.choice(["cut", "silence", "half_silence", "stuff", "corrupt", "hold"])
        self.struck[f"fault door {what}"] += 1
        if what == "cut":
            self.world.host(link.endpoint).cut(link)
        elif what == "silence":
            link.silence()
        elif what == "half_silence":
            link.silent[random.choice([False, True])] = True
        elif what == "stuff":
            link.full = True
            self._clock.after(random.uniform(0.0, 8.0), setattr, link, "full", False)
        elif what == "corrupt":
            link.corrupt[random.choice([False, True])] = True
        else:
            link.hold(random.uniform(0.05, 1.0) ** 2 * self.world.kind.heal_s)

    def heal(self) -> None:
        """End what would last, and lose nothing any more; links that are dead stay so until somebody notices."""
        self.world.net.loss = 0.0
        for node in self.world.nodes():
            node.resume()

    def repair(self) -> None:
        """Take back what only operators can, and see whether they have; call it until nothing is left of it."""
        for endpoint, broker in self.world.brokers.items():
            operator = self.world.operators[endpoint]
            if broker.alive and not operator.asked:
                for name in sorted(broker.core.registry.held):
                    operator.ask("undrain", worker=name)
            self._bring_back(broker)

    def roll(self) -> None:
        """Drain every worker and every broker, one after the other: the next one when the last one is back."""
        self.rolling = True
        workers = [worker for worker in self.world.workers if worker.alive]
        nodes: list[SimWorker | SimBroker] = [*workers, *self.world.brokers.values()]
        self._random.shuffle(nodes)
        self._roll(nodes)

    def _roll(self, nodes: list[SimWorker | SimBroker]) -> None:
        self.rolling = bool(nodes)
        if not nodes:
            return
        if self.world.all_found():
            node, grace_s = nodes.pop(), self._random.choice([0.0, 0.3, 3.0])
            self.struck["fault rolled"] += 1
            if isinstance(node, SimWorker):
                node.drain(grace_s)
            else:
                node.drain(grace_s, self._random.uniform(0.05, 0.5))
        self._clock.after(0.1, self._roll, nodes)

    # On workers.

    def kill_worker(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.die()
            self._clock.after(self._lasts(), self.world.replace, worker)

    def drain_worker(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.drain(self._random.choice([0.0, 1.0, 10.0]))

    def order_drain(self) -> None:
        """Have a client ask its broker to drain a worker."""
        worker, client = self._worker(), self._client()
        if worker is not None and client is not None:
            client.ask("drain", worker=self._called(worker, client), grace_s=self._random.choice([0.0, 1.0, 3.0]))

    def replace_worker(self) -> None:
        """Give a worker's name to a new process while the old one only sleeps, or cannot be reached."""
        worker = self._worker()
        if worker is not None:
            self._random.choice([worker.pause, lambda seconds: self._isolate(worker, seconds)])(self._lasts())
            self.world.replace(worker)

    def hang_engine(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.hang(self._lasts())

    def fail_engine(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.fail()

    def sicken_engine(self) -> None:
        """Let an engine fail whatever it is given for a while: its breakers open."""
        worker = self._worker()
        if worker is not None:
            worker.sicken(self._lasts())

    def hold_worker(self) -> None:
        """Have a broker give a worker, or a broker below it, nothing new for a while."""
        broker = self._random.choice(list(self.world.brokers.values()))
        name = self._random.choice(list(paths(self.world, broker.name)))
        operator = self.world.operators[broker.name]
        operator.ask("drain", worker=name, stay=True)
        self._clock.after(self._lasts(), lambda: operator.ask("undrain", worker=name))

    def undrain_worker(self) -> None:
        """Have a worker that drains, or does not, told to stay."""
        worker, client = self._worker(), self._client()
        if worker is not None and client is not None:
            client.ask("undrain", worker=self._called(worker, client))

    def fail_job(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.fail_job()

    def pause_worker(self) -> None:
        worker = self._worker()
        if worker is not None:
            worker.pause(self._lasts())

    # On brokers.

    def kill_broker(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.kill(self._lasts())

    def drain_broker(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.drain(self._random.choice([0.0, 1.0, 3.0]), self._lasts())

    def pause_broker(self) -> None:
        broker = self._broker()
        if broker is not None:
            broker.pause(self._lasts())

    def drain_branch(self) -> None:
        """Have a broker send one below it away, which is started anew some time after it has left."""
        child = self._child()
        if child is not None:
            operator = self.world.operators[self._random.choice(child.settings.uplinks)]
            operator.ask("drain", worker=child.settings.name, grace_s=self._random.choice([0.0, 1.0, 3.0]))
            self._clock.after(1.0 + self._lasts(), self._bring_back, child)

    def cut_uplink(self) -> None:
        """Break the connections of a broker with those above it."""
        child = self._child()
        for link in list(child.links.values()) if child is not None else []:
            self.world.brokers[link.endpoint].cut(link)

    def kill_mid(self) -> None:
        child = self._child()
        if child is not None:
            child.kill(self._lasts())

    def _bring_back(self, broker: SimBroker) -> None:
        if broker.alive and broker.has_left() and not broker.core.exchange.draining:
            broker.kill(0.1)

    # On clients.

    def kill_client(self) -> None:
        client = self._client()
        if client is not None:
            client.die()
            self.world.add_client()

    def close_client(self) -> None:
        client = self._client()
        if client is not None:
            client.close()
            self.world.add_client()

    def pause_client(self) -> None:
        client = self._client()
        if client is not None:
            client.pause(self._lasts())

    # On connections.

    def cut_link(self) -> None:
        """Break a connection; both sides are told."""
        link = self._link()
        if link is not None:
            self.world.host(link.endpoint).cut(link)

    def silence_link(self) -> None:
        """Lose all that is sent on a connection from now on; nobody is told."""
        link = self._link()
        if link is not None:
            link.silence()

    def half_silence_link(self) -> None:
        """The same, in one direction."""
        link = self._link()
        if link is not None:
            link.silent[self._random.choice([False, True])] = True

    def hold_link(self) -> None:
        """Delay all that is on its way on a connection, for a while."""
        link = self._link()
        if link is not None:
            link.hold(self._lasts())

    def stuff_link(self) -> None:
        """A peer reads so slowly that its broker can send it nothing more."""
        link = self._link()
        if link is not None:
            link.full = True

    def corrupt_link(self) -> None:
        """Damage the next message on a connection."""
        link = self._link()
        if link is not None:
            link.corrupt[self._random.choice([False, True])] = True

    def isolate_node(self) -> None:
        """Cut a node off: its connections are dead, and nobody can make new ones for a while."""
        self._isolate(self._random.choice(self.world.nodes()), self._lasts())

    def delay_node(self) -> None:
        """Delay all that is on its way to and from a node, for a while."""
        seconds = self._lasts()
        for link in self._links_of(self._random.choice(self.world.nodes())):
            link.hold(seconds)

    # Which, and for how long.

    def _isolate(self, node: Node, seconds: float) -> None:
        node.reached_at = self._clock.now + seconds
        for link in self._links_of(node):
            link.silence()

    @staticmethod
    def _links_of(node: Node) -> list[Link]:
        if isinstance(node, SimBroker):
            return node.all_links()
        links = list(node.links.values()) if isinstance(node, Peer) else []
        if isinstance(node, SimWorker) and node.door is not None:
            links += [link for link, _ in node.door.peers.values()]
        return links

    def _lasts(self) -> float:
        return self._random.uniform(0.05, 1.0) ** 2 * self.world.kind.heal_s

    def _worker(self) -> SimWorker | None:
        alive = [worker for worker in self.world.workers if worker.alive]
        return self._random.choice(alive) if alive else None

    def _client(self) -> SimClient | None:
        alive = [client for client in self.world.clients if client.alive and not client.core.closed]
        return self._random.choice(alive) if alive else None

    def _broker(self) -> SimBroker | None:
        alive = [broker for broker in self.world.brokers.values() if broker.alive]
        return self._random.choice(alive) if alive else None

    def _child(self) -> SimBroker | None:
        alive = [broker for broker in self.world.brokers.values() if broker.alive and broker.settings.uplinks]
        return self._random.choice(alive) if alive else None

    def _called(self, worker: SimWorker, client: SimClient) -> str:
        """Return what a worker is called at a client's first broker; at others it may be unknown."""
        named = paths(self.world, client.settings.endpoints[0])
        return next((path for path in named if path.split("/")[-1] == worker.name), worker.name)

    def _link(self) -> Link | None:
        nodes: list[Peer] = [*self.world.workers, *self.world.clients, *self.world.brokers.values()]
        links = [link for node in nodes if node.alive for link in node.links.values()]
        return self._random.choice(links) if links else None
