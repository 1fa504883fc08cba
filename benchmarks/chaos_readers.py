"""A client process of the chaos run: readers of one AsyncClient. Each stream is checked to the last character.

It is started by chaos.py with its orders as JSON, tells about each stream in one line of JSON, and begins no more
streams when its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

from tokenmq.client import AsyncClient, Attempt, Chunk, TokenmqError
from tokenmq.client.aio import AsyncStream
from tokenmq.worker.engines.synthetic import text_of, token_at

#: Small, so that a reader who pauses stops its stream at the worker.
WINDOW_TOKENS = 64
BEAT_S = 1.0
_FEWEST_TOKENS = 10
_STOP_SHARE = 0.3
_PAUSE_SHARE = 0.1
_CANCEL_SHARE = 0.1
_LONGEST_PAUSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What the parent wants of one client process.

    Attributes:
        name: how brokers call this client.
        model: the model to ask for.
        endpoints: the brokers.
        streams: how many at a time.
        tokens: the longest stream.
        seed: of all that is drawn here.
        connect_timeout_s: how long a request waits for a broker.
        hang_s: a stream that brings nothing for so long hangs.
        end_s: how long the last streams may take when there are no more faults.
    """

    name: str
    model: str
    endpoints: list[str]
    streams: int
    tokens: int
    seed: str
    connect_timeout_s: float
    hang_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """One stream: what is asked for, what must come, what the reader does."""

    seed: int
    max_tokens: int
    stop: str
    token_ids: tuple[int, ...]
    text: str
    reason: str
    pause_at: int | None
    pause_s: float
    cancel_at: int | None

    @classmethod
    def draw(cls, random: Random, longest: int) -> Plan:
        """Draw one."""
        seed, length = random.getrandbits(48), random.randint(_FEWEST_TOKENS, max(_FEWEST_TOKENS, longest))
        ids = [token_at(seed, position) for position in range(length)]
        words = [text_of(token) for token in ids]
        text, reason, stop = "".join(words), "length", ""
        if random.random() < _STOP_SHARE:
            begin = random.randrange(len(text))
            stop = text[begin : begin + random.randint(3, 12)]
            text, reason = text[: text.index(stop)], "stop"
            ids = ids[: _tokens_until(words, stop)]
        pause_at = random.randrange(len(ids)) if random.random() < _PAUSE_SHARE else None
        pause_s = random.uniform(0.1, _LONGEST_PAUSE_S)
        cancel_at = random.randrange(len(ids)) if random.random() < _CANCEL_SHARE else None
        return cls(seed, length, stop, tuple(ids), text, reason, pause_at, pause_s, cancel_at)


def _tokens_until(words: Sequence[str], stop: str) -> int:
    text = ""
    for number, word in enumerate(words, 1):
        text += word
        if stop in text:
            return number
    raise ValueError(f"{stop!r} does not come")


class WrongError(Exception):
    """The stream is not what it must be; the message says where."""


class LostError(Exception):
    """Something of the stream is missing; the message says where."""


@dataclass(slots=True, eq=False)
class Reading:
    """How far one reader is with its plan."""

    plan: Plan
    tokens: int = 0
    chars: int = 0
    #: (offset behind it, time) of each chunk with tokens, and of the end.
    moments: list[tuple[int, float]] = field(default_factory=list)
    waits_since: float | None = None
    hung: bool = False

    def take(self, chunk: Chunk) -> None:
        """Check a chunk.

        Raises:
            WrongError: it is not what must come next.
            LostError: something before it has not come.
        """
        if chunk.offset > self.tokens:
            raise LostError(f"tokens {self.tokens} to {chunk.offset - 1} did not come")
        count = len(chunk.token_ids)
        expected = self.plan.token_ids[self.tokens : self.tokens + count]
        if chunk.offset < self.tokens or tuple(chunk.token_ids) != expected:
            raise WrongError(f"at token {self.tokens}: {expected} must come, got {chunk}")
        if not self.plan.text.startswith(chunk.text, self.chars):
            expected_text = self.plan.text[self.chars : self.chars + len(chunk.text) + 20]
            raise WrongError(f"at token {self.tokens}: text {expected_text!r} must come, got {chunk.text!r}")
        self.tokens += count
        self.chars += len(chunk.text)
        if count:
            self.moments.append((self.tokens, time.monotonic()))

    def end(self, reason: str | None, completion_tokens: int) -> None:
        """Check that all has come.

        Raises:
            WrongError: the end is another one than it must be.
            LostError: tokens or text did not come.
        """
        plan = self.plan
        if self.tokens < len(plan.token_ids) or self.chars < len(plan.text):
            raise LostError(
                f"ended ({reason}) after {self.tokens} of {len(plan.token_ids)} tokens, "
                f"{self.chars} of {len(plan.text)} characters"
            )
        if reason != plan.reason or completion_tokens != self.tokens:
            raise WrongError(
                f"ended as {reason} with {completion_tokens} tokens counted, "
                f"and must as {plan.reason} with {len(plan.token_ids)}"
            )
        self.moments.append((self.tokens + 1, time.monotonic()))

    def gaps(self, attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
        """Return the waits between the last token of a broken attempt and the first one after it, one a place.

        Each has the attempts that it took: those that broke there, and the one that went on.
        """
        chains: dict[int, list[Attempt]] = {}
        for broken, attempt in pairwise(attempts):
            chains.setdefault(attempt.first_token, [broken]).append(attempt)
        behind = [offset for offset, _ in self.moments]
        gaps = []
        for first_token, chain in chains.items():
            before, after = bisect_left(behind, first_token), bisect_left(behind, first_token + 1)
            # Without a token before there is no gap; a pause of the reader's own is none.
            paused = self.plan.pause_at is not None and abs(self.plan.pause_at - first_token) <= WINDOW_TOKENS
            if first_token and after < len(self.moments) and not paused:
                places = [(attempt.worker, attempt.broker, _code(attempt)) for attempt in chain]
                gaps.append({"before": self.moments[before][1], "after": self.moments[after][1], "places": places})
        return gaps


def _code(attempt: Attempt) -> str:
    return attempt.error.code if attempt.error else ""


class Readers:
    """All readers of this process."""

    def __init__(self, orders: Orders) -> None:
        """Make them; they begin in `run`."""
        self._orders = orders
        self._tokens = 0
        self._stopping = False
        self._open: dict[asyncio.Task[None], Reading] = {}

    async def run(self) -> None:
        """Read until standard input ends, and then to the end of the last streams, or until that takes too long."""
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        threading.Thread(target=_watch_input, args=(loop, stop), daemon=True).start()
        async with AsyncClient(
            self._orders.endpoints,
            name=self._orders.name,
            window_tokens=WINDOW_TOKENS,
            connect_timeout_s=self._orders.connect_timeout_s,
        ) as client:
            tasks = [asyncio.ensure_future(self._read_on(client, number)) for number in range(self._orders.streams)]
            beats = asyncio.ensure_future(self._beat())
            await stop.wait()
            self._stopping = True
            _, rest = await asyncio.wait(tasks, timeout=self._orders.end_s)
            for task in rest:
                self._give_up(task)
            if rest:
                await asyncio.wait(rest, timeout=BEAT_S)
            beats.cancel()
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()  # a mistake in this file must not pass for a good run
        self._tell_beat()

    async def _read_on(self, client: AsyncClient, number: int) -> None:
        random = Random(f"{self._orders.seed}/{number}")
        # Not all in the same moment, nor in step ever after.
        await asyncio.sleep(random.random())
        while not self._stopping:
            await self._read(client, Plan.draw(random, self._orders.tokens))

    async def _read(self, client: AsyncClient, plan: Plan) -> None:
        task = asyncio.current_task()
        assert task is not None
        reading = self._open[task] = Reading(plan)
        stream = client.generate(
            self._orders.model, prompt="x", max_tokens=plan.max_tokens, seed=plan.seed, stop=plan.stop or ()
        )
        outcome, detail = "read", ""
        try:
            outcome = await self._follow(stream, reading)
        except WrongError as error:
            outcome, detail = "wrong", str(error)
        except LostError as error:
            outcome, detail = "lost", str(error)
        except TokenmqError as error:
            outcome, detail = "failed", f"{error.code}: {error.message}"
        except asyncio.CancelledError:
            if not reading.hung:
                raise
            outcome, detail = "hung", f"nothing came after token {reading.tokens} of {len(plan.token_ids)}"
        del self._open[task]
        self._tell_stream(outcome, detail, stream, reading)

    async def _follow(self, stream: AsyncStream, reading: Reading) -> str:
        plan = reading.plan
        paused = False
        reading.waits_since = time.monotonic()
        async for chunk in stream:
            before = reading.tokens
            reading.take(chunk)
            self._tokens += reading.tokens - before
            reading.waits_since = None
            if plan.cancel_at is not None and reading.tokens > plan.cancel_at:
                stream.cancel()
                return "cancelled"
            if plan.pause_at is not None and reading.tokens > plan.pause_at and not paused:
                paused = True
                await asyncio.sleep(plan.pause_s)
            reading.waits_since = time.monotonic()
        reading.end(stream.finish_reason, stream.usage.completion_tokens if stream.usage else -1)
        return "read"

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._tell_beat()
            latest = time.monotonic() - self._orders.hang_s
            for task, reading in self._open.items():
                if reading.waits_since is not None and reading.waits_since < latest:
                    self._give_up(task)

    def _give_up(self, task: asyncio.Task[None]) -> None:
        if task in self._open:
            self._open[task].hung = True
        task.cancel()

    def _tell_beat(self) -> None:
        _tell({"tokens": self._tokens, "open": len(self._open)})
        self._tokens = 0

    def _tell_stream(self, outcome: str, detail: str, stream: AsyncStream, reading: Reading) -> None:
        attempts = stream.attempts
        told: dict[str, Any] = {"outcome": outcome, "attempts": len(attempts), "gaps": reading.gaps(attempts)}
        if detail:
            told |= {"detail": detail, "at": time.monotonic(), "id": stream.id, "plan": asdict(reading.plan)}
            told["history"] = [
                {
                    "number": attempt.number,
                    "broker": attempt.broker,
                    "worker": attempt.worker,
                    "first_token": attempt.first_token,
                    "error": None if attempt.error is None else f"{attempt.error.code}: {attempt.error.message}",
                }
                for attempt in attempts
            ]
        _tell(told)


def _tell(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _watch_input(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    sys.stdin.read()
    loop.call_soon_threadsafe(stop.set)


def main() -> None:
    """Do what the orders say."""
    asyncio.run(Readers(Orders(**json.loads(sys.argv[1]))).run())


if __name__ == "__main__":
    main()
