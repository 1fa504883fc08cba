"""The processes of a supervisor: it starts and signals them as `supervisor.py` says, and tells how they end.

Each process gets

- a session of its own: Ctrl-C in a terminal goes to all processes of the terminal's group, and is the supervisor's to
  hand on: a worker that is only starting would end with a traceback, and a follower under its leader's feet;
- the end of a pipe as standard input. Nothing is ever written to it; when it closes, the supervisor has died, however
  that came, and the process ends at once (`lifecycle.end_with_supervisor`). So none is left behind.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..protocol.log import Log, write
from ..worker.events import EXIT_FAILED
from .supervisor import Action, Ended, Kill, Seat, Signalled, Spawn, SupervisorCore, Terminate

LOGGER = logging.getLogger("tokenmq.supervisor")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: The longest sleep, where nothing is due; a signal ends it.
_LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one broker or worker.

    Attributes:
        name: the broker's or worker's.
        command: what each of them is started with.
        environments: for each of them, by rank, what its environment has beyond this process's.
        shown: what the log tells of it, beside its name and the processes' ids.
    """

    name: str
    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    shown: Mapping[str, str]


class Supervisor:
    """Runs teams until all have ended; to be used once, in the main thread, where signals are handled."""

    def __init__(self, teams: Sequence[Team], grace_s: float, *, kind: str = "worker") -> None:
        """Take the teams, all of one size and of the kind that the log calls them; `run` starts them."""
        self._teams = teams
        self._kind = kind
        self._core = SupervisorCore([team.name for team in teams], grace_s, len(teams[0].environments), kind=kind)
        self._processes: dict[Seat, subprocess.Popen[bytes]] = {}
        self._exit_code: int | None = None
        self._alive, self._lifeline = os.pipe()

    def run(self) -> int:
        """Start the teams, and keep them running until a signal comes or there is none to run any more.

        Returns:
            The exit code: 0 when all have drained, 128 and the signal's number after a second signal.
        """
        woken, wake = os.pipe()
        os.set_blocking(woken, False)
        os.set_blocking(wake, False)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the number itself comes through the pipe
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._perform(self._core.start(time.monotonic()))
        while self._exit_code is None:
            sleep_s = min(_LONGEST_S, max(0.0, self._core.next_deadline() - time.monotonic()))
            ready, _, _ = select.select([woken], [], [], sleep_s)
            for byte in os.read(woken, 4096) if ready else b"":
                if byte in _SIGNALS:
                    self._perform(self._core.handle(Signalled(byte), time.monotonic()))
            self._look()
            self._perform(self._core.tick(time.monotonic()))
        return self._exit_code

    def _look(self) -> None:
        """Tell the core which processes have ended."""
        for seat, process in list(self._processes.items()):
            if process.poll() is not None:
                del self._processes[seat]
                self._perform(self._core.handle(Ended(seat, process.returncode), time.monotonic()))

    def _perform(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Spawn):
                self._spawn(action.team)
            elif isinstance(action, Terminate):
                self._processes[action.seat].terminate()
            elif isinstance(action, Kill):
                if action.seat in self._processes:  # not where it could not be started
                    self._processes[action.seat].kill()
            elif isinstance(action, Log):
                write(LOGGER, action)
            else:
                self._exit_code = action.exit_code

    def _spawn(self, number: int) -> None:
        """Start a team's processes; one that cannot be started has ended."""
        team = self._teams[number]
        size = len(team.environments)
        try:
            shared = {} if size == 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            for rank, own in enumerate(team.environments):
                process = subprocess.Popen(  # noqa: S603 (our own command, no shell)
                    team.command, env={**os.environ, **own, **shared}, stdin=self._alive, start_new_session=True
                )
                self._processes[Seat(number, rank)] = process
                fields = {self._kind: team.name, **team.shown, "pid": process.pid}
                write(LOGGER, Log(f"{self._kind}_started", fields if size == 1 else {**fields, "rank": rank}))
        except OSError as error:  # such as no memory for another process
            fields = {self._kind: team.name, "error": error.strerror}
            write(LOGGER, Log(f"{self._kind}_not_started", fields, level=logging.ERROR))
            missing = [Seat(number, rank) for rank in range(size) if Seat(number, rank) not in self._processes]
            for seat in missing:
                self._perform(self._core.handle(Ended(seat, EXIT_FAILED), time.monotonic()))


def _free_port() -> int:
    """Return a port of the loopback interface where a worker's processes can meet."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
