"""A diamond of brokers on two roots, in any order of events: no answer is lost or doubled, nothing is left over."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenmq.protocol.messages import Cancel, Chunks, Drain, Error, Finish, FinishReason, Parked, Request

from .stage import request_id
from .tree import ClientPeer, Tree, WorkerPeer, route_of

UPLINKS = {
    "root-1": (),
    "root-2": (),
    "mid-1": ("root-1", "root-2"),
    "mid-2": ("root-1",),
    "leaf": ("mid-1", "mid-2", "root-2"),
}
#: Links of children to parents: a DRAIN goes down one of them.
LINKS = [(child, parent) for child, parents in UPLINKS.items() for parent in parents]
BROKERS = sorted(UPLINKS)
INDEX = st.integers(0, 7)
BROKER = st.sampled_from(BROKERS)


class Held:
    """A request at a worker by hand."""

    def __init__(self, worker: WorkerPeer, request: Request) -> None:
        self.worker, self.request = worker, request
        self.sent = request.envelope.prior_tokens
        self.cancelled = False


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()
        for name, parents in UPLINKS.items():
            self.tree.broker(name, *parents, max_waiting=3)
        self.clients: list[ClientPeer] = []
        self.workers: list[WorkerPeer] = []
        self.held: list[Held] = []
        self.names = Counter[str]()
        #: The latest attempt of each request, by client and number.
        self.asked: dict[tuple[int, int], int] = {}
        #: Attempts that a later one has taken the place of: they need no answer.
        self.superseded: set[tuple[int, int, int]] = set()
        self.answers = Counter[tuple[int, int, int]]()
        self.numbers = 0
        for broker in ("root-1", "root-2", "leaf"):
            self.new_client(broker)
        for broker in ("leaf", "mid-2"):
            self.new_worker(broker, 2)

    # Who comes and goes.

    def new_client(self, broker: str) -> None:
        self.clients.append(self.tree.client(broker, f"client-{len(self.clients)}"))

    def new_worker(self, broker: str, slots: int) -> None:
        self.names[broker] += 1
        self.workers.append(self.tree.worker(broker, f"w{self.names[broker]}", slots=slots))

    @rule(broker=BROKER, slots=st.integers(1, 3))
    @precondition(lambda self: len(self.workers) < 6)
    def worker_comes(self, broker: str, slots: int) -> None:
        if broker in self.tree.cores:
            self.new_worker(broker, slots)
            self.listen()

    @rule(index=INDEX)
    @precondition(lambda self: len(self.workers) > 1)
    def worker_goes(self, index: int) -> None:
        worker = self.workers.pop(index % len(self.workers))
        self.held = [held for held in self.held if held.worker is not worker]
        worker.goes()
        self.listen()

    @rule(broker=BROKER)
    @precondition(lambda self: len(self.clients) < 5)
    def client_comes(self, broker: str) -> None:
        if broker in self.tree.cores:
            self.new_client(broker)

    @rule(index=INDEX)
    @precondition(lambda self: len(self.clients) > 1)
    def client_goes(self, index: int) -> None:
        client = self.clients.pop(index % len(self.clients))
        self.forget(client)
        client.goes()
        self.listen()

    @rule(name=BROKER)
    def broker_dies(self, name: str) -> None:
        if name in self.tree.cores:
            self.tree.kill(name)
            self.lose(name)

    def lose(self, name: str) -> None:
        """Forget who was connected to a broker that is gone."""
        for client in [client for client in self.clients if client.broker == name]:
            self.clients.remove(client)
            self.forget(client)
        self.workers = [worker for worker in self.workers if worker.broker != name]
        self.held = [held for held in self.held if held.worker.broker != name]
        self.listen()

    @rule(name=BROKER)
    def broker_comes_back(self, name: str) -> None:
        if name not in self.tree.cores:
            self.tree.broker(name, *UPLINKS[name], max_waiting=3)
            self.listen()

    @rule(link=st.sampled_from(LINKS), grace_s=st.sampled_from([0.0, 0.5, 30.0]), undo=st.booleans())
    def parent_sends_away(self, link: tuple[str, str], grace_s: float, undo: bool) -> None:
        child, parent = link
        core = self.tree.cores.get(parent)
        if core is not None and child in core.registry.by_name:
            core._outbox.to_worker(core.registry.by_name[child], Drain(grace_s, undo))
            self.tree._perform(parent, core._outbox.take())
            self.tree.run()
            self.listen()

    @rule(name=BROKER, grace_s=st.sampled_from([0.0, 0.5]))
    def broker_is_stopped(self, name: str, grace_s: float) -> None:
        core = self.tree.cores.get(name)
        if core is not None:
            self.tree._perform(name, core.drain(self.tree.now, grace_s))
            self.tree.run()
            self.tree.passes(1.0)
            assert name not in self.tree.cores, "it has not stopped"
            self.lose(name)

    # What clients do.

    @rule(index=INDEX, prior=st.integers(0, 2), queue_s=st.sampled_from([None, 0.2]), late=st.booleans())
    @precondition(lambda self: self.clients)
    def client_asks(self, index: int, prior: int, queue_s: float | None, late: bool) -> None:
        client = self.clients[index % len(self.clients)]
        self.numbers += 1
        self.ask(client, self.numbers, 1, prior_tokens=prior, queue_s=queue_s, deadline_s=0.5 if late else None)

    @rule(index=INDEX, hedge=st.booleans(), avoid=st.sampled_from(["mid-1", "mid-1/leaf", "mid-1/leaf/w1", "w1"]))
    @precondition(lambda self: self.asked)
    def client_asks_again(self, index: int, hedge: bool, avoid: str) -> None:
        key = list(self.asked)[index % len(self.asked)]
        [client] = [client for client in self.clients if id(client) == key[0]]
        former = self.asked[key]
        if not hedge:
            self.superseded.update((*key, attempt) for attempt in range(1, former + 1))
        self.ask(client, key[1], former + 1, hedge=hedge, avoid=(avoid,))

    @rule(index=INDEX)
    @precondition(lambda self: self.asked)
    def client_cancels(self, index: int) -> None:
        owner, number = list(self.asked)[index % len(self.asked)]
        [client] = [client for client in self.clients if id(client) == owner]
        client.cancels(number, self.asked[owner, number])
        self.listen()

    @rule(index=INDEX, limit=st.integers(0, 50))
    @precondition(lambda self: self.asked)
    def client_grants(self, index: int, limit: int) -> None:
        owner, number = list(self.asked)[index % len(self.asked)]
        [client] = [client for client in self.clients if id(client) == owner]
        client.grants(limit, number, self.asked[owner, number])
        self.listen()

    # What workers do.

    @rule(index=INDEX)
    @precondition(lambda self: self.held)
    def worker_brings(self, index: int) -> None:
        held = self.held[index % len(self.held)]
        envelope = held.request.envelope
        number = int.from_bytes(held.request.id, "big")
        held.worker.brings(7, to=route_of(held.request), number=number, attempt=envelope.attempt, offset=held.sent)
        held.sent += 1
        self.listen()

    @rule(index=INDEX)
    @precondition(lambda self: self.held)
    def worker_parks(self, index: int) -> None:
        held = self.held[index % len(self.held)]
        held.worker.says(Parked(held.request.id, held.request.envelope.attempt))
        self.listen()

    @rule(index=INDEX, fails=st.booleans())
    @precondition(lambda self: self.held)
    def worker_ends(self, index: int, fails: bool) -> None:
        self.end(self.held.pop(index % len(self.held)), fails=fails)
        self.listen()

    @rule(seconds=st.sampled_from([0.01, 0.1, 1.0, 3.0]))
    def let_pass(self, seconds: float) -> None:
        self.tree.passes(seconds)
        self.listen()

    # The rest.

    def ask(self, client: ClientPeer, number: int, attempt: int, **fields: Any) -> None:
        self.asked[id(client), number] = attempt
        client.asks(number, attempt, **fields)
        self.listen()

    def end(self, held: Held, *, fails: bool) -> None:
        attempt, number = held.request.envelope.attempt, int.from_bytes(held.request.id, "big")
        if held.cancelled:
            held.worker.finishes(number, attempt, FinishReason.CANCELLED)
        elif fails:
            held.worker.fails("busy", number, attempt)
        else:
            held.worker.finishes(number, attempt)

    def forget(self, client: ClientPeer) -> None:
        self.asked = {key: attempt for key, attempt in self.asked.items() if key[0] != id(client)}

    def listen(self) -> None:
        """Take what everybody was told."""
        for worker in self.workers:
            for message in worker.heard:
                if isinstance(message, Request):
                    self.held.append(Held(worker, message))
                elif isinstance(message, Cancel):
                    for held in self.held:
                        same = (held.request.id, held.request.envelope.attempt) == (message.id, message.attempt)
                        held.cancelled |= same and held.worker is worker
            worker.heard.clear()
        for client in self.clients:
            for message in client.heard:
                if isinstance(message, (Finish, Error)):
                    self.answers[id(client), int.from_bytes(message.id, "big"), message.attempt] += 1
                elif isinstance(message, Chunks):
                    mine = {request_id(number) for owner, number in self.asked if owner == id(client)}
                    assert {chunk.request_id for chunk in message.chunks} <= mine, "tokens of somebody else"
            client.heard.clear()

    @invariant()
    def no_answer_comes_twice(self) -> None:
        assert all(count == 1 for count in self.answers.values())

    @invariant()
    def workers_hold_what_the_brokers_believe(self) -> None:
        for worker in self.workers:
            session = self.tree.cores[worker.broker].registry.by_name.get(worker.name)
            mine = {held.request.id for held in self.held if held.worker is worker}
            assert session is not None
            assert {record.id for record in session.in_flight.values()} == mine

    def teardown(self) -> None:
        for name, parents in UPLINKS.items():
            if name not in self.tree.cores:
                self.tree.broker(name, *parents)
        # Whoever waits gets a worker, or an answer; whoever runs, ends.
        for broker in BROKERS:
            self.new_worker(broker, 1)
        self.listen()
        for _ in range(100):
            while self.held:
                self.end(self.held.pop(), fails=False)
                self.listen()
            self.let_pass(3.0)
            if not self.held:
                break
        self.no_answer_comes_twice()
        for (owner, number), latest in self.asked.items():
            for attempt in range(1, latest + 1):
                key = (owner, number, attempt)
                assert self.answers[key] or key in self.superseded, "a request without an answer"
        for name, core in self.tree.cores.items():
            assert not core.exchange.records, f"{name} holds requests"
            assert not core.uplink.guests(), f"{name} has guests"
            for worker in core.registry:
                assert not worker.in_flight, f"{name} believes {worker.name} busy"
                assert worker.load == 0, f"{name} believes that others have something at {worker.name}"
        for core in self.tree.cores.values():
            assert not core.counters.malformed


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=30, stateful_step_count=50, deadline=None)
