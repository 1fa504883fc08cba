"""What a broker costs per token: zmq-broker, libzmq's C proxy, a bare Python forwarder and NATS, on the same work.

One worker brings the tokens of many streams, through one relay to the clients. Every relay is a process of its own,
alone on one core with all its threads; worker and clients are plain sockets of this process, on the other core. All
relays carry the same TMQ/1 messages of one token; only zmq-broker has its own kind of message for several tokens
of one client and step, and uses it, as zmq-worker does.

flat-1        flat out: 64 streams, one for each of 64 clients
flat-16       flat out: 64 streams, 16 for each of 4 clients
paced-256x1   256 streams, one for each client, a token each 20 ms; all at once, as an engine step brings them
paced-256x64  256 streams, 64 for each of 4 clients, in the same way
paced-32      32 streams, one for each client, a token each 20 ms; evenly spread, so that each one wakes the relay

cpu_s_per_million_tokens is the CPU time of the relay's process, all threads. relay_cpu_share and ends_cpu_share show
which side was the bound: a rate flat out is the relay's own where its share is near 1, and that of the ends is not.
Run: make bench, or python benchmarks/relay.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import rounds
from kinds import ends_of
from relays import BARE, RELAYS, notes, relay
from streams import Case, stream

STEP_S = 0.02
CASES = {
    "flat-1": Case(64, 1),
    "flat-16": Case(4, 16),
    "paced-256x1": Case(256, 1, STEP_S),
    "paced-256x64": Case(4, 64, STEP_S),
    "paced-32": Case(32, 1, STEP_S, groups=32),
}
COLUMNS = {
    "tokens_per_s": "tokens/s",
    "cpu_s_per_million_tokens": "CPU s/million tokens",
    "relay_cpu_share": "relay's core",
    "ends_cpu_share": "ends' core",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
}


def main() -> None:
    """Measure what the command line asks for."""
    options = rounds.parse(rounds.parser(__doc__, list(CASES), RELAYS, seconds=3.0))

    def measure(case: str, name: str) -> Mapping[str, float]:
        shape = CASES[case]
        with (
            relay(name) as running,
            ends_of(
                running, clients=shape.clients, streams=shape.streams, slots=shape.clients * shape.streams
            ) as ends,
        ):
            return stream(ends, running, shape, options.seconds)

    rounds.run("relay", options, measure, COLUMNS, BARE, notes)


if __name__ == "__main__":
    main()
