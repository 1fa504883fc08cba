"""What a dispatch decision costs, by policy and by the number of workers: CPU time in the real broker core.

Half of all slots are in use, and everything happens as it does under load: a REQUEST comes in, it goes out to a
worker, and the FINISH of the oldest request comes in. `whole` is all of that, without sockets and without the codec.
Of it, `decision` is what the number of workers can matter to: who may take the request, the choice, and filing the
worker anew when its load has changed, after the request and after the FINISH. The default policy looks at no list of
all workers, so its decision may grow as a logarithm does, and no more.

Run: python benchmarks/decisions.py. On a machine that has nothing else to do.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.dispatch import DEFAULT_POLICY, POLICIES
from tokenmq.broker.events import FromClient, FromWorker, ToWorker
from tokenmq.broker.limits import UNLIMITED
from tokenmq.broker.registry import ClientSession
from tokenmq.broker.requests import RequestRecord
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.liveness import Liveness
from tokenmq.protocol.messages import (
    Envelope,
    Finish,
    FinishReason,
    Hello,
    Load,
    ModelInfo,
    Ready,
    Request,
    Timings,
    Usage,
)

MODEL = "m"
#: Of each worker; half of them are in use.
SLOTS = 8
FEW, MANY = 10, 1_000
#: Decisions a second that the cost is put in relation to.
RATE = 10_000
_CLIENT = b"c"
#: Seconds of the broker's clock between two requests.
_STEP_S = 1 / RATE
_CONVERSATIONS = 64
_TOKENS = 200
#: Ids that the real broker has not had.
_OTHER_IDS = 1 << 100


def request(number: int) -> Request:
    """Make the request of this number, one of some conversations."""
    affinity = f"conversation-{number % _CONVERSATIONS}"
    envelope = Envelope(MODEL, 1, 1, expected_tokens=_TOKENS, affinity=affinity)
    return Request(number.to_bytes(16, "big"), envelope, b"")


class Broker:
    """A broker whose workers are half full.

    Attributes:
        core: the real one.
    """

    def __init__(self, policy: str, workers: int) -> None:
        """Register workers, whose speeds differ a little, and fill half of their slots."""
        self._now = 0.0
        self._numbers = count(1)
        self._running: deque[tuple[bytes, bytes]] = deque()
        self._random = Random(7)
        settings = BrokerSettings(policy=policy, heartbeat_s=10_000.0, expiry_s=80_000.0, limits=UNLIMITED)
        self.core = BrokerCore(settings, software="benchmark", now=0.0, random=self._random)
        self.core.handle(FromClient(_CLIENT, Hello("client", "benchmark")), 0.0)
        for number in range(workers):
            speed = self._random.uniform(40, 60)
            ready = Ready(f"w{number}", 1, "benchmark", (ModelInfo(MODEL),), SLOTS, "none", Load(), speed)
            self.core.handle(FromWorker(b"w%d" % number, ready), 0.0)
        for _ in range(workers * SLOTS // 2):
            self._submit()

    def whole(self, rounds: int) -> None:
        """Dispatch so many requests, and end as many."""
        for _ in range(rounds):
            self._submit()
            self._finish()

    def decision(self, rounds: int) -> None:
        """Decide so often where a request goes, and file workers anew as dispatches and ends make it necessary.

        The requests are on top of those of the real broker, and all have ended when this returns.
        """
        registry, chooser = self.core.registry, self.core.exchange.chooser
        client = ClientSession(peer=b"d", liveness=Liveness(1.0, 5.0, 0.0, 0.0), name="", route=bytes(16))
        records = deque(
            RequestRecord.of(request(_OTHER_IDS + number), client, self._now) for number in range(_CONVERSATIONS)
        )
        running: deque[RequestRecord] = deque()
        for number in range(rounds + _CONVERSATIONS // 2):
            if number < rounds:
                record = records.popleft()
                worker = chooser.choose(record, chooser.candidates(record))
                worker.charge(record)
                record.worker = worker
                registry.changed(worker, self._now)
                running.append(record)
            if running and number >= _CONVERSATIONS // 2:
                record = running.popleft()
                assert record.worker is not None
                record.worker.release(record)
                registry.changed(record.worker, self._now)
                records.append(record)

    def _submit(self) -> None:
        self._now += _STEP_S
        for action in self.core.handle(FromClient(_CLIENT, request(next(self._numbers))), self._now):
            if isinstance(action, ToWorker) and isinstance(action.message, Request):
                self._running.append((action.peer, action.message.id))

    def _finish(self) -> None:
        peer, id = self._running.popleft()
        finish = Finish(id, 1, FinishReason.STOP, Usage(1, _TOKENS), Timings(decode_s=4.0), "")
        self.core.handle(FromWorker(peer, finish), self._now)


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU microseconds a request."""

    whole_us: float
    decision_us: float


def cost_us(run: Callable[[int], None], rounds: int, repeats: int) -> float:
    """Return CPU microseconds a round: of several measurements the least, which others disturbed least."""
    run(rounds // 10)
    least = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        run(rounds)
        least = min(least, (time.process_time() - began) / rounds * 1e6)
    return least


def measure(policy: str, workers: int, rounds: int, repeats: int) -> Cost:
    """Measure one policy with so many workers."""
    broker = Broker(policy, workers)
    decision_us = cost_us(broker.decision, rounds, repeats)
    whole_us = cost_us(broker.whole, rounds, repeats)
    broker.core.validate()
    return Cost(whole_us, decision_us)


def main() -> None:
    """Measure all policies; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1_000, help="requests of a measurement (default: 1000)")
    parser.add_argument("--repeats", type=int, default=20, help="measurements, the least counts (default: 20)")
    parser.add_argument("--workers", type=int, default=MANY, help=f"against {FEW} (default: {MANY})")
    options = parser.parse_args()
    print(f"CPU us a request; ratio: {options.workers} workers over {FEW}; core: {RATE:,} decisions a second")
    print(f"  {'':17} {'decision':>20} {'ratio':>6} {'core':>6}   {'whole':>20} {'ratio':>6}")
    for policy in POLICIES:
        few, many = (measure(policy, workers, options.rounds, options.repeats) for workers in (FEW, options.workers))
        decision = f"{few.decision_us:9.2f} {many.decision_us:10.2f} {many.decision_us / few.decision_us:6.1f}"
        whole = f"{few.whole_us:9.1f} {many.whole_us:10.1f} {many.whole_us / few.whole_us:6.1f}"
        note = "  (default)" if policy == DEFAULT_POLICY else ""
        print(f"  {policy:17} {decision} {many.decision_us * RATE / 1e6:6.0%}   {whole}{note}", flush=True)


if __name__ == "__main__":
    main()
