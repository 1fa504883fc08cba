"""A WorkerCore with a clock that stands still, and the words to tell stories with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from tokenmq.protocol.links import Connected, Received, Send
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import Accepted, Chunk, Chunks, Credit, Envelope, FinishReason, Message, Request
from tokenmq.protocol.messages import ModelInfo as Model
from tokenmq.protocol.payload import Generation, Prior, Sampling, pack_generation
from tokenmq.worker.core import WorkerCore
from tokenmq.worker.engines.base import Done, EngineStats, Job, Output, Tokens
from tokenmq.worker.events import Action, CancelJob, EngineLoaded, EngineOutputs, Event, Submit
from tokenmq.worker.settings import WorkerSettings

BROKER = "tcp://broker:1"
OTHER = "tcp://broker:2"
ROUTE = b"route-of-client1"
KindT = TypeVar("KindT")


def request_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def request(number: int = 1, *, attempt: int = 1, credit: int = 256, **values: Any) -> Request:
    prior = values.get("prior", ())
    envelope = Envelope(
        values.get("model", "toy"),
        attempt,
        credit,
        route=values.get("route", ROUTE),
        prior_tokens=values.get("prior_tokens", len(prior)),
        expected_tokens=values.get("expected_tokens", 0),
        key=values.get("key"),
    )
    generation = Generation(
        prompt="hello",
        sampling=Sampling(max_tokens=values.get("max_tokens", 16)),
        prior=Prior(prior, values.get("text_chars", 0)) if prior else None,
    )
    payload = values.get("payload", pack_generation(generation))
    return Request(request_id(number), envelope, payload)


class Story:
    """Tells a core what happens, checks it after each event, and gives back what it orders, without log lines."""

    def __init__(self, brokers: tuple[str, ...] = (BROKER,), **values: Any) -> None:
        settings = WorkerSettings(brokers=brokers, name="w1", **{"models": ("toy",), "slots": 2, **values})
        self.core = WorkerCore(settings, "fake", 1000)
        self.now = 100.0
        self.logs: list[Log] = []
        self.orders: list[Action] = []

    def start(self) -> list[Action]:
        return self._filed(self.core.start(self.now))

    def tell(self, event: Event) -> list[Action]:
        return self._filed(self.core.handle(event, self.now))

    def hear(self, message: Message, broker: str = BROKER) -> list[Action]:
        return self.tell(Received(broker, message))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self._filed(self.core.tick(self.now))

    def _filed(self, actions: list[Action]) -> list[Action]:
        self.core.validate()
        self.logs += [action for action in actions if isinstance(action, Log)]
        orders = [action for action in actions if not isinstance(action, Log)]
        self.orders += orders
        return orders

    # --- shorter words ----------------------------------------------------------------------------------------------

    def accepted(self, broker: str = BROKER, heartbeat_s: float = 1.0, expiry_s: float = 5.0) -> list[Action]:
        return self.hear(Accepted("b1", "test", heartbeat_s, expiry_s), broker)

    def join(self, broker: str = BROKER) -> None:
        self.tell(Connected(broker))
        self.accepted(broker)

    def loaded(self, *names: str) -> list[Action]:
        return self.tell(EngineLoaded(tuple(Model(name, 2048, True) for name in names or ("toy",)), 1.5))

    def take(self, message: Request, broker: str = BROKER) -> Job:
        [submit] = self.hear(message, broker)
        assert isinstance(submit, Submit), submit
        return submit.job

    def engine(self, *outputs: Output, running: int = 0) -> list[Action]:
        return self.tell(EngineOutputs(outputs, EngineStats(running=running)))

    def credit(self, number: int, limit: int, attempt: int = 1) -> list[Action]:
        return self.hear(Credit(request_id(number), attempt, limit))


def tokens(job: Job, *ids: int, text: str | None = None) -> Tokens:
    return Tokens(job.ticket, ids, "".join(f"{token} " for token in ids) if text is None else text)


def done(job: Job, count: int = 0, reason: FinishReason = FinishReason.LENGTH) -> Done:
    return Done(job.ticket, reason, 1, count, 0.1, 0.2, 0.3)


def messages(actions: list[Action], kind: type[KindT]) -> list[KindT]:
    return [action.message for action in actions if isinstance(action, Send) and isinstance(action.message, kind)]


def chunks(actions: list[Action]) -> list[Chunk]:
    return [chunk for message in messages(actions, Chunks) for chunk in message.chunks]


def cancelled(actions: list[Action]) -> list[int]:
    return [action.ticket for action in actions if isinstance(action, CancelJob)]


class Words:
    """The functions above, for test modules: with importlib mode they cannot import this file."""

    broker = BROKER
    other = OTHER
    route = ROUTE
    id = staticmethod(request_id)
    request = staticmethod(request)
    tokens = staticmethod(tokens)
    done = staticmethod(done)
    messages = staticmethod(messages)
    chunks = staticmethod(chunks)
    cancelled = staticmethod(cancelled)
    story: Callable[..., Story] = Story


@pytest.fixture(scope="session")
def say() -> type[Words]:
    return Words


@pytest.fixture
def fresh() -> Story:
    """A worker that has only been made."""
    return Story()


@pytest.fixture
def ready() -> Story:
    """A worker that is registered at one broker, with its model loaded."""
    story = Story()
    story.start()
    story.join()
    story.loaded()
    return story


@pytest.fixture
def resuming() -> Story:
    """The same, with a model that resumes, beside one that does not."""
    story = Story()
    story.start()
    story.join()
    models = Model("toy", 2048, True, True), Model("plain", 2048, True, False)
    story.tell(EngineLoaded(models, 1.5))
    return story
