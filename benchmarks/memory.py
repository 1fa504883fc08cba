"""How much memory a relay has for each idle stream: with all of them, after their end, with as many again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from idle import idle, resident_bytes
from kinds import ends_of
from relays import Relay
from rounds import BenchmarkError

_KB = 1024
#: It has done its work when its memory stayed as it was for this time, and, where nobody is connected any more, it
#: took hardly any CPU time.
_LOOK_S = 0.3
_BUSY_SHARE = 0.1
_SAME_BYTES = 256 * _KB
_PATIENCE_S = 30.0


def settled_bytes(relay: Relay, wait: Callable[[float], object], busy_share: float) -> int:
    """Return a relay's memory when it has done what it had to do.

    Args:
        relay: that runs.
        wait: lets so many seconds pass.
        busy_share: with more of a core it still has something to do.

    Raises:
        BenchmarkError: it is never done.
    """
    end = time.monotonic() + _PATIENCE_S
    last, used_s = -1, relay.cpu_s()
    while time.monotonic() < end:
        wait(_LOOK_S)
        now, now_s = resident_bytes(relay.pid), relay.cpu_s()
        if abs(now - last) <= _SAME_BYTES and now_s - used_s < _LOOK_S * busy_share:
            return now
        last, used_s = now, now_s
    raise BenchmarkError(f"its memory and CPU time did not come to rest within {_PATIENCE_S:g} s")


def memory(relay: Relay, clients: int, streams: int) -> dict[str, float]:
    """Begin so many streams for each of so many clients, twice; return what each of them takes.

    Relays without requests have no streams: theirs are figures of connections.
    """

    def filled(clients: int, streams: int) -> int:
        with ends_of(relay, clients=clients, streams=streams, slots=clients * streams) as ends:
            return settled_bytes(relay, lambda seconds: idle(ends, relay, seconds), math.inf)

    def empty() -> int:
        return settled_bytes(relay, time.sleep, _BUSY_SHARE)

    # What is loaded or made at the first use belongs to no stream.
    filled(1, 1)
    before = empty()
    first = filled(clients, streams)
    after = empty()
    again = filled(clients, streams)
    total = clients * streams
    return {
        "kb_per_stream": (first - before) / total / _KB,
        "kb_that_stay": (after - before) / total / _KB,
        "kb_more_again": (again - first) / total / _KB,
        "megabytes_before": before / _KB / _KB,
        "megabytes": first / _KB / _KB,
    }
