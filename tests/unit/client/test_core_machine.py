"""A client against a broker that does anything: whatever comes, each request ends exactly once."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenmq.client.core import ClientCore
from tokenmq.client.events import (
    Action,
    Answered,
    Ask,
    CancelStream,
    Close,
    CloseSocket,
    Connected,
    Deliver,
    Ended,
    Ending,
    Event,
    Grant,
    Lost,
    Malformed,
    Open,
    Received,
    Send,
    Submit,
)
from tokenmq.client.session import Phase
from tokenmq.client.settings import Settings
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import (
    NO_ID,
    Cancel,
    Chunk,
    Chunks,
    Disconnect,
    DisconnectCode,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Message,
    Reply,
    Request,
    Timings,
    Usage,
    Welcome,
)

WINDOW = 6
pick = st.integers(0, 10_000)


class Machine(RuleBasedStateMachine):
    """The model: what the application has been given, and what the present socket has carried."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.core = ClientCore(Settings(endpoints=("tcp://a:1", "tcp://b:2"), name="machine"), random=lambda: 0.5)
        self.made = 0
        self.ends: Counter[bytes] = Counter()
        self.open_streams: dict[bytes, ReceiveWindow] = {}
        self.open_queries: set[bytes] = set()
        self.delivered: dict[bytes, list[int]] = {}
        self.has_socket = False
        self.from_client = 0
        self.to_client = 0
        self.requested: set[bytes] = set()

    # The world around the core

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Open):
                assert not self.has_socket
                self.has_socket, self.from_client, self.to_client = True, 0, 0
                self.requested.clear()
            elif isinstance(action, CloseSocket):
                assert self.has_socket
                self.has_socket = False
            elif isinstance(action, Send):
                self.check_send(action.message)
            elif isinstance(action, Deliver):
                assert self.ends[action.id] == 0
                self.delivered[action.id].extend(action.chunk.token_ids)
            elif isinstance(action, Ended):
                self.ends[action.id] += 1
                self.check_end(action)
                self.open_streams.pop(action.id)
            elif isinstance(action, Answered):
                self.ends[action.id] += 1
                self.open_queries.remove(action.id)

    def check_send(self, message: Message) -> None:
        assert self.has_socket
        if isinstance(message, Heartbeat):
            assert message.sent == self.from_client
        elif isinstance(message, Request):
            assert message.id not in self.requested
            self.requested.add(message.id)
        elif isinstance(message, Cancel):
            assert message.id in self.requested
        self.from_client += 1

    def check_end(self, end: Ended) -> None:
        outcome = end.outcome
        if isinstance(outcome, Ending) and outcome.usage is not None and outcome.reason is FinishReason.STOP:
            assert outcome.usage.completion_tokens <= len(self.delivered[end.id])

    def event(self, event: Event) -> None:
        self.do(self.core.handle(event, self.now))

    def broker_says(self, message: Message, *, lost: bool = False) -> None:
        if not self.has_socket or self.core.session.phase is Phase.CONNECTING:
            return
        self.to_client += 1
        if not lost:
            self.event(Received(message))

    def some_id(self, number: int, open_ones: bool) -> bytes:
        known = sorted(self.open_streams) if open_ones else []
        return known[number % len(known)] if known else number.to_bytes(16, "big")

    # What the application does

    @rule(deadline_s=st.one_of(st.none(), st.floats(0.0, 10.0)))
    def submit(self, deadline_s: float | None) -> None:
        self.made += 1
        request_id = self.made.to_bytes(16, "big")
        window = self.open_streams[request_id] = ReceiveWindow(WINDOW)
        self.delivered[request_id] = []
        self.event(Submit(request_id, "m", b"", window, (), deadline_s))

    @rule()
    def ask(self) -> None:
        self.made += 1
        query_id = self.made.to_bytes(16, "big")
        self.open_queries.add(query_id)
        self.event(Ask(query_id, "models"))

    @rule(number=pick, known=st.booleans())
    def cancel(self, number: int, known: bool) -> None:
        request_id = self.some_id(number, known)
        self.event(CancelStream(request_id))
        assert request_id not in self.open_streams

    @rule(number=pick)
    def consume(self, number: int) -> None:
        window = self.open_streams.get(request_id := self.some_id(number, True))
        if window is not None and window.received > window.consumed:
            limit = window.consume(1)
            if limit is not None:
                self.event(Grant(request_id, limit))

    @precondition(lambda self: self.made > 15)
    @rule()
    def close(self) -> None:
        self.event(Close())
        assert not self.open_streams
        assert not self.open_queries

    # What the network does

    @rule()
    def connect(self) -> None:
        if self.has_socket:
            self.event(Connected())

    @rule()
    def disconnect(self) -> None:
        if self.has_socket:
            self.event(Lost("disconnected"))

    @rule(seconds=st.floats(0.0, 3.0))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.core.tick(self.now))

    @rule()
    def sleep(self) -> None:
        deadline = self.core.next_deadline()
        if deadline is not None:
            self.now = max(self.now, deadline)
            self.do(self.core.tick(self.now))
            later = self.core.next_deadline()
            assert later is None or later > self.now, "a deadline that its tick does not settle"

    @rule()
    def up(self) -> None:
        """The shortest way to an open session."""
        self.now += 3.0
        self.do(self.core.tick(self.now))
        self.connect()
        if self.core.session.phase is Phase.GREETING:
            self.welcome()

    # What the broker does

    @rule()
    def welcome(self) -> None:
        self.broker_says(Welcome("b", "s", 1.0, 5.0))

    @rule(known=st.booleans())
    def heartbeat(self, known: bool) -> None:
        self.broker_says(Heartbeat(self.to_client + (not known)))

    @rule(number=pick, tokens=st.integers(0, 3), lost=st.sampled_from([False, False, False, True]))
    def chunk(self, number: int, tokens: int, lost: bool) -> None:
        """The next chunk of a stream, as an honest worker sends it; sometimes it is lost."""
        request_id = self.some_id(number, True)
        window = self.open_streams.get(request_id)
        offset = 0 if window is None else window.received
        if window is not None:
            tokens = min(tokens, window.limit - offset)
        chunk = Chunk(request_id, 1, 0, offset, tuple(range(offset, offset + tokens)), "x")
        self.broker_says(Chunks(NO_ID, (chunk,)), lost=lost)

    @rule(number=pick, offset=st.integers(0, 12), tokens=st.integers(0, 8), attempt=st.integers(1, 2))
    def wild_chunk(self, number: int, offset: int, tokens: int, attempt: int) -> None:
        request_id = self.some_id(number, True)
        tokens_ids = tuple(range(offset, offset + tokens))
        self.broker_says(Chunks(NO_ID, (Chunk(request_id, attempt, 0, offset, tokens_ids, "x"),)))

    @rule(number=pick, known=st.booleans(), attempt=st.integers(1, 2), tokens=st.integers(0, 4))
    def finish(self, number: int, known: bool, attempt: int, tokens: int) -> None:
        request_id = self.some_id(number, known)
        self.broker_says(Finish(request_id, attempt, FinishReason.STOP, Usage(1, tokens), Timings(), "w"))

    @rule(number=pick, known=st.booleans(), attempt=st.integers(0, 2))
    def error(self, number: int, known: bool, attempt: int) -> None:
        self.broker_says(Error(self.some_id(number, known), attempt, "busy", "full", True))

    @rule(number=st.integers(1, 20))
    def reply(self, number: int) -> None:
        self.broker_says(Reply(number.to_bytes(16, "big"), []))

    @rule(message=st.sampled_from([Goodbye(), Disconnect(DisconnectCode.UNKNOWN_PEER, "")]))
    def farewell(self, message: Message) -> None:
        self.broker_says(message)

    @rule()
    def garbage(self) -> None:
        if self.has_socket:
            self.event(Malformed(ProtocolError("garbage")))

    # What always holds

    @invariant()
    def valid(self) -> None:
        self.core.validate()
        assert self.core.session.has_socket == self.has_socket
        for request_id in (number.to_bytes(16, "big") for number in range(1, self.made + 1)):
            is_open = request_id in self.open_streams or request_id in self.open_queries
            assert self.ends[request_id] == (0 if is_open else 1)

    @invariant()
    def tokens_come_in_order(self) -> None:
        for tokens in self.delivered.values():
            assert tokens == list(range(len(tokens)))

    def teardown(self) -> None:
        """However it went: once the broker is silent for good, everything ends by itself."""
        for _ in range(200):
            if not (self.open_streams or self.open_queries):
                break
            self.sleep()
            if self.core.session.open:
                self.event(Lost("the end"))
        assert not self.open_streams
        assert not self.open_queries
        self.event(Close())
        self.valid()


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestClientCore = Machine.TestCase
