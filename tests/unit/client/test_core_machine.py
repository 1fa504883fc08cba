"""A client against two brokers that do anything: each request ends exactly once, with its tokens in order."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.client.core import ClientCore
from tokenmq.client.events import (
    Action,
    Answered,
    Ask,
    Attempt,
    Attempted,
    CancelStream,
    Close,
    CloseSocket,
    Connected,
    Deliver,
    Ended,
    Ending,
    Event,
    Garbled,
    Grant,
    Lost,
    Malformed,
    Open,
    Received,
    Refused,
    Send,
    Submit,
)
from tokenmq.client.exchange import DEADLINE_SLACK_S
from tokenmq.client.recovery import MAX_PAUSE_S
from tokenmq.client.sessions import GATHER_S
from tokenmq.client.settings import Settings
from tokenmq.protocol import limits
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    NO_ID,
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Draining,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Query,
    Reply,
    Request,
    Started,
    Timings,
    Usage,
    Welcome,
)
from tokenmq.protocol.payload import Generation, Prior, pack_generation, unpack_generation
from tokenmq.protocol.refusal import Refusal

ONE, TWO = "tcp://a:1", "tcp://b:2"
PAYLOAD = pack_generation(Generation(prompt="x"))
WINDOW = 6
EXPIRY_S = 5.0
RETRY_AFTER_S = 1.0
SETTINGS = Settings(
    endpoints=(ONE, TWO),
    name="machine",
    connect_timeout_s=4.0,
    query_timeout_s=3.0,
    max_attempts=5,
    recovery_timeout_s=4.0,
    first_token_timeout_s=4.0,
    inter_token_timeout_s=2.0,
)

pick = st.integers(0, 10_000)
brokers = st.sampled_from([ONE, TWO])
workers = st.sampled_from(["v", "w"])


WELCOME = Welcome("b", "s", 1.0, EXPIRY_S)
GROUPS = ["", "g", "h"]
FAREWELLS = [
    Goodbye(),
    Disconnect(DisconnectCode.UNKNOWN_PEER, ""),
    Draining(),
    WELCOME,
    Disconnect(DisconnectCode.FORBIDDEN, ""),
    Disconnect(DisconnectCode.RATE_LIMITED, ""),
    Lost("", "disconnected"),
    Malformed("", ProtocolError("garbage")),
    *(Refused("", refusal) for refusal in Refusal),
]


@dataclass
class Socket:
    """One broker's side of the present connection."""

    from_client: int = 0
    to_client: int = 0
    welcomed: bool = False
    draining: bool = False


@dataclass
class Reader:
    """What the application has of one stream, and what has been sent for it."""

    window: ReceiveWindow
    resume: bool
    hedge_after_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    text_chars: int = 0
    #: How many attempts were made, the broker that has the open ones ("" where none is), and the credit of each.
    last: int = 0
    at: str = ""
    open: dict[int, int] = field(default_factory=dict)
    workers: set[str] = field(default_factory=set)

    def some_attempt(self, number: int) -> int:
        """Return the number of one of the open attempts."""
        return sorted(self.open)[number % len(self.open)]


#: For what workers do: it takes a client that is not closed.
living = precondition(lambda self: not self.core.closed)


class Machine(RuleBasedStateMachine):
    """The model: what the application has been given, and what the present sockets have carried."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.core = ClientCore(SETTINGS, random=random.Random(7).random)
        self.made = 0
        self.ends: Counter[bytes] = Counter()
        self.sockets: dict[str, Socket] = {}
        self.groups = {ONE: "", TWO: ""}
        #: Which broker of a group requests have gone to while both took some; and when the first group answered.
        self.home = ""
        self.gathers_from = math.inf
        self.readers: dict[bytes, Reader] = {}
        self.over: list[Reader] = []
        self.questions: dict[bytes, str] = {}
        #: The broker whose message is being dealt with.
        self.speaker = ""

    @initialize(there=st.lists(brokers, unique=True), first=st.sampled_from(GROUPS), second=st.sampled_from(GROUPS))
    def begin(self, there: list[str], first: str, second: str) -> None:
        """Most stories begin with a broker that is there."""
        self.groups = {ONE: first, TWO: second}
        for at in there:
            self.up(at)

    # The world around the core

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Open):
                assert action.endpoint not in self.sockets
                self.sockets[action.endpoint] = Socket()
            elif isinstance(action, CloseSocket):
                del self.sockets[action.endpoint]
            elif isinstance(action, Send):
                self.check_send(action.endpoint, action.message)
                self.sockets[action.endpoint].from_client += 1
            elif isinstance(action, Deliver):
                self.check_delivery(action)
            elif isinstance(action, Attempted):
                self.check_attempts(self.readers[action.id], action.attempts)
            elif isinstance(action, Ended):
                self.ends[action.id] += 1
                self.check_end(action)
                self.over.append(self.readers.pop(action.id))
            elif isinstance(action, Answered):
                self.ends[action.id] += 1
                del self.questions[action.id]

    def check_send(self, endpoint: str, message: Message) -> None:
        socket = self.sockets[endpoint]
        assert isinstance(message, Goodbye) or socket.welcomed != isinstance(message, Hello)
        if isinstance(message, Heartbeat):
            assert message.sent == socket.from_client
        elif isinstance(message, Request):
            self.check_request(endpoint, message)
        elif isinstance(message, Credit):
            reader = self.readers[message.id]
            assert endpoint == reader.at
            assert message.limit > reader.open[message.attempt]
            reader.open[message.attempt] = message.limit
        elif isinstance(message, Cancel):
            reader = self.readers[message.id]
            assert endpoint == reader.at
            del reader.open[message.attempt]
        elif isinstance(message, Query):
            assert not self.questions[message.id]
            self.questions[message.id] = endpoint

    def check_request(self, endpoint: str, message: Request) -> None:
        reader, envelope = self.readers[message.id], message.envelope
        if envelope.hedge:
            assert reader.hedge_after_s is not None
            assert endpoint == reader.at
            assert len(reader.open) == 1
        else:
            # The request that is looked at may have been the last one for now.
            takers = [name for name in (ONE, TWO) if self.takes_requests(name) or name == endpoint]
            if len({self.groups[name] for name in takers}) == 1 < len(takers) and self.groups[ONE]:
                assert endpoint == (self.home or endpoint), "one client, two homes"
                self.home = endpoint
            else:
                assert endpoint == takers[0]
            assert not reader.at, "two attempts at once"
            assert reader.resume or envelope.attempt == 1
        assert envelope.attempt == reader.last + 1
        reader.last, reader.at = envelope.attempt, endpoint
        reader.open[envelope.attempt] = envelope.credit
        assert envelope.credit == reader.window.limit
        assert envelope.prior_tokens == len(reader.tokens)
        prior = unpack_generation(message.payload).prior
        assert prior == (Prior(tuple(reader.tokens), reader.text_chars) if reader.tokens else None)
        assert len(envelope.avoid) == len(set(envelope.avoid)) <= limits.MAX_AVOIDED
        assert reader.workers.issuperset(envelope.avoid)

    def check_attempts(self, reader: Reader, attempts: tuple[Attempt, ...]) -> None:
        assert sorted(attempt.number for attempt in attempts) == list(range(1, len(attempts) + 1))
        past = [attempt for attempt in attempts if attempt.error is not None or attempt.cancelled]
        present = attempts[len(past) :]
        assert list(attempts[: len(past)]) == past, "those that have ended come first"
        for attempt in past:
            assert attempt.cancelled == (attempt.error is None)
            reader.open.pop(attempt.number, None)
        if reader.open:
            assert {attempt.number for attempt in present} == set(reader.open)
            assert {attempt.broker for attempt in present} == {reader.at}
        else:
            (following,) = present
            assert reader.resume
            assert following == Attempt(reader.last + 1, "", "", len(reader.tokens))
            assert past[-1].error is not None
            assert past[-1].broker == reader.at
            reader.at = ""

    def is_there(self, endpoint: str) -> bool:
        socket = self.sockets.get(endpoint)
        return socket is not None and socket.welcomed and not socket.draining

    def takes_requests(self, endpoint: str) -> bool:
        return self.is_there(endpoint) and self.core.sessions[endpoint].gate.open

    def check_delivery(self, delivery: Deliver) -> None:
        reader, chunk = self.readers[delivery.id], delivery.chunk
        assert self.speaker == reader.at
        assert set(reader.open) == {chunk.attempt}, "another attempt is open, and was not told to stop"
        assert chunk.offset == len(reader.tokens)
        reader.tokens.extend(chunk.token_ids)
        reader.text_chars += len(chunk.text)

    def check_end(self, end: Ended) -> None:
        reader, outcome = self.readers[end.id], end.outcome
        assert len(end.attempts) in (reader.last, reader.last + 1)
        assert sorted(attempt.number for attempt in end.attempts) == list(range(1, len(end.attempts) + 1))
        assert (end.attempts[-1].error is None) == isinstance(outcome, Ending)
        failed = [attempt for attempt in end.attempts if attempt.error is not None]
        assert all(not attempt.cancelled for attempt in failed)
        open_ones = [attempt for attempt in end.attempts if attempt.error is None and not attempt.cancelled]
        assert len(open_ones) <= (2 if outcome == Ending(FinishReason.CANCELLED) else 1)
        assert sum(bool(attempt.worker) for attempt in failed) <= SETTINGS.max_attempts
        if isinstance(outcome, Ending) and outcome.usage is not None and outcome.reason is FinishReason.STOP:
            assert outcome.usage.completion_tokens <= len(reader.tokens)

    def event(self, event: Event) -> None:
        self.do(self.core.handle(event, self.now))

    def says(self, endpoint: str, message: Message, *, lost: bool = False) -> None:
        """A broker says something, unless it has not even heard of this client; it may be lost on its way."""
        socket = self.sockets.get(endpoint)
        if socket is None or not socket.from_client:
            return
        if isinstance(message, Welcome):
            message = replace(message, group=self.groups[endpoint])
            if not socket.welcomed and message.group:
                self.gathers_from = min(self.gathers_from, self.now)
            socket.welcomed = True
        elif isinstance(message, Draining):
            socket.draining = True
        socket.to_client += 1
        if not lost:
            self.speaker = endpoint
            self.event(Received(endpoint, message))

    def some_id(self, number: int, open_ones: bool = True) -> bytes:
        known = sorted(self.readers) if open_ones else []
        return known[number % len(known)] if known else number.to_bytes(16, "big")

    def running(self, number: int) -> tuple[bytes, Reader]:
        """Return one of the streams that a broker has; where there is none, make one."""
        if not any(reader.at for reader in self.readers.values()):
            self.up(ONE)
            self.submit(None, True, 0.5)
            if self.core.sessions.best() is None:
                self.tick(GATHER_S)  # it waits for the other one of its group
            while not any(reader.at for reader in self.readers.values()):
                self.sleep()  # it waits for what a limit has asked for
        known = sorted(request_id for request_id, reader in self.readers.items() if reader.at)
        request_id = known[number % len(known)]
        return request_id, self.readers[request_id]

    # What the application does

    @rule(
        deadline_s=st.one_of(st.none(), st.floats(0.0, 10.0)),
        resume=st.sampled_from([True, True, True, False]),
        hedge_after_s=st.sampled_from([None, 0.5, 0.5, 8.0]),
    )
    def submit(self, deadline_s: float | None, resume: bool, hedge_after_s: float | None) -> None:
        self.made += 1
        request_id = self.made.to_bytes(16, "big")
        window = ReceiveWindow(WINDOW)
        self.readers[request_id] = Reader(window, resume, hedge_after_s)
        order = Submit(request_id, "m", PAYLOAD, window, (), deadline_s, resume, hedge_after_s=hedge_after_s)
        self.event(order)

    @rule()
    def ask(self) -> None:
        self.made += 1
        query_id = self.made.to_bytes(16, "big")
        self.questions[query_id] = ""
        self.event(Ask(query_id, "models"))

    @rule(number=pick, known=st.sampled_from([False, False, True]))
    def cancel(self, number: int, known: bool) -> None:
        request_id = self.some_id(number, known)
        self.event(CancelStream(request_id))
        assert request_id not in self.readers

    @rule(number=pick, tokens=st.integers(1, WINDOW), told=st.booleans())
    def consume(self, number: int, tokens: int, told: bool) -> None:
        """The application reads; its grant may come to the I/O thread later than the next event, or never."""
        request_id = self.some_id(number)
        if request_id in self.readers:
            window = self.readers[request_id].window
            limit = window.consume(min(tokens, window.received - window.consumed))
            if limit is not None and told:
                self.event(Grant(request_id, limit))

    @precondition(lambda self: self.made > 8)
    @rule()
    def close(self) -> None:
        self.event(Close())
        assert not self.readers
        assert not self.questions
        assert not self.sockets

    # What the network and the clock do

    @rule(at=brokers)
    def connect(self, at: str) -> None:
        if at in self.sockets:
            self.event(Connected(at))

    @rule(seconds=st.floats(0.0, 3.0))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.core.tick(self.now))

    @rule(seconds=st.floats(0.5, 20.0))
    def stopped(self, seconds: float) -> None:
        """The client itself did not run: neither brokers nor workers are given up for it."""
        open_before = [session.endpoint for session in self.core.sessions if session.open]
        due = self.core.next_deadline()
        if due is None or due <= self.now:
            return
        self.now += seconds
        self.core.forgive(seconds)
        self.do(self.core.tick(self.now))
        assert [session.endpoint for session in self.core.sessions if session.open] == open_before

    @rule()
    def sleep(self) -> None:
        deadline = self.core.next_deadline()
        if deadline is not None:
            self.now = max(self.now, deadline)
            self.do(self.core.tick(self.now))
            later = self.core.next_deadline()
            assert later is None or later > self.now, "a deadline that its tick does not settle"

    @rule(at=brokers)
    def up(self, at: str) -> None:
        """The shortest way to an open session that takes requests."""
        if self.core.closed or self.is_there(at):
            return
        if self.core.sessions[at].draining:
            self.says(at, Goodbye())
        while at not in self.sockets:
            self.sleep()
        self.connect(at)
        self.says(at, WELCOME)

    # What the brokers do

    @rule(at=brokers, right=st.sampled_from([True, True, True, False]))
    def heartbeat(self, at: str, right: bool) -> None:
        if at in self.sockets:
            self.says(at, Heartbeat(self.sockets[at].to_client + (not right)))

    @rule(at=brokers, how=st.sampled_from(FAREWELLS))
    def breakdown(self, at: str, how: Message | Lost | Malformed | Refused) -> None:
        """What ends a session, or makes it useless for new requests."""
        if isinstance(how, (Lost, Malformed, Refused)):
            if at in self.sockets:
                self.event(replace(how, endpoint=at))
        else:
            self.says(at, how)

    @rule(at=brokers)
    def garbage(self, at: str) -> None:
        """Chunks that cannot be read: nothing comes of them, but that they are counted."""
        socket = self.sockets.get(at)
        if socket is not None and socket.welcomed:
            socket.to_client += 1
            before = self.core.sessions[at].received
            assert not [
                a for a in self.core.handle(Garbled(at, ProtocolError("?")), self.now) if not isinstance(a, Log)
            ]
            assert self.core.sessions[at].received == before + 1

    @living
    @rule(number=pick, worker=workers)
    def started(self, number: int, worker: str) -> None:
        request_id, reader = self.running(number)
        reader.workers.add(worker)
        self.says(reader.at, Started(request_id, reader.some_attempt(number), worker))

    @living
    @rule(number=pick)
    def late(self, number: int) -> None:
        """A worker says nothing for so long that another one is asked, too, and that one has begun."""
        request_id, reader = self.running(number)
        for attempt in sorted(reader.open):
            reader.workers.add("v")
            self.says(reader.at, Started(request_id, attempt, "v"))
        self.tick(0.6)
        if request_id in self.readers and len(reader.open) > 1:
            reader.workers.add("w")
            self.says(reader.at, Started(request_id, max(reader.open), "w"))

    @living
    @rule(number=pick, tokens=st.integers(0, 3), text=st.text(max_size=2), lost=st.sampled_from([False] * 5 + [True]))
    def chunk(self, number: int, tokens: int, text: str, lost: bool) -> None:
        """The next chunk of a stream, as an honest worker sends it; sometimes it is lost."""
        request_id, reader = self.running(number)
        offset = reader.window.received
        ids = tuple(range(offset, min(offset + tokens, reader.window.limit)))
        attempt = reader.some_attempt(number)
        self.says(reader.at, Chunks(NO_ID, (Chunk(request_id, attempt, 0, offset, ids, text),)), lost=lost)

    @living
    @rule(
        number=pick, elsewhere=st.booleans(), late=st.booleans(), ahead=st.integers(-2, 2), tokens=st.integers(0, 4)
    )
    def wild_chunk(self, number: int, elsewhere: bool, late: bool, ahead: int, tokens: int) -> None:
        """A chunk of an older attempt, of a broker that has not the stream, of other tokens than the next."""
        request_id, reader = self.running(number)
        at = (TWO if reader.at == ONE else ONE) if elsewhere else reader.at
        offset = max(0, reader.window.received + ahead)
        ids = tuple(range(offset, offset + tokens))
        attempt = max(1, reader.some_attempt(number) - late)
        self.says(at, Chunks(NO_ID, (Chunk(request_id, attempt, 0, offset, ids, "x"),)))

    @living
    @rule(number=pick, missing=st.sampled_from([0, 0, 1]))
    def finish(self, number: int, missing: int) -> None:
        request_id, reader = self.running(number)
        usage = Usage(1, len(reader.tokens) + missing)
        attempt = reader.some_attempt(number)
        self.says(reader.at, Finish(request_id, attempt, FinishReason.STOP, usage, Timings(), "w"))

    @living
    @rule(
        number=pick,
        known=st.booleans(),
        after_s=st.sampled_from([None, None, RETRY_AFTER_S]),
        worker=st.sampled_from(["", "v", "w"]),
        code=st.sampled_from(["busy", "rate_limited", "rate_limited"]),
    )
    def error(self, number: int, known: bool, after_s: float | None, worker: str, code: str) -> None:
        request_id, reader = self.running(number)
        reader.workers.add(worker)
        attempt = reader.some_attempt(number) if known else 0
        self.says(reader.at, Error(request_id, attempt, code, "full", True, after_s, worker))

    @rule(number=pick, at=brokers, known=st.booleans(), attempt=st.integers(0, 4), good=st.booleans())
    def wild_end(self, number: int, at: str, known: bool, attempt: int, good: bool) -> None:
        """The end of any stream, told by anybody."""
        request_id = self.some_id(number, known)
        if good:
            self.says(at, Finish(request_id, max(1, attempt), FinishReason.STOP, Usage(1, 2), Timings(), "w"))
        else:
            self.says(at, Error(request_id, attempt, "engine_failed", "it fell over"))

    @rule(number=st.integers(1, 20), at=brokers)
    def reply(self, number: int, at: str) -> None:
        self.says(at, Reply(number.to_bytes(16, "big"), []))

    # What always holds

    @invariant()
    def valid(self) -> None:
        self.core.validate()
        for session in self.core.sessions:
            assert session.has_socket == (session.endpoint in self.sockets)
        for request_id in (number.to_bytes(16, "big") for number in range(1, self.made + 1)):
            is_open = request_id in self.readers or request_id in self.questions
            assert self.ends[request_id] == (0 if is_open else 1)

    @invariant()
    def requests_wait_for_no_broker_while_one_takes_them(self) -> None:
        if any(self.takes_requests(at) for at in (ONE, TWO)) and self.core.sessions.best() is None:
            assert self.now < self.gathers_from + GATHER_S

    @invariant()
    def tokens_come_in_order(self) -> None:
        for reader in (*self.readers.values(), *self.over):
            assert reader.tokens == list(range(len(reader.tokens)))

    # The end

    def teardown(self) -> None:
        """However it went: once workers say nothing more, and then brokers neither, everything ends by itself."""
        self.silent_workers()
        self.silent_brokers()
        assert not self.readers
        assert not self.questions
        self.event(Close())
        self.valid()

    def silent_workers(self) -> None:
        """Brokers that live give every request to a worker, and readers read: no worker brings anything."""
        if self.core.sessions.best() is None:
            return
        end = self.now + SETTINGS.max_attempts * (4.0 + max(MAX_PAUSE_S, 1.25 * RETRY_AFTER_S)) + DEADLINE_SLACK_S
        end += SETTINGS.max_attempts * len(self.readers) * RETRY_AFTER_S  # as far as they stand in line
        while self.readers or self.questions:
            for at, socket in list(self.sockets.items()):
                if socket.welcomed:
                    self.heartbeat(at, True)
            for request_id, reader in list(self.readers.items()):
                reader.window.consume(reader.window.received - reader.window.consumed)
                self.event(Grant(request_id, reader.window.limit))
                for attempt in sorted(reader.open):
                    reader.workers.add("v")
                    self.says(reader.at, Started(request_id, attempt, "v"))
            self.sleep()
            assert self.now <= end, "a silent worker is never given up"

    def silent_brokers(self) -> None:
        """Nobody says anything any more."""
        end = self.now + EXPIRY_S + SETTINGS.connect_timeout_s + max(MAX_PAUSE_S, 1.25 * RETRY_AFTER_S) + 3.0
        end += SETTINGS.recovery_timeout_s  # in line
        while self.readers or self.questions:
            self.sleep()
            assert self.now <= end, "something waits for ever"


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestClientCore = Machine.TestCase
