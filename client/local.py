"""Brokers and workers as processes of this machine: for a notebook, a script, a test.

    with LocalCluster() as cluster:
        cluster.start_worker("--model", "toy", "--engine", "synthetic")
        cluster.wait_ready("toy")
        with Client(cluster.frontend) as client:
            print(client.generate("toy", prompt="Hello", max_tokens=8).text())

The processes are the commands zmq-broker and zmq-worker, with the options that these take.

Keys in the environment are those of another cluster: this one leaves them out, unless its brokers are given --curve.
A Client takes them, so where there are any, one for this cluster needs `server_key=""` and `key=""`.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..protocol.errors import TokenmqError
from .sync import Client

#: A worker may have to convert and load a model first.
READY_TIMEOUT_S = 300.0
#: What a process gets to end by itself after SIGTERM, before SIGKILL.
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 1.0
_LOG_TAIL_LINES = 20
_PORTS = range(20_000, 32_000)
#: Where the commands and clients find keys that no option names.
_KEY_VARIABLES = frozenset(
    ["TOKENMQ_BROKER_CURVE", "TOKENMQ_BROKER_UPLINK_KEY", "TOKENMQ_BROKER_UPLINK_SERVER_KEYS"]
    + [f"TOKENMQ_{part}_{key}" for part in ("CLIENT", "WORKER") for key in ("KEY", "SERVER_KEY")]
)


class LocalClusterError(RuntimeError):
    """A process of the cluster did not do what it should; the message holds the end of its log."""


class LocalProcess:
    """One command of the cluster.

    Attributes:
        name: what it is called here; the name of its log file too.
        log: where its standard error goes.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the command; None as its environment stands for ours at each start."""
        self.name = name
        self.log = log
        self._environment = environment
        self._command = list(command)
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as sink:
            # In a session of its own: Ctrl-C is for the program that started it, and that ends it in order.
            self._process = subprocess.Popen(  # noqa: S603 (our own commands, no shell)
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env=self._environment,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs. Negative: the signal that killed it."""
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal: SIGSTOP, SIGCONT, SIGTERM ..."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it with SIGKILL and wait for its end."""
        self._process.kill()
        self._process.wait()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end; return the exit code.

        Raises:
            LocalClusterError: it still runs after the timeout.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LocalClusterError(f"{self.name} still runs after {timeout_s} s\n{self.log_tail()}") from None

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """End it with SIGTERM, after the timeout with SIGKILL; return the exit code."""
        self.terminate()
        return self.finish(timeout_s)

    def terminate(self) -> None:
        """Send SIGTERM, if it still runs; do it once, since a second one ends it without a drain."""
        if self.exit_code is None:
            self.send_signal(signal.SIGTERM)
            self.send_signal(signal.SIGCONT)  # a stopped process would not see it

    def finish(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for its end, after the timeout with SIGKILL; return the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        return self._process.wait()

    def restart(self) -> None:
        """Start the same command again, after it has ended."""
        if self.exit_code is None:
            raise LocalClusterError(f"{self.name} still runs")
        self._start()

    def log_tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  {self.name}: {line}" for line in lines[-_LOG_TAIL_LINES:])


class LocalCluster:
    """One broker or several, and the workers that are started with `start_worker`.

    Attributes:
        brokers: the brokers' processes. One that was killed and is started again has the same ports.
        frontends: their endpoints for clients, in the same order.
        backends: their endpoints for workers.
        workers: the workers' processes, in the order of their start.
        folder: where the logs are.
    """

    def __init__(self, *broker_options: str, brokers: int = 1, folder: Path | None = None) -> None:
        """Start the brokers on free ports of the loopback interface.

        Args:
            broker_options: options of zmq-broker, for each broker.
            brokers: how many.
            folder: for the logs; by default a temporary one, gone with the cluster.

        Raises:
            ValueError: `brokers` is less than 1.
        """
        if brokers < 1:
            raise ValueError(f"brokers: expected 1 or more, got {brokers}")
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="tokenmq-")
        self.folder = folder or Path(self._temporary.name if self._temporary else "")
        endpoints = [f"tcp://127.0.0.1:{port}" for port in free_ports(2 * brokers)]
        self.frontends = tuple(endpoints[::2])
        self.backends = tuple(endpoints[1::2])
        self.workers: list[LocalProcess] = []
        self._keyed = any(option == "--curve" or option.startswith("--curve=") for option in broker_options)
        self.brokers = [self._start_broker(number, *broker_options) for number in range(brokers)]

    def _start_broker(self, number: int, *options: str) -> LocalProcess:
        name = "broker" if len(self.frontends) == 1 else f"broker-{number + 1}"
        own = ("--name", name, "--frontend", self.frontends[number], "--backend", self.backends[number])
        return self._process(name, _command("broker", *own, *options))

    @property
    def broker(self) -> LocalProcess:
        """The first broker's process."""
        return self.brokers[0]

    @property
    def frontend(self) -> str:
        """The first broker's endpoint for clients."""
        return self.frontends[0]

    @property
    def backend(self) -> str:
        """The first broker's endpoint for workers."""
        return self.backends[0]

    def start_worker(self, *options: str) -> LocalProcess:
        """Start a worker of all brokers; does not wait until it is ready.

        Args:
            options: options of zmq-worker. With --broker among them it knows these endpoints only.
        """
        name = f"worker-{len(self.workers) + 1}"
        known = [] if "--worker-name" in options else ["--worker-name", name]
        if "--broker" not in options:
            known += [part for endpoint in self.backends for part in ("--broker", endpoint)]
        self.workers.append(self._process(name, _command("worker", *known, *options)))
        return self.workers[-1]

    def _process(self, name: str, command: Sequence[str]) -> LocalProcess:
        kept = None if self._keyed else {each: os.environ[each] for each in os.environ if each not in _KEY_VARIABLES}
        return LocalProcess(name, command, self.folder / f"{name}.log", kept)

    def wait_ready(self, model: str, workers: int = 1, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until each broker has so many workers of the model that are ready.

        Raises:
            LocalClusterError: the timeout passed, or a process ended meanwhile.
        """
        end = time.monotonic() + timeout_s
        for frontend in self.frontends:
            # Asked anew each second, so that a broker that has died is not waited for.
            connect_timeout_s = min(timeout_s, _CONNECT_TIMEOUT_S)
            keys = None if self._keyed else ""  # None: from the environment
            with Client(frontend, connect_timeout_s=connect_timeout_s, server_key=keys, key=keys) as client:
                while self._ready(client, model) < workers:
                    self._check(f"waiting for {workers} workers of {model}", timeout_s, end)
                    time.sleep(_POLL_S)

    def _check(self, what: str, timeout_s: float, end: float) -> None:
        processes = (*self.brokers, *self.workers)
        dead = [process for process in processes if process.exit_code is not None]
        if dead or time.monotonic() > end:
            why = f"{dead[0].name} has ended" if dead else f"not ready after {timeout_s} s"
            tails = "\n".join(process.log_tail() for process in dead or processes)
            raise LocalClusterError(f"{what}: {why}\n{tails}")

    @staticmethod
    def _ready(client: Client, model: str) -> int:
        try:
            rows: list[dict[str, Any]] = client.models()
        except TokenmqError as error:
            if error.retryable or error.code == "no_broker":
                return 0
            raise
        return sum(row["ready"] for row in rows if row["name"] == model)

    def close(self) -> None:
        """End all processes, workers first."""
        for process in (*self.workers, *self.brokers):
            process.terminate()
        for process in (*self.workers, *self.brokers):
            process.finish()
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> LocalCluster:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on at the moment."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Return so many different TCP ports of the loopback interface that nobody listens on at the moment.

    They lie below those that systems give to outgoing connections. Else one of these could take a broker's port while
    it is down, or a peer that tries to connect to it could reach itself.

    Raises:
        LocalClusterError: not so many are free.
    """
    ports: list[int] = []
    for port in random.sample(_PORTS, len(_PORTS)):
        if len(ports) == count:
            return ports
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    raise LocalClusterError(f"no {count} free TCP ports in {_PORTS.start} to {_PORTS.stop - 1}")


def _command(part: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"tokenmq.cli.{part}", *options]
