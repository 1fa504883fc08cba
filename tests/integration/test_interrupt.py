"""Ctrl-C while a command starts: it ends soon, and never with a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tokenmq.client.local import free_ports

from .conftest import PATIENCE_S

COMMANDS = ("broker", "worker", "client")
#: After so many seconds of a command's start; together they cover it on machines of any speed.
DELAYS_S = (0.0, 0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.18, 0.25, 0.4)
#: Killed by the signal, ended by the command as Ctrl-C, drained.
ENDS = (-signal.SIGINT, 128 + signal.SIGINT, 0)
#: As the installed script, but tells when `module` is about to be imported, and does something then.
SCRIPT = """
import os, signal, sys
from tokenmq.cli.start import {command}

def look(event, arguments):
    if event == "import" and arguments[0] == "{module}":
        print("here", flush=True)
        {do}

sys.addaudithook(look)
sys.exit({command}())
"""


def arguments(command: str) -> list[str]:
    """A command that goes on until it is interrupted: nobody is there to talk to."""
    frontend, backend = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    return {
        "broker": ["--frontend", frontend, "--backend", backend],
        "worker": ["--engine", "synthetic", "--model", "toy", "--broker", backend],
        "client": ["--broker", frontend, "--connect-timeout", str(PATIENCE_S), "models"],
    }[command]


def start(command: str, module: str = "", do: str = "pass", before: str = "") -> subprocess.Popen[str]:
    """Start it, and wait until it imports the module; without one, what the entry module imports first."""
    script = before + SCRIPT.format(command=command, module=module or f"tokenmq.cli.{command}", do=do)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments(command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "here\n"
    return process


def end(process: subprocess.Popen[str]) -> str:
    """Wait for its end; return what it said."""
    try:
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_whenever_it_comes(command: str) -> None:
    for delay_s in DELAYS_S:
        process = start(command)
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        said = end(process)
        assert "Traceback" not in said, (delay_s, said)
        assert process.returncode in ENDS, (delay_s, said)


@pytest.mark.parametrize("module", ["click", "logging", "msgpack", "zmq", "zmq.backend.cython._zmq"])
@pytest.mark.parametrize("command", COMMANDS)
def test_while_a_module_is_imported(command: str, module: str) -> None:
    process = start(command, module, "os.kill(os.getpid(), signal.SIGINT)")
    assert end(process) == ""
    assert process.returncode == -signal.SIGINT


def test_where_it_is_ignored_it_stays_so() -> None:
    """Background jobs of scripts are started so."""
    process = start("client", before="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert end(process) == ""
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("command", COMMANDS)
def test_the_installed_commands_begin_there(command: str) -> None:
    script = (Path(sys.executable).parent / f"zmq-{command}").read_text()
    assert f"from tokenmq.cli.start import {command}" in script
