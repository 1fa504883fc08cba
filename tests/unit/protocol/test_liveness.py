"""Heartbeat bookkeeping: times are given, nothing waits."""

from __future__ import annotations

import pytest

from tokenmq.protocol.liveness import EXPIRY_S, HEARTBEAT_S, MAX_HEARTBEAT_S, Liveness, negotiate


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(heartbeat_s=1.0, expiry_s=5.0, heard_at=100.0, spoke_at=100.0)


def test_a_heartbeat_is_due_after_the_interval_of_own_silence(liveness: Liveness) -> None:
    assert not liveness.due(100.999)
    assert liveness.due(101.0)
    liveness.spoke(101.0)
    assert not liveness.due(101.5)
    liveness.heard(101.9)
    assert liveness.due(102.0)


def test_silence_expires(liveness: Liveness) -> None:
    assert not liveness.expired(104.999)
    assert liveness.expired(105.0)


def test_any_message_is_a_sign_of_life(liveness: Liveness) -> None:
    liveness.heard(104.5)
    assert not liveness.expired(109.0)
    assert liveness.expired(109.5)


def test_speaking_does_not_prolong_the_others_life(liveness: Liveness) -> None:
    liveness.spoke(104.9)
    assert liveness.expired(105.0)


def test_time_in_which_nobody_listened_is_forgiven(liveness: Liveness) -> None:
    liveness.forgive(10.0)
    assert not liveness.expired(114.0)
    assert liveness.expired(115.0)


def test_next_deadline_is_the_earlier_of_heartbeat_and_expiry(liveness: Liveness) -> None:
    assert liveness.next_deadline() == 101.0
    liveness.spoke(104.5)
    assert liveness.next_deadline() == 105.0
    liveness.heard(104.5)
    assert liveness.next_deadline() == 105.5


@pytest.mark.parametrize("offset", [0.0, 0.4, 1.7])
def test_nothing_changes_before_the_next_deadline(liveness: Liveness, offset: float) -> None:
    liveness.heard(100.0 + offset)
    before = liveness.next_deadline() - 1e-6
    assert not liveness.due(before)
    assert not liveness.expired(before)
    assert liveness.due(liveness.next_deadline()) or liveness.expired(liveness.next_deadline())


@pytest.mark.parametrize(
    ("wish_s", "heartbeat_s", "expiry_s"),
    [
        (None, 1.0, 5.0),
        (1.0, 1.0, 5.0),
        (0.1, 1.0, 5.0),
        (10.0, 10.0, 50.0),
        (MAX_HEARTBEAT_S, 60.0, 300.0),
        (3600.0, 60.0, 300.0),
    ],
)
def test_a_peer_may_slow_the_heartbeat_down_never_up(
    wish_s: float | None, heartbeat_s: float, expiry_s: float
) -> None:
    assert negotiate(HEARTBEAT_S, EXPIRY_S, wish_s) == (heartbeat_s, expiry_s)


def test_a_broker_slower_than_the_most_a_peer_may_wish_keeps_its_own() -> None:
    assert negotiate(90.0, 180.0, 70.0) == (90.0, 180.0)
