"""Meters: what passes, what waits and for how long, and who is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from tokenmq.broker.limits import UNLIMITED, Limits
from tokenmq.broker.meters import Account, Refusals, Strays, TokenBucket, WorkerAccount

KIB = 1024
MIB = 1024 * KIB


def test_a_burst_passes_and_then_the_rate() -> None:
    bucket = TokenBucket(10, 5)
    assert [bucket.take(1, 100.0) for _ in range(5)] == [0.0] * 5
    assert bucket.take(1, 100.0) == pytest.approx(0.1)
    assert bucket.take(1, 100.1) == 0.0
    assert bucket.take(2, 100.1) == pytest.approx(0.2)


def test_a_quiet_peer_gains_no_more_than_the_burst() -> None:
    bucket = TokenBucket(10, 5)
    bucket.take(5, 0.0)
    assert bucket.take(5, 1e6) == 0.0
    assert bucket.take(1, 1e6) > 0.0


def test_what_is_larger_than_the_burst_waits_for_all_of_it_and_is_paid_for() -> None:
    bucket = TokenBucket(10, 5)
    assert bucket.take(20, 0.0) == 0.0
    assert bucket.take(1, 0.0) == pytest.approx(1.6)  # 15 owed, and 1
    assert bucket.take(20, 0.0) == pytest.approx(2.0)
    assert bucket.take(20, 2.0) == 0.0


def test_a_clock_that_is_set_back_gives_nothing_and_breaks_nothing() -> None:
    bucket = TokenBucket(10, 5)
    bucket.take(5, 10.0)
    assert bucket.take(1, 9.0) == pytest.approx(1.1)
    assert bucket.take(1, 10.1) == 0.0


def test_no_rate_is_no_limit() -> None:
    bucket = TokenBucket(0, 1)
    assert not any(bucket.take(1e12, now) for now in (5.0, 5.0, 4.0, 6.0))
    assert bucket.wait_s(1e12, 5.0) == 0.0


def test_looking_takes_nothing_and_taking_can_be_undone() -> None:
    bucket = TokenBucket(1, 2)
    assert bucket.wait_s(2, 0.0) == 0.0
    assert bucket.take(2, 0.0) == 0.0
    assert bucket.wait_s(2, 0.0) == bucket.take(2, 0.0) == pytest.approx(2.0)
    bucket.give_back(2)
    assert bucket.take(2, 0.0) == 0.0


@pytest.mark.parametrize("rate", [-1, math.nan, math.inf])
def test_a_rate_must_make_sense(rate: float) -> None:
    with pytest.raises(ValueError, match="a rate must be 0 or more"):
        TokenBucket(rate, 1)


@pytest.mark.parametrize("burst", [0, -1, math.nan, math.inf])
def test_a_burst_must_make_sense(burst: float) -> None:
    with pytest.raises(ValueError, match="a burst must be more than 0"):
        TokenBucket(1, burst)


def test_requests_a_second() -> None:
    account = Account(Limits(requests_per_s=10))
    assert [account.request(100, 0, 0.0) for _ in range(10)] == [None] * 10
    refusal = account.request(100, 0, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(0.1)
    assert refusal.why == "more than 10 requests a second"
    assert account.request(100, 0, refusal.retry_after_s) is None


def test_bytes_a_second() -> None:
    account = Account(Limits(bytes_per_s=MIB, message_bytes=2 * MIB))
    assert account.request(2 * MIB, 0, 0.0) is None  # one whole request at least
    refusal = account.request(MIB, 0, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(1.0)
    assert refusal.why == f"more than {MIB} bytes of requests a second"
    assert account.request(MIB, 0, 1.0) is None


def test_a_refused_request_uses_nothing_up() -> None:
    account = Account(Limits(requests_per_s=2, bytes_per_s=100, message_bytes=100))
    assert account.request(60, 0, 0.0) is None
    assert account.request(60, 0, 0.0) is not None  # there are requests left, and too few bytes
    assert account.request(40, 0, 0.0) is None
    assert account.request(50, 0, 0.4) is not None  # neither
    assert account.request(50, 0, 0.5) is None


def test_the_longer_wait_is_told() -> None:
    account = Account(Limits(requests_per_s=10, bytes_per_s=100, message_bytes=100))
    for _ in range(10):
        assert account.request(10, 0, 0.0) is None
    refusal = account.request(100, 0, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(1.0)
    assert account.request(100, 0, 1.0) is None


def test_open_requests() -> None:
    account = Account(Limits(open_requests=3))
    assert account.request(1, 2, 0.0) is None
    refusal = account.request(1, 3, 0.0)
    assert refusal is not None
    assert refusal.retry_after_s > 0
    assert refusal.why == "more than 3 requests open at a time"


def test_questions() -> None:
    account = Account(Limits(queries_per_s=10))
    assert [account.query(0.0) for _ in range(50)] == [None] * 50
    refusal = account.query(0.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(0.1)
    assert refusal.why == "more than 10 questions a second"


def lasts(use: Callable[[], bool]) -> int:
    for number in range(1_000_000):
        if not use():
            return number
    raise AssertionError("no limit")


def test_messages_refusals_and_strays_are_cut_off_in_the_end() -> None:
    limits = Limits(messages_per_s=100, refusals_per_s=20, worker_messages_per_s=300, stray_chunks_per_s=40)
    client, worker = Account(limits), WorkerAccount(limits)
    refusals, strays = Refusals(limits), Strays(limits)
    assert lasts(lambda: client.control(0.0)) == 100
    assert lasts(lambda: refusals.take(0.0)) == 200
    assert lasts(lambda: worker.message(0.0)) == 300
    assert lasts(lambda: strays.take(0.0)) == 400
    assert client.control(0.1)
    assert refusals.take(0.1)
    assert worker.message(0.1)
    assert strays.take(0.1)


def test_large_refusals_count_more() -> None:
    refusals = Refusals(Limits())
    assert lasts(lambda: refusals.take(0.0, 64 * MIB)) == 7
    assert lasts(lambda: refusals.take(0.0)) < 2_000


def test_no_message_costs_more_than_all_that_may_come_at_once() -> None:
    refusals = Refusals(Limits(refusals_per_s=1))
    assert refusals.take(0.0, 1 << 40)
    assert not refusals.take(0.0)
    assert refusals.take(10.0, 1 << 40)


def test_without_limits_everything_passes() -> None:
    client, worker = Account(UNLIMITED), WorkerAccount(UNLIMITED)
    refusals, strays = Refusals(UNLIMITED), Strays(UNLIMITED)
    for _ in range(1_000):
        assert client.request(MIB, 1_000_000, 0.0) is None
        assert client.query(0.0) is None
        assert client.control(0.0)
        assert refusals.take(0.0, MIB)
        assert worker.message(0.0)
        assert strays.take(0.0)


def test_a_rate_of_one_lets_one_pass() -> None:
    account = Account(replace(UNLIMITED, requests_per_s=1))
    assert account.request(1, 0, 0.0) is None
    assert account.request(1, 0, 0.5) is not None
    assert account.request(1, 0, 1.0) is None
