"""SupervisorCore: which processes are to run, without I/O: events in, actions out.

It knows no process, no signal handler and no clock; who runs it (`cli/processes.py`) does. The rules:

- A team is a broker, or a worker: one process, or several that compute one model together (tensor parallel), of which
  rank 0 is what brokers know and the others follow it. They live and die together: when one fails, the others are
  killed, and when the last has ended the whole team is started again.
- A team that ends with 0 has drained or was removed: it is not started again. Any other end is followed by a
  restart, at first after RESTART_S, then after twice the last pause up to MOST_RESTART_S; behind a life of HEALTHY_S
  or more the pauses begin anew.
- Where every team has said that it cannot start, and none has ever come further, the command is wrong, and nothing
  is tried again.
- The first signal asks every team to drain; what is not over some time behind the grace time is killed. The second
  one kills at once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from signal import SIGTERM
from typing import Any, TypeAlias

from ..protocol.log import Log
from ..protocol.orders import Orders
from ..worker.events import EXIT_CANNOT_START, EXIT_FAILED

#: The first pause: a worker that was killed comes back nearly at once, and one that cannot run costs little.
RESTART_S = 1.0
#: The longest pause: what has been repaired is noticed within a minute.
MOST_RESTART_S = 60.0
#: A life as long as this was no failed start, even of a model that takes minutes to load.
HEALTHY_S = 300.0
#: Time beyond the grace time to close what is open; a worker itself waits 2 s for its engine.
KILL_AFTER_S = 10.0


@dataclass(frozen=True, slots=True)
class Seat:
    """A place for one process: the team's number, and its rank in the team."""

    team: int
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """Event: the process in this seat has ended, with this code; a negative one is the signal that killed it."""

    seat: Seat
    exit_code: int


@dataclass(frozen=True, slots=True)
class Signalled:
    """Event: the supervisor was sent SIGINT or SIGTERM."""

    number: int


@dataclass(frozen=True, slots=True)
class Spawn:
    """Action: start all processes of a team; none of it is alive."""

    team: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """Action: send the process in this seat SIGTERM: it is to drain."""

    seat: Seat


@dataclass(frozen=True, slots=True)
class Kill:
    """Action: send the process in this seat SIGKILL."""

    seat: Seat


@dataclass(frozen=True, slots=True)
class Finish:
    """Action, the last one: no process is left; exit with this code."""

    exit_code: int


Event: TypeAlias = Ended | Signalled
Action: TypeAlias = Spawn | Terminate | Kill | Finish | Log


@dataclass(slots=True)
class _Team:
    """One team.

    Attributes:
        alive: ranks whose process runs.
        exit_code: how the present life ended; None while it has not.
        restart_at: when it is started again; None while it lives, or where it is not.
        pause_s: the pause before the next restart.
        lives: how many have ended.
    """

    name: str
    size: int
    alive: set[int] = field(default_factory=set)
    since: float = 0.0
    exit_code: int | None = None
    restart_at: float | None = None
    pause_s: float = RESTART_S
    lives: int = 0


class SupervisorCore:
    """The supervisor's state machine; one call of `start`, `handle` or `tick` at a time."""

    def __init__(self, names: Sequence[str], grace_s: float, size: int = 1, *, kind: str = "worker") -> None:
        """Make a supervisor that has started nothing yet.

        Args:
            names: the teams' names.
            grace_s: seconds that a team takes to drain at most.
            size: processes of each team.
            kind: what a team is called in the log.
        """
        self._kind = kind
        self._teams = [_Team(name, size) for name in names]
        self._grace_s = grace_s
        self._orders: Orders[Spawn | Terminate | Kill | Finish] = Orders()
        #: When what is left is killed; None while nothing is to end.
        self._kill_at: float | None = None
        self._exit_code = 0
        #: One team at least has come further than to find that it cannot start.
        self._proven = False
        self._finished = False

    def start(self, now: float) -> list[Action]:
        """Start every team. Call it once."""
        names = [team.name for team in self._teams]
        self._log("supervisor_started", names)
        for number in range(len(self._teams)):
            self._spawn(number, now)
        return self._orders.take()

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; return what is to be done, in order."""
        if isinstance(event, Ended):
            self._on_ended(event.seat, event.exit_code, now)
        elif not self._finished:
            self._on_signalled(event.number, now)
        return self._done()

    def tick(self, now: float) -> list[Action]:
        """Do what is due; return what is to be done, in order. Call it at `next_deadline`, or any time before."""
        for number, team in enumerate(self._teams):
            if team.restart_at is not None and now >= team.restart_at:
                self._spawn(number, now)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = math.inf
            self._exit_code = self._exit_code or EXIT_FAILED
            left = [team.name for team in self._teams if team.alive]
            self._log(f"{self._kind}s_killed", left, level=logging.ERROR, reason="they do not end")
            self._kill_all()
        return self._done()

    def next_deadline(self) -> float:
        """Return the next time at which `tick` has something to do; infinity for none."""
        if self._finished:
            return math.inf
        restarts = [team.restart_at for team in self._teams if team.restart_at is not None]
        return min([*restarts, math.inf if self._kill_at is None else self._kill_at])

    def validate(self) -> None:
        """Check every invariant that holds between two events.

        Raises:
            AssertionError: one does not; its argument is what is at fault.
        """
        for team in self._teams:
            assert team.alive <= set(range(team.size)), team
            assert team.restart_at is None or not team.alive, team
            assert self._kill_at is None or team.restart_at is None, team
            assert RESTART_S <= team.pause_s <= MOST_RESTART_S, team
            assert not (self._finished and team.alive), team

    # --- the teams' ends --------------------------------------------------------------------------------------------

    def _on_ended(self, seat: Seat, exit_code: int, now: float) -> None:
        team = self._teams[seat.team]
        team.alive.discard(seat.rank)
        # A follower ends with 0 when its leader has told it to, and the leader then has an end of its own.
        if team.exit_code is None and (seat.rank == 0 or exit_code != 0):
            team.exit_code = exit_code
            if team.alive and exit_code != 0:
                self._log_end("rank_ended", team, exit_code, rank=seat.rank)
            self._kill(seat.team)
        if not team.alive:
            self._on_life_over(team, now)

    def _on_life_over(self, team: _Team, now: float) -> None:
        code, lived_s = team.exit_code or 0, now - team.since
        team.lives += 1
        self._proven |= code != EXIT_CANNOT_START
        if self._kill_at is not None:
            # -SIGTERM: it was asked to drain before it could do so.
            self._exit_code = self._exit_code or (0 if code in (0, -SIGTERM) else EXIT_FAILED)
            self._log_end("ended", team, code, lived_s=lived_s)
        elif code == 0:
            self._log_end("ended", team, code, lived_s=lived_s)
        elif not self._proven and all(other.lives for other in self._teams):
            self._log_end("ended", team, code, lived_s=lived_s)
            self._exit_code = code
            self._end_all(now)
        else:
            self._restart_later(team, code, lived_s, now)

    def _restart_later(self, team: _Team, code: int, lived_s: float, now: float) -> None:
        pause_s = RESTART_S if lived_s >= HEALTHY_S else team.pause_s
        team.restart_at = now + pause_s
        team.pause_s = min(2 * pause_s, MOST_RESTART_S)
        self._log_end("ended", team, code, lived_s=lived_s, restart_in_s=pause_s)

    def _log(self, event: str, names: Sequence[str], *, level: int = logging.INFO, **fields: Any) -> None:
        told: dict[str, Any] = {f"{self._kind}s": ",".join(names), **fields}
        self._orders.log(event, level=level, **told)

    def _log_end(self, event: str, team: _Team, code: int, **fields: Any) -> None:
        level = logging.INFO if code in (0, -SIGTERM) else logging.ERROR
        told: dict[str, Any] = {self._kind: team.name, "exit_code": code, **fields}
        self._orders.log(f"{self._kind}_{event}", level=level, **told)

    def _spawn(self, number: int, now: float) -> None:
        team = self._teams[number]
        team.alive = set(range(team.size))
        team.since, team.exit_code, team.restart_at = now, None, None
        self._orders.add(Spawn(number))

    # --- the end ----------------------------------------------------------------------------------------------------

    def _on_signalled(self, number: int, now: float) -> None:
        if self._kill_at is None:
            running = [team.name for team in self._teams if team.alive]
            self._log("supervisor_draining", running, grace_s=self._grace_s)
            self._end_all(now)
        else:
            self._exit_code = 128 + number
            self._kill_all()

    def _end_all(self, now: float) -> None:
        """Ask each team to drain, and start none any more."""
        self._kill_at = now + self._grace_s + KILL_AFTER_S
        for number, team in enumerate(self._teams):
            team.restart_at = None
            # Followers end with their leader, which needs them until then.
            if 0 in team.alive and team.exit_code is None:
                self._orders.add(Terminate(Seat(number)))

    def _kill_all(self) -> None:
        for number in range(len(self._teams)):
            self._kill(number)

    def _kill(self, number: int) -> None:
        for rank in sorted(self._teams[number].alive):
            self._orders.add(Kill(Seat(number, rank)))

    def _done(self) -> list[Action]:
        """End with the last process, and hand out the actions."""
        if not self._finished and not any(team.alive or team.restart_at is not None for team in self._teams):
            self._finished = True
            self._orders.log("supervisor_stopped", exit_code=self._exit_code)
            self._orders.add(Finish(self._exit_code))
        return self._orders.take()
