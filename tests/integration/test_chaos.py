"""A short chaos run with a fixed seed: real processes are killed, frozen, drained and cut off; no reader notices."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

CHAOS = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
#: The run bounds each of its phases itself; this is for a run that breaks that promise.
PATIENCE_S = 240.0
SHORT = (
    "--seconds", "15", "--kill-every", "0.6", "--streams", "40", "--clients", "2", "--expiry", "1", "--seed", "11",
)  # fmt: skip


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHAOS), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it ends its own processes then
        output, _ = process.communicate(timeout=PATIENCE_S / 4)
        pytest.fail(f"no end after {PATIENCE_S} s:\n{output}")
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.mark.slow
def test_kill_anything_lose_nothing(tmp_path: Path) -> None:
    done = run(*SHORT, "--folder", str(tmp_path), "--json", str(tmp_path / "report.json"))
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert set(report["findings"].values()) == {0}, done.stdout
    assert report["details"] == []
    assert done.returncode == 0
    # That it was not for want of faults: processes died under streams, and these went on.
    faults = report["faults"]
    assert faults["worker killed"] >= 1
    assert faults["broker killed"] >= 1
    assert sum(faults.values()) >= 10
    assert report["resumes"] > 20
    assert report["streams"]["read"] > 40
    assert report["tokens"] > 4_000
    kinds = {gap["kind"] for gap in report["gaps"]}
    assert {"worker killed", "broker killed"} <= kinds


def test_options_that_make_no_sense_are_refused() -> None:
    done = run("--brokers", "0")
    assert done.returncode == 2
    assert "--brokers: expected 1 or more" in done.stdout


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, socket.socket, socket.socket]]:
    """A network, one link of it, and the two ends of a connection through it."""
    monkeypatch.syspath_prepend(str(CHAOS.parent))
    with ExitStack() as parts:
        network = import_module("chaos_links").Network()
        parts.callback(network.close)
        listener = parts.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.settimeout(PATIENCE_S)
        link = network.link("here>there", f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        address = ("127.0.0.1", int(link.endpoint.rpartition(":")[2]))
        near = parts.enter_context(socket.create_connection(address, timeout=PATIENCE_S))
        far = parts.enter_context(listener.accept()[0])
        far.settimeout(PATIENCE_S)
        yield network, link, near, far


def test_a_link_that_is_held_passes_everything_later(ends: tuple[Any, Any, socket.socket, socket.socket]) -> None:
    network, link, near, far = ends
    near.sendall(b"one")
    assert far.recv(10) == b"one"
    far.sendall(b"two")
    assert near.recv(10) == b"two"
    network.tell(link.hold)
    near.sendall(b"three")
    far.settimeout(0.2)
    with pytest.raises(TimeoutError):
        far.recv(10)
    far.settimeout(PATIENCE_S)
    network.tell(link.release)
    assert far.recv(10) == b"three"


def test_a_link_that_is_held_hides_the_end_and_a_cut_shows_it(
    ends: tuple[Any, Any, socket.socket, socket.socket],
) -> None:
    network, link, near, far = ends
    network.tell(link.hold)
    far.close()
    near.settimeout(0.2)
    with pytest.raises(TimeoutError):
        near.recv(10)
    near.settimeout(PATIENCE_S)
    network.tell(link.cut)
    assert is_over(near)


def is_over(end: socket.socket) -> bool:
    try:
        return end.recv(10) == b""
    except ConnectionResetError:
        return True
