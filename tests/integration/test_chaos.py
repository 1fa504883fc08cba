"""A short chaos run with a fixed seed: real processes are killed, frozen, drained and cut off; no reader notices."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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
