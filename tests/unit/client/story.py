"""A ClientCore with a clock that stands still, and the words to tell stories with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenmq.client.core import ClientCore
from tokenmq.client.events import (
    Action,
    Ask,
    Attempt,
    Attempted,
    CancelStream,
    Connected,
    Ended,
    Ending,
    Event,
    Grant,
    Lost,
    Received,
    Send,
    Submit,
)
from tokenmq.client.settings import Settings
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import TokenmqError
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    NO_ID,
    Chunk,
    Chunks,
    Credit,
    Error,
    Finish,
    FinishReason,
    Heartbeat,
    Message,
    Request,
    Started,
    Timings,
    Usage,
    Welcome,
)
from tokenmq.protocol.payload import Generation, Prior, Sampling, pack_generation, unpack_generation

ONE, TWO = "tcp://127.0.0.1:1", "tcp://127.0.0.1:2"
PAYLOAD = pack_generation(Generation(prompt="The sea is", sampling=Sampling(max_tokens=64)))


def key(number: int) -> bytes:
    """Return the id of a test's n-th request or query."""
    return number.to_bytes(16, "big")


class Story:
    """Drives a core; every step validates it and returns its actions without log lines.

    `jitter` is what the core's random numbers are: 1.0 makes every pause the longest that it may be. `random` is
    another source of them.
    """

    def __init__(
        self, *endpoints: str, jitter: float = 1.0, random: Callable[[], float] | None = None, **settings: Any
    ) -> None:
        self.now = 100.0
        self.jitter = jitter
        self.core = ClientCore(
            Settings(endpoints=endpoints or (ONE,), name="test", **settings), random=random or (lambda: self.jitter)
        )
        self.windows: dict[bytes, ReceiveWindow] = {}
        self.logs: list[Log] = []

    def _told(self, actions: list[Action]) -> list[Action]:
        self.core.validate()
        self.logs += [action for action in actions if isinstance(action, Log)]
        return [action for action in actions if not isinstance(action, Log)]

    def handle(self, event: Event) -> list[Action]:
        return self._told(self.core.handle(event, self.now))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self._told(self.core.tick(self.now))

    def receive(self, message: Message, at: str = ONE) -> list[Action]:
        return self.handle(Received(at, message))

    def sleep(self) -> list[Action]:
        """Go to the next deadline, as the I/O thread does."""
        deadline = self.core.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.tick()

    # Sessions

    def greet(self, at: str = ONE) -> list[Action]:
        return self.handle(Connected(at))

    def welcome(self, at: str = ONE, group: str = "") -> list[Action]:
        return self.receive(Welcome(f"broker at {at}", "stub/1", heartbeat_s=1.0, expiry_s=5.0, group=group), at)

    def open(self, at: str = ONE, group: str = "") -> list[Action]:
        """Get a session with a broker that is being connected to."""
        self.greet(at)
        return self.welcome(at, group)

    def open_sessions(self) -> list[Action]:
        """Get a session with every broker; return what the last one caused."""
        self.tick()
        actions: list[Action] = []
        for session in list(self.core.sessions):
            actions = self.open(session.endpoint)
        return actions

    def lose(self, at: str = ONE) -> list[Action]:
        return self.handle(Lost(at, "connection disconnected"))

    def reopen(self, at: str = ONE, group: str = "") -> list[Action]:
        """Get a session with a broker again, as soon as the pause is over."""
        while not self.core.sessions[at].has_socket:
            self.sleep()
        return self.open(at, group)

    # What the application does

    def submit(
        self,
        number: int = 1,
        *,
        window: int = 8,
        deadline_s: float | None = None,
        resume: bool = True,
        payload: bytes = PAYLOAD,
        attachments: tuple[bytes, ...] = (b"image",),
        **more: Any,
    ) -> list[Action]:
        self.windows[key(number)] = ReceiveWindow(window)
        order = Submit(key(number), "m", payload, self.windows[key(number)], attachments, deadline_s, resume, **more)
        return self.handle(order)

    def ask(self, number: int = 9) -> list[Action]:
        return self.handle(Ask(key(number), "models"))

    def cancel(self, number: int = 1) -> list[Action]:
        return self.handle(CancelStream(key(number)))

    def consume(self, tokens: int, *, number: int = 1) -> list[Action]:
        """Read tokens as the application does, and grant what its window says."""
        limit = self.windows[key(number)].consume(tokens)
        return [] if limit is None else self.handle(Grant(key(number), limit))

    # What brokers say

    def started(self, worker: str = "w1", *, number: int = 1, attempt: int = 1, at: str = ONE) -> list[Action]:
        return self.receive(Started(key(number), attempt, worker), at)

    def chunk(
        self, offset: int, tokens: int = 1, *, number: int = 1, attempt: int = 1, at: str = ONE
    ) -> list[Action]:
        return self.receive(Chunks(NO_ID, (make_chunk(offset, tokens, number=number, attempt=attempt),)), at)

    def finish(self, tokens: int, *, number: int = 1, attempt: int = 1, at: str = ONE) -> list[Action]:
        return self.receive(make_finish(tokens, number=number, attempt=attempt), at)

    def error(
        self,
        code: str = "worker_lost",
        *,
        number: int = 1,
        attempt: int = 1,
        retryable: bool = True,
        retry_after_s: float | None = None,
        worker: str = "",
        at: str = ONE,
    ) -> list[Action]:
        return self.receive(Error(key(number), attempt, code, f"it was {code}", retryable, retry_after_s, worker), at)


def heartbeats(story: Story) -> None:
    """Every broker that is there says that it lives."""
    for session in story.core.sessions:
        if session.open:
            story.receive(Heartbeat(sent=session.received), session.endpoint)


def patience(story: Story, seconds: float) -> list[Action]:
    """Let time pass in which brokers live and workers say nothing; return what left but heartbeats."""
    end, actions = story.now + seconds, list[Action]()
    while story.now < end:
        heartbeats(story)
        step = story.tick(min(1.0, end - story.now))
        actions += [a for a in step if not (isinstance(a, Send) and isinstance(a.message, Heartbeat))]
    return actions


def make_chunk(offset: int, tokens: int = 1, *, number: int = 1, attempt: int = 1, index: int = 0) -> Chunk:
    return Chunk(key(number), attempt, index, offset, tuple(range(offset, offset + tokens)), "x" * max(1, tokens))


def make_finish(tokens: int, *, number: int = 1, attempt: int = 1) -> Finish:
    return Finish(key(number), attempt, FinishReason.STOP, Usage(3, tokens), Timings(), "worker-1")


# What came of it


def sent(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def requests(actions: list[Action]) -> list[tuple[str, Request]]:
    """Return the REQUESTs that left, each with the broker that it left for."""
    sends = (action for action in actions if isinstance(action, Send))
    return [(send.endpoint, send.message) for send in sends if isinstance(send.message, Request)]


def request(actions: list[Action]) -> Request:
    """Return the only REQUEST that left."""
    ((_, only),) = requests(actions)
    return only


def prior(message: Request) -> Prior | None:
    """Return the tokens so far that a REQUEST carries; its envelope must count them."""
    found = unpack_generation(message.payload).prior
    assert message.envelope.prior_tokens == (len(found.token_ids) if found else 0)
    return found


def grants(actions: list[Action]) -> list[Credit]:
    return [message for message in sent(actions) if isinstance(message, Credit)]


def ended(actions: list[Action]) -> Ended:
    (end,) = (action for action in actions if isinstance(action, Ended))
    return end


def failure(actions: list[Action]) -> TokenmqError:
    """Return the error that the only stream that ended has ended with."""
    outcome = ended(actions).outcome
    assert isinstance(outcome, TokenmqError)
    return outcome


def ending(actions: list[Action]) -> Ending:
    outcome = ended(actions).outcome
    assert isinstance(outcome, Ending)
    return outcome


def told_attempts(actions: list[Action]) -> tuple[Attempt, ...]:
    """Return the attempts as the last Attempted or Ended tells of them."""
    return [action for action in actions if isinstance(action, (Attempted, Ended))][-1].attempts


def history(actions: list[Action]) -> tuple[Attempt, ...]:
    """Return the attempts that the only Attempted or Ended tells of."""
    (told,) = (action for action in actions if isinstance(action, (Attempted, Ended)))
    return told.attempts
