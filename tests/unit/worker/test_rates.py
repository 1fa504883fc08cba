"""Smoothed figures of an engine's work."""

from __future__ import annotations

import pytest

from tokenmq.worker.rates import MEMORY_S, Rates, Work, rates


def test_nothing_done_is_nothing() -> None:
    assert rates(Work(10.0), 12.0) == Rates()


def test_steady_work_shows_its_rate() -> None:
    work = Work(0.0)
    for tick in range(1, 2001):
        work = work.plus(Work(tick * 0.05, 1, 8, 0.01, 0.03, 20, 5))
    found = rates(work, 100.0)
    assert found.steps_per_s == pytest.approx(20.0, rel=0.02)
    assert found.tokens_per_s == pytest.approx(160.0, rel=0.02)
    assert found.prefill_use == pytest.approx(0.2, rel=0.02)
    assert found.decode_use == pytest.approx(0.6, rel=0.02)
    assert found.prefix_hits == pytest.approx(0.25)


def test_it_fades_but_the_share_of_hits_stays() -> None:
    work = Work(0.0).plus(Work(1.0, 1, 10, 0.5, 0.5, 100, 50))
    soon, late = rates(work, 1.0), rates(work, 1.0 + 5 * MEMORY_S)
    assert 0 < late.tokens_per_s < 0.01 * soon.tokens_per_s
    assert late.prefix_hits == soon.prefix_hits == 0.5


def test_uses_stay_within_the_time() -> None:
    assert rates(Work(0.0).plus(Work(1.0, prefill_s=60.0, decode_s=60.0)), 1.0).prefill_use == 1.0
