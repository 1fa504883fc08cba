"""A fake network and clock: events in the order of simulated time, links that delay, lose, break and fall silent."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
from random import Random
from typing import TYPE_CHECKING, Any

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import Message

if TYPE_CHECKING:
    from .door import Door

#: One message in this many passes through the codec; the others travel as objects, which takes a tenth of the time.
_THROUGH_CODEC = 16


class Clock:
    """Simulated time, and what happens when."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        now = self.now
        heapq.heappush(self._queue, (when if when > now else now, next(self._numbers), action, args))

    def after(self, seconds: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), action, args))

    def run_until(self, end: float) -> None:
        """Let everything happen up to `end`."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= end:
            self.now, _, action, args = pop(queue)
            action(*args)
        self.now = end


class Net:
    """What all nodes of one world share: the clock, the seeded randomness, and how well links carry.

    Attributes:
        loss: the part of all messages that is lost.
        lossy: some may have been lost so.
        delays_s: mean delays of a message; each link draws one of them for itself, so that what leaves a node later
            by one link may arrive sooner than what it sent by another.
        doors: the workers' own endpoints, of dead processes too.
    """

    def __init__(self, random: Random, loss: float, delays_s: tuple[float, ...]) -> None:
        self.clock = Clock()
        self.random = random
        self.loss = loss
        self.lossy = loss > 0
        self.delays_s = delays_s
        #: A process that is started later has a greater one.
        self.incarnations = count(1)
        self.doors: dict[str, Door] = {}
        self._carried = 0

    def through_wire(self, message: Message) -> Message:
        """Return what arrives where this message is sent."""
        self._carried += 1
        if self._carried % _THROUGH_CODEC:
            return message
        received = decode(encode(message))
        assert received == message, (received, message)
        return received


class Link:
    """One connection of a peer to a broker, ordered in both directions.

    Attributes:
        broken: it has ended for both sides, as TCP connections do when a process dies.
        silent: for each direction: what is sent is dropped, and nobody is told.
        full: the peer has stopped reading, so that the broker can send it nothing more.
        corrupt: for each direction: the next message is damaged.
    """

    def __init__(self, net: Net, endpoint: str, routing_id: bytes, *, lossless: bool = False) -> None:
        self.endpoint = endpoint
        self.routing_id = routing_id
        self.broken = False
        self.silent = [False, False]
        self.full = False
        self.corrupt = [False, False]
        self._net = net
        self._lossless = lossless
        self._rate = 1 / net.random.choice(net.delays_s)
        #: When the last message under way arrives, upwards (to the broker) and downwards.
        self._last = [0.0, 0.0]

    def carry(self, down: bool, message: Message, deliver: Callable[..., None], *args: Any) -> None:
        """Deliver a message, behind `args`, later: after all that were sent before it in this direction.

        Where it was damaged, a ProtocolError comes in its place.
        """
        net = self._net
        if self.silent[down] or (net.loss and not self._lossless and net.random.random() < net.loss):
            return
        self.later(down, self._deliver, down, deliver, args, net.through_wire(message))

    def later(self, down: bool, action: Callable[..., None], *args: Any) -> None:
        """Do something at this end of the link, behind all messages under way; not at all once it is broken."""
        clock = self._net.clock
        when = clock.now - math.log(1.0 - self._net.random.random()) / self._rate
        if when < self._last[down]:
            when = self._last[down]
        self._last[down] = when
        clock.at(when, self._unless_broken, action, args)

    def hold(self, seconds: float) -> None:
        """Let nothing more arrive for so long, then all of it: a partition that heals before TCP gives up."""
        until = self._net.clock.now + seconds
        self._last = [max(until, last) for last in self._last]

    def silence(self) -> None:
        """Drop all that is sent from now on, and what is under way; nobody is told."""
        self.silent = [True, True]

    def _deliver(self, down: bool, deliver: Callable[..., None], args: tuple[Any, ...], message: Message) -> None:
        if self.silent[down]:
            return
        if self.corrupt[down]:
            self.corrupt[down] = False
            deliver(*args, ProtocolError("damaged on the way"))
        else:
            deliver(*args, message)

    def _unless_broken(self, action: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.broken:
            action(*args)


class Node:
    """Something that runs on a machine: it can be killed, and paused as SIGSTOP does.

    Attributes:
        alive: the process has not ended.
        core: the state machine in it.
        reached_at: when others can reach it over the network again; in the past as a rule.
    """

    def __init__(self, net: Net) -> None:
        self.net = net
        self.clock = net.clock
        self.random = net.random
        self.alive = True
        self.core: Any = None
        self.reached_at = 0.0
        self._paused_at: float | None = None
        self._backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._tick_at = math.inf

    @property
    def paused(self) -> bool:
        return self._paused_at is not None

    def do(self, action: Callable[..., None], *args: Any) -> None:
        """Let the node do something now, or when it runs again."""
        if not self.alive:
            return
        if self._paused_at is not None:
            self._backlog.append((action, args))
            return
        action(*args)
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
        for action, args in backlog:
            self.do(action, *args)
        self.do(self.tick)

    def settle(self) -> None:
        """After each step: check every invariant, and see to it that the core is called when it wants to be."""
        core = self.core
        core.validate()
        deadline = core.next_deadline()
        if deadline is None or deadline >= self._tick_at:
            return
        self._tick_at = deadline
        self.clock.at(deadline, self._on_time, deadline)

    def _on_time(self, when: float) -> None:
        if self._tick_at != when:
            return
        self._tick_at = math.inf
        if not self.alive or self.paused:
            return  # it ticks when it runs again, behind all that has arrived meanwhile
        deadline = self.core.next_deadline()
        if deadline is not None and deadline > self.clock.now:
            self._tick_at = deadline  # it was put off meanwhile, as each message puts off heartbeats
            self.clock.at(deadline, self._on_time, deadline)
        else:
            self.do(self.tick)

    def woken(self, lag_s: float) -> None:
        """Called when a pause ends."""

    def tick(self) -> None:
        """Call the core's tick."""
        raise NotImplementedError
