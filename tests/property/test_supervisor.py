"""SupervisorCore against a model of processes: any schedule of ends, signals and waiting."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
ENDS = st.sampled_from([0, EXIT_FAILED, EXIT_CANNOT_START, -9, -15])


class Processes(RuleBasedStateMachine):
    """What the operating system would show."""

    @initialize(workers=st.integers(1, 3), size=st.integers(1, 3))
    def begin(self, workers: int, size: int) -> None:
        self.size = size
        self.now = 0.0
        self.alive: set[Seat] = set()
        self.killed: set[Seat] = set()
        self.drained: set[int] = set()
        self.asked: set[Seat] = set()
        self.since: dict[int, float] = {}
        self.down_at: dict[int, float] = {}
        self.pauses: dict[int, float] = {}
        self.signals = 0
        self.finished: int | None = None
        self.core = SupervisorCore([f"w{number}" for number in range(workers)], GRACE_S, size)
        self._perform(self.core.start(self.now))

    def _perform(self, actions: list[Action]) -> None:
        self.core.validate()
        for action in actions:
            assert self.finished is None, "nothing follows Finish"
            if isinstance(action, Spawn):
                self._spawned(action.team)
            elif isinstance(action, Terminate):
                assert action.seat in self.alive
                assert action.seat not in self.asked, "a second SIGTERM would end its drain"
                self.asked.add(action.seat)
            elif isinstance(action, Kill):
                assert action.seat in self.alive
                self.killed.add(action.seat)
            elif isinstance(action, Finish):
                assert not self.alive, "no process may be left behind"
                self.finished = action.exit_code
            else:
                assert isinstance(action, Log)

    def _spawned(self, worker: int) -> None:
        seats = {Seat(worker, rank) for rank in range(self.size)}
        assert not seats & self.alive, "one process a seat"
        assert worker not in self.drained, "who has drained stays away"
        assert not self.signals, "nothing is started after a signal"
        self.alive |= seats
        if worker in self.down_at:
            pause_s, last = self.now - self.down_at[worker], self.pauses.get(worker, 0.0)
            lived_s = self.down_at[worker] - self.since[worker]
            assert pause_s >= (RESTART_S if lived_s >= HEALTHY_S else max(last, RESTART_S)) - 1e-6
            # The test ticks at deadlines only, so that the pause is the core's.
            assert pause_s <= MOST_RESTART_S + 1e-6
            self.pauses[worker] = pause_s
        self.since[worker] = self.now

    @precondition(lambda self: self.finished is None and self.alive)
    @rule(data=st.data(), code=ENDS)
    def a_process_ends(self, data: st.DataObject, code: int) -> None:
        seat = data.draw(st.sampled_from(sorted(self.alive, key=lambda seat: (seat.team, seat.rank))))
        if seat.rank and code == 0 and seat not in self.killed:
            return  # a follower ends well only when its leader does
        self._end(seat, -9 if seat in self.killed else code)

    def _end(self, seat: Seat, code: int) -> None:
        self.alive.discard(seat)
        self.killed.discard(seat)
        self.asked.discard(seat)
        others = any(other.team == seat.team for other in self.alive)
        if not others:
            self.down_at[seat.team] = self.now
        if seat.rank == 0 and code == 0 and seat.team not in self.failed():
            self.drained.add(seat.team)
        self._perform(self.core.handle(Ended(seat, code), self.now))

    def failed(self) -> set[int]:
        """Workers of which a member is being killed: their life has ended otherwise."""
        return {seat.team for seat in self.killed}

    @precondition(lambda self: self.finished is None)
    @rule(number=st.sampled_from([2, 15]))
    def a_signal(self, number: int) -> None:
        self.signals += 1
        self._perform(self.core.handle(Signalled(number), self.now))
        assert self.signals < 2 or self.finished is not None or self.killed == self.alive

    @precondition(lambda self: self.finished is None)
    @rule(seconds=st.sampled_from([0.5, 3.0, HEALTHY_S]))
    def time_passes(self, seconds: float) -> None:
        until = self.now + seconds
        while self.finished is None and (due := self.core.next_deadline()) <= until:
            self.now = max(self.now, due)
            self._perform(self.core.tick(self.now))
        if self.finished is None:
            self.now = until
            self._perform(self.core.tick(self.now))

    @precondition(lambda self: self.finished is not None)
    @rule()
    def nothing_follows_the_end(self) -> None:
        assert self.core.tick(self.now) == []
        assert self.core.handle(Signalled(15), self.now) == []

    @invariant()
    def a_supervisor_that_is_told_to_end_does(self) -> None:
        if not getattr(self, "signals", 0) or self.finished is not None:
            return
        assert self.alive
        assert self.core.next_deadline() <= self.now + GRACE_S + KILL_AFTER_S or self.killed == self.alive

    def teardown(self) -> None:
        """Whatever came before: after a signal, with processes that only SIGKILL ends, it comes to its end."""
        if getattr(self, "finished", 0) is not None:
            return
        if not self.signals:
            self.a_signal(15)
        self.time_passes(GRACE_S + KILL_AFTER_S)
        while self.alive:
            assert self.killed == self.alive
            self._end(min(self.alive, key=lambda seat: (seat.team, seat.rank)), -9)
        assert self.finished is not None
        assert self.core.next_deadline() == math.inf


TestProcesses = Processes.TestCase
TestProcesses.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
