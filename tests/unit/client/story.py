"""A ClientCore with a clock that stands still, and the words to tell stories with it."""

from __future__ import annotations

from typing import Any

from tokenmq.client.core import ClientCore
from tokenmq.client.events import (
    Action,
    Ask,
    Connected,
    Event,
    Received,
    Send,
    Submit,
)
from tokenmq.client.settings import Settings
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    NO_ID,
    Chunk,
    Chunks,
    Finish,
    FinishReason,
    Message,
    Timings,
    Usage,
    Welcome,
)

ONE, TWO = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"


def key(number: int) -> bytes:
    """Return the id of a test's n-th request or query."""
    return number.to_bytes(16, "big")


class Story:
    """Drives a core; every step validates it and returns its actions without log lines."""

    def __init__(self, *endpoints: str, **settings: Any) -> None:
        self.now = 100.0
        self.core = ClientCore(Settings(endpoints=endpoints or (ONE,), name="test", **settings), random=lambda: 1.0)
        self.windows: dict[bytes, ReceiveWindow] = {}

    def _told(self, actions: list[Action]) -> list[Action]:
        self.core.validate()
        return [action for action in actions if not isinstance(action, Log)]

    def handle(self, event: Event) -> list[Action]:
        return self._told(self.core.handle(event, self.now))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self._told(self.core.tick(self.now))

    def receive(self, message: Message) -> list[Action]:
        return self.handle(Received(message))

    def sleep(self) -> list[Action]:
        """Go to the next deadline, as the I/O thread does."""
        deadline = self.core.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.tick()

    def greet(self) -> list[Action]:
        return self.handle(Connected())

    def welcome(self) -> list[Action]:
        return self.receive(Welcome("broker", "stub/1", heartbeat_s=1.0, expiry_s=5.0))

    def open_session(self) -> list[Action]:
        self.tick()
        self.greet()
        return self.welcome()

    def submit(self, number: int = 1, *, window: int = 8, deadline_s: float | None = None) -> list[Action]:
        self.windows[key(number)] = ReceiveWindow(window)
        return self.handle(Submit(key(number), "m", b"payload", self.windows[key(number)], (), deadline_s))

    def ask(self, number: int = 9) -> list[Action]:
        return self.handle(Ask(key(number), "models"))

    def chunk(self, offset: int, tokens: int = 1, *, number: int = 1, attempt: int = 1) -> list[Action]:
        return self.receive(Chunks(NO_ID, (make_chunk(offset, tokens, number=number, attempt=attempt),)))

    def finish(self, tokens: int, *, number: int = 1, attempt: int = 1) -> list[Action]:
        return self.receive(make_finish(tokens, number=number, attempt=attempt))


def make_chunk(offset: int, tokens: int = 1, *, number: int = 1, attempt: int = 1, index: int = 0) -> Chunk:
    return Chunk(key(number), attempt, index, offset, tuple(range(offset, offset + tokens)), "x" * max(1, tokens))


def make_finish(tokens: int, *, number: int = 1, attempt: int = 1) -> Finish:
    return Finish(key(number), attempt, FinishReason.STOP, Usage(3, tokens), Timings(), "worker-1")


def sent(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]
