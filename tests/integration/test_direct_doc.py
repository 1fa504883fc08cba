"""What docs/direct.md shows, run as it stands there; only the ports differ, by the environment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmq.client import Client
from tokenmq.client.local import free_ports

from .conftest import PATIENCE_S, eventually, worker_names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "direct.md").read_text()
[CONSOLE] = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
[PROGRAM] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BROKER, WORKER, ASK = (line.removeprefix("$ ") for line in CONSOLE.splitlines())


class Shell:
    """Runs the page's lines with bash."""

    def __init__(self) -> None:
        self.frontend, self.backend = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TOKENMQ_BROKER_FRONTEND": self.frontend,
            "TOKENMQ_BROKER_BACKEND": self.backend,
            "TOKENMQ_WORKER_BROKER": self.backend,
            "TOKENMQ_CLIENT_BROKER": self.frontend,
        }
        self.servers: list[subprocess.Popen[bytes]] = []

    def serve(self, line: str) -> None:
        self.servers.append(
            subprocess.Popen(["bash", "-c", f"exec {line}"], env=self.environment, stderr=subprocess.DEVNULL)
        )

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def shell() -> Iterator[Shell]:
    made = Shell()
    try:
        made.serve(BROKER)
        made.serve(WORKER)
        with Client(made.frontend, connect_timeout_s=PATIENCE_S) as client:
            eventually(lambda: worker_names(client), "the worker is ready")
        yield made
    finally:
        for server in reversed(made.servers):
            server.send_signal(signal.SIGTERM)
        for server in made.servers:
            server.wait(PATIENCE_S)


def test_the_commands_and_the_program_do_what_the_page_says(shell: Shell) -> None:
    assert len(shell.run("bash", "-c", ASK).split()) == 16
    lines = shell.run(sys.executable, "-c", PROGRAM.replace("tcp://127.0.0.1:5555", shell.frontend)).splitlines()
    assert len(lines) == 3
    assert lines[-1] == "2 direct: True messages through the broker: 0"
