"""Meters under any schedule: never more than promised, and a wait that is exactly long enough."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmq.broker.limits import UNLIMITED
from tokenmq.broker.meters import Account, TokenBucket

#: Clocks of machines that have just started, and that have run for thirty years.
starts = st.sampled_from([0.0, 1.0, 12_345.678, 1e6, 1e9])
rates = st.floats(0.01, 1e9)
#: Seconds in which a bucket fills.
fills = st.floats(1e-3, 1e4)
#: Amounts as parts of the burst; some are larger than it.
parts = st.lists(st.tuples(st.floats(0, 3), st.floats(-0.5, 5)), min_size=1, max_size=60)
#: Buckets round times to a microsecond, and a float of 1e9 seconds to 0.1 microseconds.
SLACK_S = 3e-6


@given(start=starts, rate=rates, fill_s=fills, steps=parts)
@settings(deadline=None)
def test_no_more_passes_than_burst_and_rate(
    start: float, rate: float, fill_s: float, steps: list[tuple[float, float]]
) -> None:
    burst = rate * fill_s
    bucket = TokenBucket(rate, burst)
    now = start
    passed: list[tuple[float, float]] = []
    for part, pause in steps:
        now = max(start, now + pause * fill_s)  # some go backwards
        wait_s = bucket.take(part * burst, now)
        assert math.isfinite(wait_s)
        assert wait_s >= 0.0
        if not wait_s:
            passed.append((now, part * burst))
    latest = -math.inf
    times = []
    for at, _ in passed:
        latest = max(latest, at)
        times.append(latest)
    for first in range(len(passed)):
        total = 0.0
        for last in range(first, len(passed)):
            amount = passed[last][1]
            total += amount
            time_s = times[last] - times[first] + SLACK_S * (1 + last - first)
            assert total <= (max(burst, amount) + rate * time_s) * (1 + 1e-9)


@given(start=starts, rate=rates, fill_s=fills, steps=parts, part=st.floats(0, 3))
@settings(deadline=None)
def test_a_wait_is_as_long_as_it_must_be(
    start: float, rate: float, fill_s: float, steps: list[tuple[float, float]], part: float
) -> None:
    burst = rate * fill_s
    bucket = TokenBucket(rate, burst)
    now = start
    for taken, pause in steps:
        now = max(start, now + pause * fill_s)
        bucket.take(taken * burst, now)
    wait_s = bucket.wait_s(part * burst, now)
    before = now + 0.9 * wait_s
    if now + wait_s - before > SLACK_S:
        assert bucket.take(part * burst, before) > 0.0
    assert bucket.take(part * burst, now + wait_s) == 0.0


@given(
    start=starts,
    rate=st.integers(1, 100),
    bytes_per_s=st.integers(1, 10_000),
    requests=st.lists(st.tuples(st.integers(0, 1_000), st.floats(0, 0.5)), min_size=1, max_size=60),
)
@settings(deadline=None)
def test_who_waits_as_told_is_never_refused_twice(
    start: float, rate: int, bytes_per_s: int, requests: list[tuple[int, float]]
) -> None:
    limits = replace(UNLIMITED, requests_per_s=rate, bytes_per_s=bytes_per_s, message_bytes=1_000)
    account = Account(limits)
    now = start
    for size_bytes, pause in requests:
        now += pause
        refusal = account.request(size_bytes, 0, now)
        if refusal is not None:
            assert 0.0 < refusal.retry_after_s <= 1_000 / bytes_per_s + 1.0 / rate + SLACK_S
            now += refusal.retry_after_s
            assert account.request(size_bytes, 0, now) is None
    longest_s = max(1_000, bytes_per_s) / bytes_per_s
    total = sum(size_bytes for size_bytes, _ in requests)
    assert total <= bytes_per_s * (now - start + longest_s + SLACK_S * len(requests)) * (1 + 1e-9)
