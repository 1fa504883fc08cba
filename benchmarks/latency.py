"""What a relay adds to the way of a token: from the worker's write to the client's read, by one clock.

The moment of the write stands in the token's text; relay and ends are as in relay.py, each on a core of its own. The
ends wait in the kernel, never in a loop, so the times hold one wake-up of the relay and one of the client, as in real
processes. Figures are p50, p90, p99 and p99.9 in milliseconds.

spread-1   32 streams, one for each client, a token each 20 ms; evenly spread
spread-8   32 streams, 8 for each of 4 clients, in the same way
ttft       one request at a time: from the client's write of the request to its read of the first token, from a worker
           that answers at once. The relay is passed twice; zmq-broker routes the request (request_rate.py)

Run: python benchmarks/latency.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import rounds
from closed_loop import ClosedLoop
from kinds import ends_of
from relays import BARE, BROKER, RELAYS, notes, relay
from streams import Case, stream

STEP_S = 0.02
SPREAD = {"spread-1": Case(32, 1, STEP_S, groups=32), "spread-8": Case(4, 8, STEP_S, groups=32)}
TTFT = "ttft"
COLUMNS = {"p50_ms": "p50 ms", "p90_ms": "p90 ms", "p99_ms": "p99 ms", "p999_ms": "p99.9 ms"}


def main() -> None:
    """Measure what the command line asks for."""
    options = rounds.parse(rounds.parser(__doc__, [*SPREAD, TTFT], RELAYS, seconds=4.0))

    def measure(case: str, name: str) -> Mapping[str, float]:
        shape = SPREAD.get(case, Case(1, 0))
        slots = max(1, shape.clients * shape.streams)
        with (
            relay(name) as running,
            ends_of(running, clients=shape.clients, streams=shape.streams, slots=slots) as ends,
        ):
            if case == TTFT:
                return ClosedLoop(ends, 1, finish=name == BROKER).run(running, options.seconds)
            return stream(ends, running, shape, options.seconds)

    rounds.run("latency", options, measure, COLUMNS, BARE, notes)


if __name__ == "__main__":
    main()
