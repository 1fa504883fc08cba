"""SupervisorCore: who is started, told to end, killed, and when nothing is tried again."""

from __future__ import annotations

import math
from signal import SIGINT, SIGKILL, SIGTERM

import pytest

from tokenmq.cli.supervisor import (
    HEALTHY_S,
    KILL_AFTER_S,
    MOST_RESTART_S,
    RESTART_S,
    Action,
    Ended,
    Finish,
    Kill,
    Seat,
    Signalled,
    Spawn,
    SupervisorCore,
    Terminate,
)
from tokenmq.protocol.log import Log
from tokenmq.worker.events import EXIT_CANNOT_START, EXIT_FAILED

GRACE_S = 5.0


class Story:
    """Tells a core what happens, checks it after each event, and gives back what it orders, without log lines."""

    def __init__(self, workers: int = 2, size: int = 1) -> None:
        self.core = SupervisorCore([f"w{number}" for number in range(workers)], GRACE_S, size)
        self.now = 50.0
        self.logs: list[Log] = []
        assert self._filed(self.core.start(self.now)) == [Spawn(number) for number in range(workers)]

    def ends(self, worker: int, exit_code: int, rank: int = 0) -> list[Action]:
        return self._filed(self.core.handle(Ended(Seat(worker, rank), exit_code), self.now))

    def signal(self, number: int = SIGTERM) -> list[Action]:
        return self._filed(self.core.handle(Signalled(number), self.now))

    def after(self, seconds: float) -> list[Action]:
        self.now += seconds
        return self._filed(self.core.tick(self.now))

    def pause(self) -> float:
        return self.core.next_deadline() - self.now

    def _filed(self, actions: list[Action]) -> list[Action]:
        self.core.validate()
        self.logs += [action for action in actions if isinstance(action, Log)]
        return [action for action in actions if not isinstance(action, Log)]


def test_a_worker_that_is_killed_comes_back_and_the_other_does_not_notice() -> None:
    story = Story()
    assert story.ends(1, -SIGKILL) == []
    assert story.pause() == RESTART_S
    assert story.after(RESTART_S / 2) == []
    assert story.after(RESTART_S / 2) == [Spawn(1)]
    assert story.core.next_deadline() == math.inf


def test_pauses_double_up_to_the_longest_and_a_long_life_begins_anew() -> None:
    story = Story()
    pauses = []
    for _ in range(8):
        story.ends(0, EXIT_FAILED)
        pauses.append(story.pause())
        assert story.after(pauses[-1]) == [Spawn(0)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, MOST_RESTART_S, MOST_RESTART_S]
    story.after(HEALTHY_S)
    story.ends(0, EXIT_FAILED)
    assert story.pause() == RESTART_S
    story.after(RESTART_S)
    story.ends(0, EXIT_FAILED)
    assert story.pause() == 2 * RESTART_S


def test_one_that_has_drained_stays_away_and_the_last_one_ends_all() -> None:
    story = Story()
    assert story.ends(0, 0) == []
    assert story.core.next_deadline() == math.inf
    assert story.ends(1, 0) == [Finish(0)]


def test_a_command_that_is_wrong_for_every_worker_is_not_tried_again() -> None:
    story = Story()
    assert story.ends(0, EXIT_CANNOT_START) == []
    assert story.ends(1, EXIT_CANNOT_START) == [Finish(EXIT_CANNOT_START)]


def test_a_worker_that_tries_again_meanwhile_is_ended_with_the_command() -> None:
    story = Story()
    story.ends(0, EXIT_CANNOT_START)
    assert story.after(RESTART_S) == [Spawn(0)]
    assert story.ends(1, EXIT_CANNOT_START) == [Terminate(Seat(0))]
    assert story.ends(0, -SIGTERM) == [Finish(EXIT_CANNOT_START)]


@pytest.mark.parametrize("first", [EXIT_FAILED, -SIGKILL])
def test_a_worker_that_cannot_start_is_tried_again_where_any_ever_could(first: int) -> None:
    story = Story()
    story.ends(0, first)
    assert story.ends(1, EXIT_CANNOT_START) == []
    assert story.after(RESTART_S) == [Spawn(0), Spawn(1)]
    story.ends(0, EXIT_CANNOT_START)
    story.ends(1, EXIT_CANNOT_START)
    assert story.after(2 * RESTART_S) == [Spawn(0), Spawn(1)]


def test_a_signal_drains_what_runs_and_starts_nothing_any_more() -> None:
    story = Story(3)
    story.ends(2, EXIT_FAILED)
    assert story.signal(SIGINT) == [Terminate(Seat(0)), Terminate(Seat(1))]
    assert story.after(RESTART_S) == []
    assert story.ends(0, 0) == []
    assert story.ends(1, -SIGTERM) == [Finish(0)]  # it had not learnt yet to drain


def test_a_worker_that_fails_in_the_drain_shows_in_the_exit_code() -> None:
    story = Story()
    story.signal()
    story.ends(0, EXIT_FAILED)
    assert story.ends(1, 0) == [Finish(EXIT_FAILED)]


def test_the_second_signal_kills() -> None:
    story = Story()
    story.signal()
    story.ends(1, 0)
    assert story.signal(SIGINT) == [Kill(Seat(0))]
    assert story.ends(0, -SIGKILL) == [Finish(128 + SIGINT)]


def test_who_does_not_end_is_killed() -> None:
    story = Story()
    story.signal()
    story.ends(1, 0)
    assert story.pause() == GRACE_S + KILL_AFTER_S
    assert story.after(GRACE_S + KILL_AFTER_S - 0.1) == []
    assert story.after(0.1) == [Kill(Seat(0))]
    assert story.core.next_deadline() == math.inf
    assert story.ends(0, -SIGKILL) == [Finish(EXIT_FAILED)]
    assert [log.fields["workers"] for log in story.logs if log.event == "workers_killed"] == ["w0"]


def test_a_signal_while_all_wait_ends_at_once() -> None:
    story = Story(1)
    story.ends(0, EXIT_FAILED)
    assert story.signal() == [Finish(0)]


# --- teams ----------------------------------------------------------------------------------------------------------


def test_a_team_ends_with_its_first_member_and_comes_back_when_the_last_has_gone() -> None:
    story = Story(2, size=3)
    assert story.ends(0, -SIGKILL, rank=1) == [Kill(Seat(0, 0)), Kill(Seat(0, 2))]
    assert story.ends(0, -SIGKILL, rank=0) == []
    assert story.core.next_deadline() == math.inf
    assert story.ends(0, -SIGKILL, rank=2) == []
    assert story.after(RESTART_S) == [Spawn(0)]


def test_a_team_is_drained_through_its_leader_and_followers_may_go_first() -> None:
    story = Story(1, size=2)
    assert story.signal() == [Terminate(Seat(0))]
    assert story.ends(0, 0, rank=1) == []
    assert story.ends(0, 0, rank=0) == [Finish(0)]


def test_followers_of_a_leader_that_has_drained_are_killed_and_nobody_minds() -> None:
    story = Story(1, size=2)
    assert story.ends(0, 0, rank=0) == [Kill(Seat(0, 1))]
    assert story.ends(0, -SIGKILL, rank=1) == [Finish(0)]


def test_a_model_that_no_member_can_load_is_a_wrong_command() -> None:
    story = Story(1, size=2)
    assert story.ends(0, EXIT_CANNOT_START, rank=1) == [Kill(Seat(0, 0))]
    assert story.ends(0, -SIGKILL, rank=0) == [Finish(EXIT_CANNOT_START)]


def test_the_log_tells_of_each_end_whose_it_was_and_when_it_comes_back() -> None:
    story = Story()
    story.now += 2.0
    story.ends(0, -SIGKILL)
    assert story.logs[-1].fields == {"worker": "w0", "exit_code": -9, "lived_s": 2.0, "restart_in_s": RESTART_S}
