"""A program that speaks the protocol, and nonsense in it: nobody else may notice."""

from __future__ import annotations

from collections.abc import Callable

from tokenmq.protocol.messages import (
    Cancel,
    Credit,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Query,
    Request,
    Timings,
    Usage,
)
from tokenmq.protocol.payload import Generation, Sampling, pack_generation

from .broker import SimBroker
from .engine import MODEL
from .net import Link, Net


class Rogue:
    """A client of all brokers that breaks every rule; it knows the ids of others' requests.

    Attributes:
        said: how many messages it has sent.
    """

    def __init__(self, net: Net, brokers: dict[str, SimBroker], ids: Callable[[], list[bytes]], until: float) -> None:
        self.said = 0
        self._net = net
        self._random = net.random
        self._brokers = list(brokers.values())
        self._ids = ids
        self._until = until
        self._link: Link | None = None
        self._broker = self._brokers[0]
        self._again()

    def received(self, link: Link, message: object) -> None:
        """Take no notice."""

    def lost(self, link: Link) -> None:
        if link is self._link:
            self._link = None

    def _again(self) -> None:
        if self._net.clock.now < self._until:
            self._act()
            self._net.clock.after(self._random.expovariate(3.0), self._again)
        elif self._link is not None:
            self._broker.cut(self._link)

    def _act(self) -> None:
        if self._link is None or self._random.random() < 0.05:
            if self._link is not None:
                self._broker.cut(self._link)
            self._broker = self._random.choice(self._brokers)
            self._link = self._broker.connect(self, client=True) if self._broker.alive else None
            if self._random.random() < 0.9:
                self._say(Hello("rogue", "rogue", self._random.choice([None, 0.001, 1e9])))
        else:
            self._say(self._nonsense())

    def _say(self, message: Message) -> None:
        if self._link is not None and not self._link.broken:
            self.said += 1
            self._link.carry(False, message, self._broker.from_client, self._link)

    def _nonsense(self) -> Message:
        random = self._random
        key = random.choice([*self._ids(), random.randbytes(16)])
        attempt = random.choice([1, 1, 2, 3, 2**63 - 1])
        choices: list[Callable[[], Message]] = [
            lambda: Credit(key, attempt, random.choice([0, 1, 2_097_152])),
            lambda: Cancel(key, attempt),
            lambda: self._request(attempt),
            lambda: self._request(attempt),
            lambda: self._request(attempt),
            lambda: Query(key, random.choice(["workers", "status", "nonsense"])),
            lambda: Query(key, "drain", {"worker": 7}),
            lambda: Query(key, "set_speed", {"worker": "worker-0/nobody", "speed": random.choice([0, 1e-6])}),
        ]
        ends: list[Callable[[], Message]] = [
            Goodbye,
            lambda: Heartbeat(random.choice([0, 7, 2**63 - 1])),
            lambda: Hello("rogue", "rogue"),
            lambda: Error(key, attempt, "worker_lost", "not true", True),
            lambda: Finish(key, attempt, FinishReason.LENGTH, Usage(), Timings(), ""),
        ]
        return random.choice(ends if random.random() < 0.1 else choices)()

    def _request(self, attempt: int) -> Request:
        random = self._random
        sampling = Sampling(max_tokens=random.choice([1, 30]), seed=random.getrandbits(30))
        payload = random.choice([b"", b"\xc1", pack_generation(Generation(prompt="x", sampling=sampling))])
        envelope = Envelope(
            model=random.choice([MODEL, MODEL, MODEL, "nonsense"]),
            attempt=attempt,
            credit=random.choice([0, 0, 1, 2_097_152]),
            deadline_s=random.choice([None, 0.0, 1e-9, 1.0]),
            route=random.choice([None, random.randbytes(16)]),
            prior_tokens=random.choice([0, 0, 5]),
            avoid=random.choice([(), ("worker-0", "worker-1", "worker-2")]),
            queue_s=random.choice([None, 0.0, 0.5]),
            expected_tokens=random.choice([0, 1, 1_048_576]),
            priority=random.choice([0, 9]),
            affinity=random.choice(["", "x"]),
            hedge=random.choice([False, False, True]),
            explain=random.choice([False, True]),
            path=random.choice([(), (), ("x",) * 8]),
        )
        return Request(random.randbytes(16), envelope, payload, ())
