"""Target: WorkerCore with a hostile broker and hostile clients at its door. Its honest broker notices nothing.

After each step `core.validate()` holds, nothing raises, and whatever the worker says can be decoded again. What
leaves by a connection at the door was asked for there with the key in it. The honest broker's requests bring their
tokens, whole and in order, and its session never ends. In the end nothing is left of what the others have sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any, TypeVar

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.links import Connected, Lost, Malformed, Open, Received, Send, Shut
from tokenmq.protocol.messages import (
    Accepted,
    Attach,
    Chunks,
    Command,
    Drain,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Heartbeat,
    Message,
    ModelInfo,
    Parked,
    Ready,
    Request,
)
from tokenmq.protocol.payload import Generation, Sampling, pack_generation
from tokenmq.worker.core import WorkerCore
from tokenmq.worker.engines.base import Done, Output, Tokens
from tokenmq.worker.events import Came, CancelJob, Deaf, EngineLoaded, EngineOutputs, Hand, Stop, Submit
from tokenmq.worker.settings import WorkerSettings

from .forge import Forger, Known
from .target import Broken
from .weight import weight

T = TypeVar("T")

_HONEST, _EVIL = "tcp://a:1", "tcp://b:1"
_TOKENS = 8
#: An engine that ends all jobs here, whatever they ask for.
_MOST_TOKENS = 60
_FROM_BROKERS = (*[Command.REQUEST] * 6, *[Command.CREDIT] * 3, Command.CANCEL)
_AT_THE_DOOR = (Command.ATTACH, Command.ATTACH, Command.CREDIT, Command.CREDIT, Command.GOODBYE)
_ANY = tuple(Command)
_ROUTE = b"honest route 000"
_LEFT_BEHIND, _MOST_WEIGHT = 300, 120_000


class Story:
    """One worker, and all that happens to it."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.now = 1000.0
        self.inputs: deque[Sequence[bytes]] = deque(maxlen=400)
        self.messages = 0
        settings = WorkerSettings(
            brokers=(_HONEST, _EVIL), models=("m",), name="w", slots=4, reader_timeout_s=20.0,
            direct=random.choice(("", "tcp://127.0.0.1:9")),
        )  # fmt: skip
        self.core = WorkerCore(settings, "fuzz", 1)
        self.known = Known(models=("m",), names=("w", "x"))
        self.forger = Forger(random, self.known)
        #: By broker: whether it has the worker's session, and the messages sent and received in it.
        self._session = dict.fromkeys((_HONEST, _EVIL), False)
        self._open = dict.fromkeys((_HONEST, _EVIL), False)
        self._sent = dict.fromkeys((_HONEST, _EVIL), 0)
        self._got = dict.fromkeys((_HONEST, _EVIL), 0)
        self._beat_at = 0.0
        #: Jobs of the engine: what they are still to bring, and how much that was.
        self._jobs: dict[int, tuple[list[int], int]] = {}
        self._ended: list[Output] = []
        #: The honest request at hand, and its tokens so far.
        self._id = b""
        self._seed = 0
        self._tokens: list[int] = []
        self.finished = 0
        #: What connections at the door have shown.
        self._doors: dict[bytes, set[bytes]] = {}
        self._made = 0
        #: A broker may have its worker leave: then nobody is owed anything any more.
        self.drained = False
        self._perform(self._guarded(lambda: self.core.start(self.now)))
        self._handle(EngineLoaded((ModelInfo("m", resumes=True),)))

    def tell(self, steps: int) -> None:
        """Let so many things happen, then calm."""
        self._finish_one()
        before = weight(self.core)
        for _ in range(steps):
            if self.drained:
                return
            self._step()
        self.must(weight(self.core) < _MOST_WEIGHT, "what the worker keeps grows without bound")
        if self._open[_EVIL]:
            self._open[_EVIL] = self._session[_EVIL] = False
            self._handle(Lost(_EVIL))
        for peer in list(self._doors):
            self._comes(peer, encode(self.forger.message(Command.GOODBYE)))
        for _ in range(120):
            self._pass(0.25, evil=False)
        if not self.drained:
            self._finish_one()
            after = weight(self.core)
            self.must(after <= before + _LEFT_BEHIND, f"the worker keeps {after} containers, {before} before")

    def _finish_one(self) -> None:
        before = self.finished
        for _ in range(400):
            if self.finished > before or self.drained:
                return
            self._pass(0.25, evil=False)
        raise Broken("the honest request waits for ever", list(self.inputs))

    # What the hostile ones do.

    def _step(self) -> None:
        random, kind = self.random, self.random.random()
        if kind < 0.15:
            self._pass(random.choice((0.0, 0.05, 0.25)))
        elif kind < 0.18 and self._open[_EVIL]:
            self._open[_EVIL] = self._session[_EVIL] = False
            self._handle(Lost(_EVIL))
        elif kind < 0.5:
            self._at_the_door()
        elif self._open[_EVIL]:
            self._evil_says()

    def _evil_says(self) -> None:
        random = self.random
        if not self._session[_EVIL] and random.random() < 0.8:
            return  # until it has said READY, and was accepted
        if random.random() < 0.08:
            self._sent[_EVIL] += 1
            frames = encode(Heartbeat(self._sent[_EVIL] - random.choice((1, 1, 1, 0))))
        else:
            self._sent[_EVIL] += 1
            frames = self.forger.frames(_ANY if random.random() < 0.03 else _FROM_BROKERS, bent=0.05)
            for _ in range(random.choice((0,) * 30 + (40,))):
                self._hears(_EVIL, frames)
                self._sent[_EVIL] += 1
        self._hears(_EVIL, frames)

    def _at_the_door(self) -> None:
        random = self.random
        if not self._doors or random.random() < 0.2:
            self._made += 1
            self._doors[b"\0" + self._made.to_bytes(4, "big")] = set()
        peer = random.choice(list(self._doors))
        if random.random() < 0.1:
            self._handle(Deaf(peer, random.random() < 0.5))
            return
        self._comes(peer, self.forger.frames(_ANY if random.random() < 0.05 else _AT_THE_DOOR, bent=0.2))

    def _comes(self, peer: bytes, frames: Sequence[bytes]) -> None:
        """Take what comes through the door, as `transport/door.py` does."""
        self.inputs.append(frames)
        self.messages += 1
        message: Message | ProtocolError
        try:
            message = decode(list(frames))
        except ProtocolError as error:
            message = error
        if isinstance(message, Attach):
            self._doors[peer].add(message.id)
        self._handle(Came(peer, message))

    # Brokers.

    def _hears(self, broker: str, frames: Sequence[bytes]) -> None:
        """Take what a broker sends, as `transport/links.py` does."""
        if not self._open[broker]:
            return
        self.inputs.append(frames)
        self.messages += 1
        try:
            message = decode(list(frames))
        except ProtocolError as error:
            self._handle(Malformed(broker, error))
            return
        if broker == _EVIL and isinstance(message, Drain) and not message.undo:
            self.drained = True
        if isinstance(message, Request):
            self.known.learn(self.known.ids, message.id)
            if message.envelope.key is not None:
                self.known.learn(self.known.keys, message.envelope.key)
        self.known.learn(self.known.pasts, list(frames))
        self._handle(Received(broker, message))

    def _honest_says(self, message: Message) -> None:
        self._sent[_HONEST] += 1
        self._hears(_HONEST, encode(message))

    def _honest_hears(self, message: Message) -> None:
        if isinstance(message, Ready):
            if not self._session[_HONEST]:
                self._session[_HONEST] = True
                self._honest_says(Accepted("a", "fuzz", 1.0, 5.0))
        elif isinstance(message, Chunks):
            self.must(message.route == _ROUTE, "tokens for somebody whom this broker does not know")
            for chunk in message.chunks:
                self.must(chunk.request_id == self._id, "tokens of another's request")
                self.must(chunk.offset == len(self._tokens), "a token is missing, or came twice")
                self._tokens.extend(chunk.token_ids)
        elif isinstance(message, Finish):
            self.must(message.id == self._id, "the end of another's request")
            self.must(self._tokens == _answer(self._seed, _TOKENS), f"it ended with {self._tokens}")
            self.finished += 1
            self._id = b""
        elif isinstance(message, Error):
            self.must(self.drained or message.code == "busy", f"an honest request failed: {message}")
            self._id = b""
        elif isinstance(message, Heartbeat):
            self.must(message.sent == self._got[_HONEST], "a heartbeat counts wrong")
        else:
            self.must(isinstance(message, Parked) or self.drained, f"{message.command.name} to the honest broker")

    def _submit(self) -> None:
        if self._session[_HONEST] and not self._id:
            self._id, self._tokens = self.random.randbytes(16), []
            self._seed = self.random.getrandbits(20)
            payload = pack_generation(Generation(prompt="p", sampling=Sampling(max_tokens=_TOKENS, seed=self._seed)))
            self._honest_says(Request(self._id, Envelope("m", 1, 64, route=_ROUTE), payload))
            self.known.learn(self.known.ids, self._id)

    # What the server does.

    def _handle(self, event: Any) -> None:
        self._perform(self._guarded(lambda: self.core.handle(event, self.now)))

    def _perform(self, actions: Iterable[Any]) -> None:
        following: list[Any] = []
        for action in actions:
            if isinstance(action, Open):
                self._open[action.broker] = True
                self._sent[action.broker] = self._got[action.broker] = 0
                following.append(Connected(action.broker))
            elif isinstance(action, Shut):
                self.must(action.broker != _HONEST or self.drained, "the honest broker's session has ended")
                self._open[action.broker] = self._session[action.broker] = False
            elif isinstance(action, Send):
                message = self._said(action.message)
                if action.broker == _HONEST:
                    self._honest_hears(message)
                elif isinstance(message, Ready) and not self._session[_EVIL]:
                    self._session[_EVIL] = True
                    self._sent[_EVIL] += 1
                    following.append(Received(_EVIL, Accepted("b", "fuzz", 1.0, 5.0)))
                self._got[action.broker] += 1
            elif isinstance(action, Hand):
                message = self._said(action.message)
                if isinstance(message, Chunks):
                    self.must(
                        message.route in self._doors.get(action.peer, ()), "chunks by a door that has no such key"
                    )
            elif isinstance(action, Submit):
                sampling = action.job.generation.sampling
                count = min(sampling.max_tokens, _MOST_TOKENS)
                self._jobs[action.job.ticket] = _answer(sampling.seed, count), count
            elif isinstance(action, CancelJob) and self._jobs.pop(action.ticket, None) is not None:
                self._ended.append(Done(action.ticket, FinishReason.CANCELLED, 1, 0))
            elif isinstance(action, Stop):
                self.must(self.drained, f"the worker has stopped: {action.reason}")
        self._guarded(self.core.validate)
        for event in following:
            self._handle(event)

    def _said(self, message: Message) -> Message:
        try:
            return decode(self._guarded(lambda: encode(message)))
        except ProtocolError as error:
            raise Broken(f"the worker says what is no message: {error.message}", list(self.inputs)) from error

    def _pass(self, seconds: float, *, evil: bool = True) -> None:
        """Let time pass; the engine works, and the honest broker goes on."""
        self.now += seconds
        if self._session[_HONEST] and self.now >= self._beat_at:
            self._beat_at = self.now + 0.5
            self._honest_says(Heartbeat(self._sent[_HONEST]))
        self._submit()
        outputs, self._ended = self._ended, []
        for ticket, (left, count) in list(self._jobs.items()):
            if left:
                outputs.append(Tokens(ticket, tuple(left[:5]), "text"))
                self._jobs[ticket] = left[5:], count
            else:
                del self._jobs[ticket]
                outputs.append(Done(ticket, FinishReason.LENGTH, 1, count))
        if outputs:
            self._handle(EngineOutputs(outputs))
        self._perform(self._guarded(lambda: self.core.tick(self.now)))

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


def _answer(seed: int, count: int) -> list[int]:
    return [(seed + number) % 50_000 for number in range(count)]


class WorkerTarget:
    """Stories of one worker each."""

    name = "worker"

    def case(self, random: Random) -> int:
        story = Story(random)
        story.tell(random.choice((40, 150)))
        return story.messages

    def close(self) -> None:
        """Have nothing to leave."""
