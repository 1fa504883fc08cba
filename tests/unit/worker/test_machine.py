"""Random brokers, engine, credit, cancels and session losses against a model of what each request must see."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tokenmq.protocol.links import Connected, Lost, Open, Received, Send, Shut
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunks,
    Credit,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Heartbeat,
    ModelInfo,
    Parked,
    Ready,
    Request,
    WorkerState,
)
from tokenmq.protocol.messages import Drain as DrainMessage
from tokenmq.protocol.payload import Generation, Prior, pack_generation
from tokenmq.worker.core import WorkerCore
from tokenmq.worker.engines.base import Done, EngineStats, Failed, Output, Tokens
from tokenmq.worker.events import (
    CancelJob,
    Changed,
    Drain,
    EngineFailed,
    EngineLoaded,
    EngineOutputs,
    EngineProgress,
    Resize,
    Stop,
    Submit,
)
from tokenmq.worker.settings import WorkerSettings

BROKERS = ("tcp://a:1", "tcp://b:1")
READER_TIMEOUT_S = 2.0
Key = tuple[str, bytes, int]


class Reader:
    """A request as the broker and the client see it."""

    def __init__(self, credit: int, prior: int) -> None:
        self.credit = credit
        self.prior = prior
        self.waits_since: float | None = None
        self.tokens: list[int] = []
        self.text = ""
        self.end: Finish | Error | None = None
        self.ticket: int | None = None
        self.cancelled = False
        self.parked = False


class Made:
    """A job as the engine sees it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.over = False


class WorkerMachine(RuleBasedStateMachine):
    @initialize(at_work=st.sampled_from([True, True, True, False]))
    def begin(self, at_work: bool) -> None:
        self.now = 0.0
        values: Any = {"models": ("m",), "name": "w", "slots": 2, "reader_timeout_s": READER_TIMEOUT_S}
        self.core = WorkerCore(WorkerSettings(brokers=BROKERS, **values), "fake", 1)
        self.phase = dict.fromkeys(BROKERS, "none")
        self.sent = dict.fromkeys(BROKERS, 0)
        self.received = dict.fromkeys(BROKERS, 0)
        self.readers: dict[Key, Reader] = {}
        self.jobs: dict[int, Made] = {}
        self.numbers = 0
        self.cancels: list[int] = []
        self.loaded = False
        self.slots = self.engine_slots = 2
        #: None, or who asked for the drain: "broker" or "own".
        self.drained: str | None = None
        self.stopped: Stop | None = None
        self.pending: Key | None = None
        self.perform(self.core.start(self.now))
        if at_work:
            self.load()
            for broker in BROKERS * 2:
                self.connect(broker)

    # --- what the worker orders -------------------------------------------------------------------------------------

    def perform(self, actions: Any) -> None:
        for action in actions:
            assert isinstance(action, Log) or self.stopped is None, "nothing follows Stop"
            if isinstance(action, Open):
                assert self.phase[action.broker] == "none"
                self.phase[action.broker] = "open"
                self.sent[action.broker] = self.received[action.broker] = 0
            elif isinstance(action, Shut):
                assert self.phase[action.broker] != "none"
                self.phase[action.broker] = "none"
                self.readers = {key: value for key, value in self.readers.items() if key[0] != action.broker}
            elif isinstance(action, Send):
                self.take(action.broker, action.message)
            elif isinstance(action, Submit):
                assert self.pending is not None
                self.readers[self.pending].ticket = action.job.ticket
                self.jobs[action.job.ticket] = Made()
            elif isinstance(action, CancelJob):
                self.cancels.append(action.ticket)
            elif isinstance(action, Resize):
                self.engine_slots = action.slots
            elif isinstance(action, Stop):
                self.stopped = action
        self.core.validate()
        for reader in self.readers.values():
            if self.waits(reader) and reader.waits_since is None:
                reader.waits_since = self.now

    def waits(self, reader: Reader) -> bool:
        """Whether tokens of this stream are kept at the worker."""
        if reader.ticket is None or reader.end is not None or reader.cancelled:
            return False
        return len(self.jobs[reader.ticket].tokens) > len(reader.tokens)

    def take(self, broker: str, message: Any) -> None:
        assert self.phase[broker] in ("connected", "joined")
        if isinstance(message, Heartbeat):
            assert message.sent == self.received[broker]
            assert message.load is not None
            mine = [(key, value) for key, value in self.readers.items() if key[0] == broker]
            held = [key for key, value in mine if value.end is None and not value.parked]
            assert message.load.held == len(held) or self.pending in held
        self.received[broker] += 1
        if isinstance(message, Ready):
            assert message.slots == self.slots
            assert self.drained is None, "READY says that it does not drain"
            self.phase[broker] = "joined" if self.phase[broker] == "connected" else self.phase[broker]
        elif isinstance(message, Chunks):
            for chunk in message.chunks:
                assert message.route == chunk.request_id
                reader = self.readers[broker, chunk.request_id, chunk.attempt]
                assert reader.end is None
                assert not reader.cancelled
                assert chunk.offset == reader.prior + len(reader.tokens)
                reader.tokens += chunk.token_ids
                reader.text += chunk.text
                reader.waits_since = None
                assert not chunk.token_ids or chunk.offset + len(chunk.token_ids) <= reader.credit
                assert reader.ticket is not None
                made = self.jobs[reader.ticket]
                assert reader.tokens == made.tokens[: len(reader.tokens)]
                assert made.text.startswith(reader.text)
        elif isinstance(message, Parked):
            reader = self.readers[broker, message.id, message.attempt]
            assert reader.end is None
            assert not reader.parked, "parked once"
            assert reader.ticket is not None
            made = self.jobs[reader.ticket]
            assert made.over
            has = reader.prior + len(reader.tokens)
            assert has == max(reader.prior, reader.credit), "it waits for credit, and for nothing else"
            reader.parked = True
        elif isinstance(message, (Finish, Error)):
            reader = self.readers[broker, message.id, message.attempt]
            assert reader.end is None, "one end for each request"
            if isinstance(message, Error) and message.code == "reader_timeout":
                assert reader.waits_since is not None
                assert self.now >= reader.waits_since + READER_TIMEOUT_S
                assert reader.ticket is not None
                assert self.jobs[reader.ticket].over or reader.ticket in self.cancels
            reader.end = message
            if isinstance(message, Finish) and message.reason is not FinishReason.CANCELLED:
                assert reader.ticket is not None
                made = self.jobs[reader.ticket]
                assert (reader.tokens, reader.text) == (made.tokens, made.text)

    def tell(self, event: Any) -> None:
        if self.stopped is None:
            self.perform(self.core.handle(event, self.now))

    def hear(self, broker: str, message: Any) -> None:
        self.sent[broker] += 1
        self.tell(Received(broker, message))

    # --- the world --------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds
        for broker in BROKERS:
            if self.phase[broker] == "joined" and self.accepted(broker):
                self.hear(broker, Heartbeat(self.sent[broker]))
        if self.stopped is None:
            self.perform(self.core.tick(self.now))
            waits = [reader.waits_since for reader in self.readers.values() if self.waits(reader)]
            assert all(since is not None and self.now < since + READER_TIMEOUT_S for since in waits)

    def accepted(self, broker: str) -> bool:
        return self.sent[broker] > 0

    @rule(broker=st.sampled_from(BROKERS))
    def connect(self, broker: str) -> None:
        if self.phase[broker] == "open":
            self.phase[broker] = "connected"
            self.tell(Connected(broker))
        if self.phase[broker] == "joined" and not self.accepted(broker):
            self.hear(broker, Accepted("b", "s", 1.0, 5.0))

    @precondition(lambda self: not self.loaded)
    @rule()
    def load(self) -> None:
        self.loaded = True
        self.tell(EngineLoaded((ModelInfo("m", resumes=True),)))

    @rule(
        broker=st.sampled_from(BROKERS),
        credit=st.integers(0, 6),
        model=st.sampled_from(["m", "m", "m", "other"]),
        prior=st.sampled_from([0, 0, 1, 4]),
        again=st.booleans(),
    )
    def submit(self, broker: str, credit: int, model: str, prior: int, again: bool) -> None:
        if self.phase[broker] != "joined" or not self.accepted(broker) or self.stopped is not None:
            return
        mine = [key for key in self.readers if key[0] == broker]
        if again and mine:  # the next attempt at the newest request, whatever the last one does
            key = (broker, mine[-1][1], mine[-1][2] + 1)
        else:
            self.numbers += 1
            key = (broker, self.numbers.to_bytes(16, "big"), 1)
        self.readers[key] = Reader(credit, prior)
        self.pending = key
        envelope = Envelope(model, key[2], credit, route=key[1], prior_tokens=prior)
        generation = Generation(prompt="x", prior=Prior((7,) * prior) if prior else None)
        self.hear(broker, Request(key[1], envelope, pack_generation(generation)))
        self.pending = None
        reader = self.readers[key]
        assert (reader.end is None) == (reader.ticket is not None)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def grant(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.readers)))
        limit = self.readers[key].credit + data.draw(st.integers(-2, 5))
        self.readers[key].credit = max(self.readers[key].credit, limit)
        self.hear(key[0], Credit(key[1], key[2], max(0, limit)))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.readers)))
        if self.readers[key].end is None:
            self.readers[key].cancelled = True
        self.hear(key[0], Cancel(key[1], key[2]))

    def living(self) -> list[int]:
        return [ticket for ticket, made in self.jobs.items() if not made.over]

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def step(self, data: Any) -> None:
        outputs: list[Output] = []
        for ticket in self.living():
            made = self.jobs[ticket]
            for _ in range(data.draw(st.integers(0, 2))):
                ids = tuple(len(made.tokens) + 10 * n for n in range(data.draw(st.integers(0, 3))))
                text = data.draw(st.sampled_from(["", "a", "bc "]))
                made.tokens += ids
                made.text += text
                outputs.append(Tokens(ticket, ids, text))
            end = data.draw(st.sampled_from(["", "", "", "done", "failed"]))
            made.over = bool(end)
            if end == "done":
                outputs.append(Done(ticket, FinishReason.STOP, 1, len(made.tokens)))
            elif end == "failed":
                outputs.append(Failed(ticket, "out_of_memory", "full"))
        self.tell(EngineOutputs(outputs, EngineStats(running=len(self.living()))))

    @rule()
    def engine_cancels(self) -> None:
        cancels, self.cancels = self.cancels, []
        for ticket in cancels:
            made = self.jobs[ticket]
            if not made.over:
                made.over = True
                self.tell(EngineOutputs([Done(ticket, FinishReason.CANCELLED, 1, len(made.tokens))]))

    @rule(stuck=st.booleans())
    def progress(self, stuck: bool) -> None:
        self.tell(EngineProgress(1, self.now - 40.0 if stuck else None))

    @precondition(lambda self: self.living())
    @rule(data=st.data())
    def engine_fails(self, data: Any) -> None:
        lost = data.draw(st.sets(st.sampled_from(self.living())))
        for ticket in lost:
            self.jobs[ticket].over = True
        self.tell(EngineFailed("boom", frozenset(lost)))
        for reader in self.readers.values():
            assert reader.ticket not in lost or reader.end is not None

    @rule(broker=st.sampled_from(BROKERS), chance=st.integers(0, 9))
    def lose(self, broker: str, chance: int) -> None:
        if chance == 7:
            self.tell(Lost(broker))
            assert self.phase[broker] == "none"

    @rule(grace=st.sampled_from([0.0, 5.0]), chance=st.integers(0, 29), broker=st.sampled_from(BROKERS))
    def drain(self, grace: float, chance: int, broker: str) -> None:
        if chance == 7:
            self.drained = "own"
            self.tell(Drain(grace))
        elif (chance == 8 or chance >= 20) and self.phase[broker] == "joined" and self.accepted(broker):
            undo = chance >= 20
            if self.drained != "own":
                self.drained = None if undo else "broker"
            self.hear(broker, DrainMessage(grace, undo))
            assert (self.core.state is WorkerState.DRAINING) == (self.drained is not None)

    @rule(slots=st.integers(1, 3))
    def change(self, slots: int) -> None:
        if self.stopped is None:
            self.slots = slots
            self.tell(Changed(slots=slots))
            assert self.engine_slots == slots

    def teardown(self) -> None:
        """Let everything end: full credit, the engine's last words; then no request is without its answer."""
        if not hasattr(self, "core"):
            return
        self.engine_cancels()
        for key, reader in list(self.readers.items()):
            reader.credit = 10**6
            self.hear(key[0], Credit(key[1], key[2], reader.credit))
        ends = [Done(ticket, FinishReason.STOP, 1, 0) for ticket in self.living()]
        self.tell(EngineOutputs(ends))
        assert all(reader.end is not None for reader in self.readers.values())


TestWorkerMachine = WorkerMachine.TestCase
TestWorkerMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
