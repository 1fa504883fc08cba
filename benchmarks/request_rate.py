"""Requests of one token a second: zmq-broker with its full routing, libzmq's C proxy, a bare forwarder and NATS.

64 requests are in flight, from 8 clients to 4 workers of 32 slots, which answer at once; a client whose request ends
asks again. Relay and ends as in relay.py: each on a core of its own, the ends plain sockets.

zmq-broker does the same work in both cases: it reads the request, chooses the worker, keeps the slot, tells the
client STARTED, forwards CHUNKS, reads FINISH, completes it and passes it on. The others pass on what comes, to the
workers in turn:

one-reply      the others carry the request and one message back
with-finish    the others carry the request and two messages back, CHUNKS and FINISH

(It is not called requests.py: scripts in this folder would then find it in the place of the package of that name.)
Run: python benchmarks/request_rate.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import rounds
from closed_loop import ClosedLoop
from kinds import ends_of
from relays import BARE, BROKER, RELAYS, notes, relay

CASES = {"one-reply": False, "with-finish": True}
COLUMNS = {
    "requests_per_s": "requests/s",
    "cpu_us_per_request": "CPU us/request",
    "relay_cpu_share": "relay's core",
    "ends_cpu_share": "ends' core",
}
CLIENTS, WORKERS, SLOTS, IN_FLIGHT = 8, 4, 32, 64


def main() -> None:
    """Measure what the command line asks for."""
    options = rounds.parse(rounds.parser(__doc__, list(CASES), RELAYS, seconds=3.0))

    def measure(case: str, name: str) -> Mapping[str, float]:
        with relay(name) as running, ends_of(running, workers=WORKERS, clients=CLIENTS, slots=SLOTS) as ends:
            return ClosedLoop(ends, IN_FLIGHT, finish=CASES[case] or name == BROKER).run(running, options.seconds)

    rounds.run("request_rate", options, measure, COLUMNS, BARE, notes)


if __name__ == "__main__":
    main()
