"""How a stream may end in a world, and why: whatever is not justified here is a violation.

Tokens and text are checked as they arrive (`client.py`); here it is about the one end of each stream.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tokenmq.client.events import Ending
from tokenmq.client.exchange import DEADLINE_SLACK_S
from tokenmq.client.recovery import pause_s

from .client import Reading, SimClient
from .layout import paths

if TYPE_CHECKING:
    from .world import World

#: What a further attempt may repair; a stream ends so only where there is to be no further one.
REPAIRABLE = {
    "worker_lost",
    "broker_lost",
    "draining",
    "no_worker",
    "busy",
    "engine_failed",
    "out_of_memory",
    "first_token_timeout",
    "inter_token_timeout",
}
_MS = 0.001


def check_ends(world: World) -> None:
    """Check that each stream of a client that lives has ended, and had good reason to end as it did.

    Raises:
        AssertionError: one has not; the message tells which.
    """
    for client in world.clients:
        for key, reading in client.readings.items():
            if reading.outcome is not None:
                assert _justified(world, client, reading), (key.hex(), reading.outcome, reading.attempts)
                _check_in_time(client, reading)
                _check_names(world, reading)
                if world.kind.name == "calm":
                    _check_undisturbed(reading)


def _check_in_time(client: SimClient, reading: Reading) -> None:
    deadline_s = reading.wish.deadline_s
    if deadline_s is not None and not client.was_paused:
        late_s = reading.ended_at - reading.submitted_at - deadline_s
        assert late_s <= DEADLINE_SLACK_S + _MS, f"ended {late_s:.3f} s after its deadline"


def _check_names(world: World, reading: Reading) -> None:
    """Who had an attempt is called by where it stands, seen from the broker that was asked."""
    for attempt in reading.attempts:
        assert not attempt.worker or attempt.worker in paths(world, attempt.broker), f"a stranger: {attempt}"
    if isinstance(reading.outcome, Ending) and reading.outcome.worker:
        broker = reading.attempts[-1].broker
        assert paths(world, broker).get(reading.outcome.worker) is False, f"not a worker: {reading.outcome.worker}"


def _check_undisturbed(reading: Reading) -> None:
    """Where nothing goes wrong, an attempt fails only for want of a worker, or when links and engines are slow."""
    codes = {attempt.error.code for attempt in reading.attempts if attempt.error is not None}
    allowed = {"busy", "no_worker", "deadline", "first_token_timeout", "inter_token_timeout"}
    assert codes <= allowed, f"disturbed by nobody: {codes - allowed}"


def _justified(world: World, client: SimClient, reading: Reading) -> bool:
    outcome, wish, settings = reading.outcome, reading.wish, client.settings
    if outcome is None or isinstance(outcome, Ending):
        return True  # whole, or cancelled by its reader: checked when it ended
    code = outcome.code
    lasted_s = reading.ended_at - reading.submitted_at
    left_s = math.inf if wish.deadline_s is None else wish.deadline_s - lasted_s
    if code == "client_closed":
        return reading.closed
    if code == "deadline":
        return left_s <= _MS
    if code == "model_not_found":
        # A broker older than its expiry, that has seen no worker, cannot know that there will be one.
        return any(broker.was_blind for broker in world.brokers.values())
    pause = pause_s(_barren(reading), outcome.retry_after_s, lambda: 1.0)
    lost_s = reading.ended_at - reading.held_at
    lost = len(reading.attempts) > 1 and lost_s + pause >= settings.recovery_timeout_s - _MS
    alone = reading.lonely_s >= 0.0 and (lost or reading.lonely_s >= settings.connect_timeout_s - _MS)
    if alone and code in ("no_broker", "draining"):
        return True  # there is no broker, or one that takes nothing more
    if code == "queue_timeout":
        return settings.queue_timeout_s is not None and lasted_s >= settings.queue_timeout_s - _MS
    if code == "cannot_resume":
        return reading.tokens > 0 and not all(worker.resumes for worker in world.workers)
    if code == "reader_timeout":
        stopped = reading.reads_at is not None and wish.pause_s > world.reader_timeout_s
        return stopped or not (world.kind.sure or world.reader_timeout_s > 60.0)
    if code in REPAIRABLE:
        # The next attempt would come after a pause; one behind the deadline is none.
        return not wish.resume or len(reading.attempts) >= settings.max_attempts or left_s <= pause or lost
    return False


def _barren(reading: Reading) -> int:
    """Return how many of the last attempts have brought no token."""
    return sum(attempt.first_token == reading.tokens for attempt in reading.attempts)
