"""A fake network and clock: events in the order of simulated time, links that delay, lose, break and fall silent."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import Message


class Clock:
    """Simulated time, and what happens when."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (max(when, self.now), next(self._numbers), action))

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self.at(self.now + seconds, action)

    def run_until(self, end: float) -> None:
        """Let everything happen up to `end`."""
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            action()
        self.now = end


class Link:
    """One connection of a peer to a broker: ordered in both directions, each message as bytes.

    `broken` ends it for both, as TCP does when a process dies; `silent` drops everything and tells nobody.
    """

    def __init__(self, clock: Clock, random: Random, routing_id: bytes, loss: float) -> None:
        self.routing_id = routing_id
        self.broken = False
        self.silent = False
        self.loss = loss
        self._clock = clock
        self._random = random
        self._last = {"up": 0.0, "down": 0.0}

    def carry(self, direction: str, message: Message, deliver: Callable[[Message], None]) -> None:
        """Deliver a message later, after all that were sent before it in this direction."""
        frames = encode(message)
        lost = self.silent or self._random.random() < self.loss
        self.later(direction, lambda: None if lost or self.silent else deliver(decode(frames)))

    def later(self, direction: str, action: Callable[[], None]) -> None:
        """Do something at this end of the link, behind all messages under way; not at all once it is broken."""
        when = max(self._clock.now + self._random.expovariate(1 / 0.002), self._last[direction])
        self._last[direction] = when
        self._clock.at(when, lambda: None if self.broken else action())


class Node:
    """Something that runs on a machine: it can be killed, and paused as SIGSTOP does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.alive = True
        self.core: Any = None
        self._paused_at: float | None = None
        self._backlog: list[Callable[[], None]] = []
        self._tick_at = float("inf")

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def do(self, action: Callable[[], None]) -> None:
        """Let the node do something now, or when it runs again."""
        if not self.alive:
            return
        if self.paused:
            self._backlog.append(action)
            return
        action()
        self.settle()

    def pause(self, seconds: float) -> None:
        if self.alive and not self.paused:
            self._paused_at = self.clock.now
            self.clock.after(seconds, self.resume)

    def resume(self) -> None:
        if self._paused_at is None:
            return
        lag_s, self._paused_at = self.clock.now - self._paused_at, None
        if not self.alive:
            return
        self.woken(lag_s)
        backlog, self._backlog = self._backlog, []
        for action in backlog:
            self.do(action)
        self.do(self.tick)

    def settle(self) -> None:
        """After each step: check every invariant, and see to it that the core is called when it wants to be."""
        self.core.validate()
        deadline = self.core.next_deadline()
        if deadline is None or deadline == float("inf") or deadline >= self._tick_at:
            return
        self._tick_at = deadline
        self.clock.at(deadline, lambda: self._on_time(deadline))

    def _on_time(self, when: float) -> None:
        if self._tick_at == when:
            self._tick_at = float("inf")
            self.do(self.tick)

    def woken(self, lag_s: float) -> None:
        """Called when a pause ends."""

    def tick(self) -> None:
        """Call the core's tick."""
        raise NotImplementedError
