"""Target: ClientCore with a hostile broker and hostile workers, beside an honest broker or without one.

After each step `core.validate()` holds, nothing raises, and whatever the client says can be decoded again. A
stream's reader gets each token once, in order, within its credit, and one end; the honest broker's streams come
whole. Nothing is dialled that is in no network that the user has named. When the hostile ones have fallen silent, all
ends in bounded time, and nothing is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, TypeVar

from tokenmq.client.core import ClientCore
from tokenmq.client.events import (
    Answered,
    Ask,
    CancelStream,
    CloseSocket,
    Connected,
    Deliver,
    Dial,
    Ended,
    Ending,
    Grant,
    HangUp,
    Heard,
    Lost,
    Malformed,
    Open,
    Parted,
    Reached,
    Received,
    Send,
    Submit,
    Tell,
)
from tokenmq.client.settings import Settings
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import ProtocolError, TokenmqError
from tokenmq.protocol.messages import (
    Attach,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Finish,
    FinishReason,
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
from tokenmq.protocol.payload import Generation, Sampling, pack_generation, unpack_generation

from .forge import Forger, Known
from .target import Broken
from .weight import weight

T = TypeVar("T")

_HONEST, _EVIL = "tcp://a:1", "tcp://b:1"
_TOKENS, _WINDOW = 8, 64
_FROM_BROKERS = (
    *[Command.CHUNKS] * 5, *[Command.STARTED] * 3, Command.FINISH, Command.FINISH, Command.ERROR, Command.REPLY,
)  # fmt: skip
_ANY = tuple(Command)
_ENDPOINTS = (
    "tcp://10.0.0.1:1", "tcp://10.0.0.2:65535", "tcp://192.168.0.1:22", "tcp://127.0.0.1:5555", "ipc:///etc/passwd",
    "tcp://10.0.0.1:0", "tcp://10.0.0.1:*", "tcp://*:1", "tcp://10.0.0.1:1;tcp://10.0.0.1:1", "inproc://x",
    "nonsense", "tcp://[::ffff:10.0.0.1]:1", "tcp://10.0.0.1:99999999999999999999", "tcp://\u0661\u0660.0.0.1:\u0661",
    "x" * 256,
)  # fmt: skip
_LEFT_BEHIND, _MOST_WEIGHT = 300, 60_000
#: By then everything has ended that hostile brokers have left open: a few times the longest timeout of the settings.
_PATIENCE_S = 240.0


class Reader:
    """What an application sees of a stream."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tokens: list[int] = []
        self.window = ReceiveWindow(_WINDOW)
        self.outcome: Ending | TokenmqError | None = None


class Story:
    """One client, and all that happens to it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1000.0
        self.inputs: deque[Sequence[bytes]] = deque(maxlen=400)
        self.messages = 0
        #: Whether the first broker is honest; the second never is.
        self.honest = random.random() < 0.6
        self._networks = random.choice(((), ("10.0.0.0/8",)))
        settings = Settings(
            (_HONEST, _EVIL), name="fuzz", connect_timeout_s=4.0, query_timeout_s=3.0, recovery_timeout_s=10.0,
            max_attempts=5, first_token_timeout_s=4.0, inter_token_timeout_s=2.0, direct=self._networks,
            queue_timeout_s=random.choice((None, 1.0)),
        )  # fmt: skip
        self.core = ClientCore(settings, random=Random(random.getrandbits(30)).random)
        self.known = Known(models=("m",), names=("w", "x"), endpoints=_ENDPOINTS)
        self.forger = Forger(random, self.known)
        self._open = dict.fromkeys((_HONEST, _EVIL), False)
        self._sent = dict.fromkeys((_HONEST, _EVIL), 0)
        self._got = dict.fromkeys((_HONEST, _EVIL), 0)
        self._beat_at = 0.0
        self._links: set[str] = set()
        self._reached: set[str] = set()
        self._readers: dict[bytes, Reader] = {}
        self._asked: set[bytes] = set()
        #: Requests at the honest broker: attempt, seed, tokens that were sent.
        self._at_honest: dict[bytes, tuple[int, int, int]] = {}
        self._later: deque[Any] = deque()
        #: The hostile brokers say nothing any more.
        self.silent = False

    def tell(self, steps: int) -> None:
        """Let so many things happen, then calm."""
        for _ in range(8):
            self._pass(0.05)
        before = weight(self.core)
        for _ in range(steps):
            self._step()
        self.must(weight(self.core) < _MOST_WEIGHT, "what the client keeps grows without bound")
        self.silent = True
        for broker in (_EVIL,) if self.honest else (_HONEST, _EVIL):
            # One that stays may keep a request in its waiting room for ever; the user's deadline is against that.
            if self._open[broker]:
                self._open[broker] = False
                self._handle(Lost(broker, "gone"))
        left_s = _PATIENCE_S
        while left_s > 0 and (self._asked or any(each.outcome is None for each in self._readers.values())):
            self._pass(0.25)
            left_s -= 0.25
        late = [id.hex() for id, each in self._readers.items() if each.outcome is None]
        self.must(not late and not self._asked, f"no end within {_PATIENCE_S} s: {late} {self._asked}")
        for _ in range(280):
            self._pass(0.25)  # links become idle
        after = weight(self.core)
        self.must(after <= before + _LEFT_BEHIND, f"the client keeps {after} containers, {before} before")

    # What happens.

    def _step(self) -> None:
        random, kind = self.random, self.random.random()
        if kind < 0.15:
            self._pass(random.choice((0.0, 0.05, 0.25)))
        elif kind < 0.3 and len(self._readers) < 60:
            self._submit()
        elif kind < 0.32:
            id = random.randbytes(16)
            self._asked.add(id)
            self._handle(Ask(id, "status"))
        elif kind < 0.34 and self._readers:
            self._cancel(random.choice(list(self._readers)))
        elif kind < 0.36:
            self._evil_leaves()
        elif kind < 0.5 and self._links:
            self._by_a_link(random.choice(sorted(self._links)))
        else:
            self._evil_says(self._an_evil_one())
        self._follow()

    def _an_evil_one(self) -> str:
        return _EVIL if self.honest else self.random.choice((_HONEST, _EVIL))

    def _submit(self) -> None:
        id, seed = self.random.randbytes(16), self.random.getrandbits(20)
        reader = self._readers[id] = Reader(seed)
        self.known.learn(self.known.ids, id)
        payload = pack_generation(Generation(prompt="p", sampling=Sampling(max_tokens=_TOKENS, seed=seed)))
        deadline_s = self.random.choice((None, None, 5.0))
        hedge_after_s = self.random.choice((None, None, 0.1))
        self._handle(
            Submit(
                id,
                "m",
                payload,
                reader.window,
                deadline_s=deadline_s,
                max_tokens=_TOKENS,
                hedge_after_s=hedge_after_s,
            )
        )

    def _cancel(self, id: bytes) -> None:
        if self._readers[id].outcome is None:
            self._handle(CancelStream(id))

    def _evil_leaves(self) -> None:
        broker = self._an_evil_one()
        if self._open[broker]:
            self._open[broker] = False
            self._handle(Lost(broker, "gone"))

    def _evil_says(self, broker: str) -> None:
        random = self.random
        if not self._open[broker]:
            return
        if random.random() < 0.1:
            self._hears(broker, encode(Heartbeat(self._sent[broker])))
            return
        open_ids = [id for id, each in self._readers.items() if each.outcome is None]
        if open_ids and random.random() < 0.5:
            self._hears(broker, encode(self._about(random.choice(open_ids))))
            return
        frames = self.forger.frames(_ANY if random.random() < 0.03 else _FROM_BROKERS, bent=0.04)
        for _ in range(random.choice((1,) * 30 + (40,))):
            self._hears(broker, frames)

    def _about(self, id: bytes) -> Message:
        """Return what could be said of a request, or nearly."""
        random, reader = self.random, self._readers[id]
        kind, attempt = random.random(), random.choice((1, 1, 1, 2, 3))
        offset = len(reader.tokens) + random.choice((0, 0, 0, 0, 1, -1))
        if kind < 0.4:
            tokens = tuple(range(random.choice((0, 1, 2, 5, _WINDOW + 1))))
            return Chunks(bytes(16), (Chunk(id, attempt, 0, max(0, offset), tokens, "t"),))
        if kind < 0.7:
            key = random.choice((None, *self.known.keys, random.randbytes(16)))
            if key is not None:
                self.known.learn(self.known.keys, key)
            return Started(id, attempt, "w", random.choice(_ENDPOINTS), key)
        if kind < 0.85:
            usage = Usage(1, random.choice((len(reader.tokens), 2**62)))
            return Finish(id, attempt, FinishReason.LENGTH, usage, Timings(), "w", random.choice((0, 0, 3)))
        error = self.forger.message(Command.ERROR)
        error.id, error.attempt = id, attempt  # type: ignore[union-attr,misc]
        return error

    def _by_a_link(self, endpoint: str) -> None:
        random = self.random
        if endpoint not in self._reached:
            if random.random() < 0.8:
                self._reached.add(endpoint)
                self._handle(Reached(endpoint))
            return
        if random.random() < 0.1:
            self._handle(Parted(endpoint, "gone"))
            return
        frames = self.forger.frames((Command.CHUNKS,) * 12 + _ANY[:2], bent=0.02)
        open_ids = [id for id, each in self._readers.items() if each.outcome is None]
        if open_ids and random.random() < 0.6:
            id = random.choice(open_ids)
            offset = len(self._readers[id].tokens)
            chunk = Chunk(id, random.choice((1, 1, 2)), 0, offset, (7,), "t")
            frames = encode(Chunks(random.choice(self.known.keys), (chunk,)))
        self.inputs.append(frames)
        self.messages += 1
        try:
            message = decode(list(frames))
        except ProtocolError as error:
            self._handle(Parted(endpoint, error.message))
            return
        self._handle(Heard(endpoint, message))

    def _hears(self, broker: str, frames: Sequence[bytes]) -> None:
        """Take what a broker sends, as `client/connection.py` does."""
        if not self._open[broker]:
            return
        self._sent[broker] += 1
        self.inputs.append(frames)
        self.messages += 1
        try:
            message = decode(list(frames))
        except ProtocolError as error:
            self._handle(Malformed(broker, error))
            return
        self._handle(Received(broker, message))

    # The honest broker.

    def _broker_hears(self, broker: str, message: Message) -> None:
        if isinstance(message, Hello):
            self._later.append((broker, Welcome("b", "fuzz", 1.0, 5.0)))
        elif isinstance(message, Request):
            self.known.learn(self.known.ids, message.id)
            if broker == _HONEST and self.honest:
                generation = unpack_generation(message.payload)
                done = 0 if generation.prior is None else len(generation.prior.token_ids)
                attempt = message.envelope.attempt
                self._at_honest[message.id] = attempt, generation.sampling.seed, done
                self._later.append((broker, Started(message.id, attempt, "honest")))
        elif isinstance(message, Cancel) and self.honest and broker == _HONEST:
            self._at_honest.pop(message.id, None)
        elif isinstance(message, Query) and self.honest and broker == _HONEST:
            self._later.append((broker, Reply(message.id, {})))

    def _work(self) -> None:
        for id, (attempt, seed, done) in list(self._at_honest.items()):
            if done < _TOKENS:
                tokens = tuple(_answer(seed)[done : done + 2])
                self._at_honest[id] = attempt, seed, done + 2
                self._hears(_HONEST, encode(Chunks(bytes(16), (Chunk(id, attempt, 0, done, tokens, "t"),))))
            else:
                del self._at_honest[id]
                finish = Finish(id, attempt, FinishReason.LENGTH, Usage(1, _TOKENS), Timings(), "honest")
                self._hears(_HONEST, encode(finish))

    # What the connection does.

    def _handle(self, event: Any) -> None:
        self._perform(self._guarded(lambda: self.core.handle(event, self.now)))

    def _perform(self, actions: Iterable[Any]) -> None:
        for action in actions:
            if isinstance(action, Open):
                self._sent[action.endpoint] = self._got[action.endpoint] = 0
                self._later.append(Connected(action.endpoint))
            elif isinstance(action, CloseSocket):
                self.must(action.endpoint != _HONEST or not self.honest, "the honest broker's session has ended")
                self._open[action.endpoint] = False
            elif isinstance(action, Send):
                message = self._said(action.message)
                if isinstance(message, Heartbeat):
                    self.must(message.sent == self._got[action.endpoint], "a heartbeat counts wrong")
                self._got[action.endpoint] += 1
                self._broker_hears(action.endpoint, message)
            elif isinstance(action, Dial):
                inside = action.endpoint.startswith(("tcp://10.", "tcp://[::ffff:10."))
                self.must(bool(self._networks) and inside, f"{action.endpoint!r} is in no network that was named")
                self._links.add(action.endpoint)
            elif isinstance(action, HangUp):
                self._links.discard(action.endpoint)
                self._reached.discard(action.endpoint)
            elif isinstance(action, Tell):
                message = self._said(action.message)
                if isinstance(message, Attach):
                    self.known.learn(self.known.keys, message.id)
            elif isinstance(action, Deliver):
                self._delivered(action.id, action.chunk)
            elif isinstance(action, Ended):
                self._ended(action.id, action.outcome)
            elif isinstance(action, Answered):
                self.must(action.id in self._asked, "an answer to nobody's question")
                self._asked.discard(action.id)
        self._guarded(self.core.validate)

    def _delivered(self, id: bytes, chunk: Chunk) -> None:
        reader = self._readers[id]
        self.must(reader.outcome is None, "a token after the end")
        self.must(chunk.offset == len(reader.tokens), "a token is missing, or came twice")
        reader.tokens.extend(chunk.token_ids)
        self.must(len(reader.tokens) <= reader.window.limit, "more tokens than there was credit for")
        limit = reader.window.consume(len(chunk.token_ids))
        if limit is not None:
            self._later.append(Grant(id, limit))

    def _ended(self, id: bytes, outcome: Ending | TokenmqError) -> None:
        reader = self._readers[id]
        self.must(reader.outcome is None, "a stream ended twice")
        reader.outcome = outcome
        if self.honest and isinstance(outcome, Ending) and outcome.reason is not FinishReason.CANCELLED:
            self.must(reader.tokens == _answer(reader.seed), f"the honest stream ended with {reader.tokens}")
        elif self.honest and isinstance(outcome, TokenmqError):
            self.must(outcome.code == "deadline", f"the honest stream failed: {outcome.code}: {outcome}")

    def _follow(self) -> None:
        """Do what is to happen a little later."""
        while self._later:
            each = self._later.popleft()
            if isinstance(each, Connected):
                if self.silent and not (self.honest and each.endpoint == _HONEST):
                    continue
                self._open[each.endpoint] = True
                self._handle(each)
            elif isinstance(each, Grant):
                self._handle(each)
            else:
                broker, message = each
                self._hears(broker, encode(message))

    def _said(self, message: Message) -> Message:
        try:
            return decode(self._guarded(lambda: encode(message)))
        except ProtocolError as error:
            raise Broken(f"the client says what is no message: {error.message}", list(self.inputs)) from error

    def _pass(self, seconds: float) -> None:
        """Let time pass; the honest broker works."""
        self.now += seconds
        self._perform(self._guarded(lambda: self.core.tick(self.now)))
        self._follow()
        if self.now >= self._beat_at and self.honest:
            self._beat_at = self.now + 0.5
            self._hears(_HONEST, encode(Heartbeat(self._sent[_HONEST])))
        self._work()
        self._follow()

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Broken:
            raise
        except BaseException as error:
            raise Broken.by(error, list(self.inputs)) from error

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            raise Broken(what, list(self.inputs))


def _answer(seed: int) -> list[int]:
    return [(seed + number) % 50_000 for number in range(_TOKENS)]


class ClientTarget:
    """Stories of one client each."""

    name = "client"

    def case(self, random: Random) -> int:
        story = Story(random)
        story.tell(random.choice((40, 150)))
        return story.messages

    def close(self) -> None:
        """Have nothing to leave."""
