"""What docs/performance.md shows of each benchmark: which figures in which tables, and divided by whose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import scale
from relays import BARE, PROXY
from tables import Column, Table

_TOKENS = Column("tokens_per_s", "tokens/s", compared=True)
_CPU = Column("cpu_s_per_million_tokens", "CPU s for a million", compared=True)
_SHARES = (Column("relay_cpu_share", "of the relay's core"), Column("ends_cpu_share", "of the ends' core"))
_P50, _P99 = Column("p50_ms", "p50 ms", compared=True), Column("p99_ms", "p99 ms", compared=True)
#: Of the figures of scale.py.
_COMPARED = ("p99_ms", "kb_per_stream", "cpu_us_per_token", "cpu_us_above_idle")

TABLES: Mapping[str, Sequence[Table]] = {
    "relay": (
        Table(("flat-1", "flat-16"), (_TOKENS, _CPU, *_SHARES), BARE),
        Table(("paced-256x1", "paced-256x64", "paced-32"), (_CPU, _P50, _P99), BARE),
    ),
    "request_rate": (
        Table(
            (),
            (
                Column("requests_per_s", "requests/s", compared=True),
                Column("cpu_us_per_request", "CPU us for each", compared=True),
                *_SHARES,
            ),
            BARE,
        ),
    ),
    "latency": (Table((), (_P50, Column("p90_ms", "p90 ms"), _P99, Column("p999_ms", "p99.9 ms")), PROXY),),
    "startup": (
        Table(
            (),
            (
                Column("wall_ms", "wall ms", compared=True),
                Column("cpu_ms", "CPU ms", compared=True),
                Column("peak_mib", "peak MiB", compared=True),
            ),
            "import zmq",
            "what starts",
        ),
    ),
    "scale": tuple(
        Table(
            [case for case, work in scale.CASES.items() if work.family == family],
            [Column(name, heading, compared=name in _COMPARED) for name, heading in columns.items()],
            BARE,
        )
        for family, columns in scale.COLUMNS.items()
    ),
    "shards": (
        Table(
            (),
            (
                Column("per_s", "a second, all", compared=True),
                Column("per_core_s", "a second of CPU time", compared=True),
                Column("cpu_us_each", "CPU us for each", compared=True),
            ),
            "1",
            "shards",
        ),
    ),
    "direct": (
        Table(
            (),
            (
                _TOKENS,
                Column("broker_cpu_s_per_million_tokens", "broker's CPU s for a million", compared=True),
                Column("worker_cpu_s_per_million_tokens", "worker's", compared=True),
            ),
            "brokered",
            "way",
        ),
    ),
    "curve": (
        Table(
            (),
            (
                Column("per_s", "a second", compared=True),
                Column("cpu_us_each", "broker's CPU us for each", compared=True),
                Column("loop_us_each", "of its loop", compared=True),
                Column("io_us_each", "of libzmq's threads", compared=True),
                _P50,
                _P99,
            ),
            "plain",
            "keys",
        ),
    ),
    "flood": (
        Table(
            (),
            (
                _P50,
                _P99,
                Column("request_p50_ms", "request p50 ms", compared=True),
                Column("request_p99_ms", "request p99 ms", compared=True),
                Column("unanswered", "without answer"),
                Column("peak_mib", "MiB at most"),
                Column("flood_messages_per_s", "messages/s of the flood"),
                Column("flood_mib_per_s", "MiB/s"),
                Column("flood_connections_per_s", "connections/s"),
                Column("flood_cut_per_s", "cut/s"),
            ),
            "quiet",
            "meanwhile",
        ),
    ),
}
