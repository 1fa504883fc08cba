"""Queries that take time, in any order of events: each is answered once and in time, unless its asker has gone."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.broker.stage import ClientPeer, Said, Stage, WorkerPeer, request_id
from tokenmq.broker.errands import MAX_OF_CLIENT
from tokenmq.broker.tree import ORDER_S
from tokenmq.protocol.messages import Error, Query, Reply

NAMES = ("west", "east", "south")
QUESTIONS = (
    ("workers", {"tree": True}),
    ("status", {"tree": True}),
    ("route", {"model": "m"}),
    ("drain", {"worker": "west/gpu", "stay": True}),
    ("set_speed", {"worker": "east/gpu"}),
    ("refresh", {}),
)
RESULTS = (None, [], [{"name": "gpu", "depth": 0}], {"worker": "gpu"}, {"tree": {"brokers": []}})


class Errands(RuleBasedStateMachine):
    """Two clients ask a broker that has brokers below it, which answer, or do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(heartbeat_s=60.0, expiry_s=600.0)
        self.made = 0
        self.clients: dict[str, ClientPeer] = {}
        self.brokers: dict[str, WorkerPeer] = {}
        #: When each question was asked, by client; those that have no answer yet.
        self.open: dict[str, dict[bytes, float]] = {"ann": {}, "bob": {}}
        #: What the brokers were asked, in their present sessions, and have not answered.
        self.asked: dict[str, list[bytes]] = {name: [] for name in NAMES}

    def hears(self, said: list[Said]) -> None:
        for to, message in said:
            if isinstance(message, Query):
                self.asked[to].append(message.id)
            elif isinstance(message, (Reply, Error)):
                del self.open[to][message.id]  # fails where it was answered already, or was not asked

    @rule(name=st.sampled_from(["ann", "bob"]))
    def a_client_comes_or_goes(self, name: str) -> None:
        if name in self.clients:
            self.open[name].clear()
            self.hears(self.clients.pop(name).vanishes())
        else:
            self.clients[name] = self.stage.client(name)

    @rule(name=st.sampled_from(NAMES))
    def a_broker_comes_or_goes(self, name: str) -> None:
        self.asked[name].clear()
        if name in self.brokers:
            self.hears(self.brokers.pop(name).vanishes())
        else:
            self.brokers[name] = self.stage.worker(name, brokers=(name,))

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), question=st.sampled_from(QUESTIONS))
    def a_client_asks(self, data: st.DataObject, question: tuple[str, dict[str, object]]) -> None:
        name = data.draw(st.sampled_from(sorted(self.clients)))
        self.made += 1
        self.open[name][request_id(self.made)] = self.stage.now
        self.hears(self.clients[name].says(Query(request_id(self.made), *question)))

    @precondition(lambda self: any(self.asked.values()))
    @rule(data=st.data(), result=st.sampled_from(RESULTS), fails=st.booleans(), again=st.booleans())
    def a_broker_answers(self, data: st.DataObject, result: object, fails: bool, again: bool) -> None:
        name = data.draw(st.sampled_from(sorted(name for name, ids in self.asked.items() if ids)))
        id = data.draw(st.sampled_from(self.asked[name]))
        if not again:
            self.asked[name].remove(id)  # else the same answer may come once more
        answer = Error(id, 0, "busy", "not now") if fails else Reply(id, result)
        self.hears(self.brokers[name].says(answer))

    @rule(seconds=st.sampled_from([0.0, 0.05, 0.3, 1.0, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.hears(self.stage.passes(seconds))

    @invariant()
    def all_is_well(self) -> None:
        self.stage.core.validate()
        assert self.brokers.keys() == self.stage.core.registry.by_name.keys(), "an answer has cost a session"
        for asked in self.open.values():
            assert all(self.stage.now - at <= ORDER_S for at in asked.values()), "an answer is late"
            assert len(asked) <= MAX_OF_CLIENT

    def teardown(self) -> None:
        self.hears(self.stage.passes(ORDER_S))
        assert not any(self.open.values()), "a question without an answer"


TestErrands = Errands.TestCase
TestErrands.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
