"""The traffic benchmarks run, with every relay that this machine has, and write what they have measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are held to cores")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PATIENCE_S = 120.0
HAS_NATS = shutil.which("nats-server", path="/usr/bin:/usr/local/bin:/usr/sbin:/usr/local/sbin") is not None
RELAYS = {"c-proxy", "bare", "zmq-broker"} | ({"nats"} if HAS_NATS else set())
SHARES = {"relay_cpu_share", "ends_cpu_share"}
TOKENS = {"tokens_per_s", "messages_per_s", "cpu_s_per_million_tokens"} | SHARES
REQUESTS = {"requests_per_s", "cpu_us_per_request"} | SHARES
TIMES = {"p50_ms", "p90_ms", "p99_ms", "p999_ms", "max_ms"}


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize(
    ("script", "cases"),
    [
        ("relay.py", {"flat-16": TOKENS, "paced-32": TOKENS | TIMES}),
        ("request_rate.py", {"with-finish": REQUESTS}),
        ("latency.py", {"spread-8": TOKENS | TIMES, "ttft": REQUESTS | TIMES}),
    ],
)
def test_every_relay_does_every_case(script: str, cases: dict[str, set[str]], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run(script, "--quick", "--cases", *cases, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["benchmark"] == script.removesuffix(".py")
    rows = report["rounds"]
    assert {(row["relay"], row["case"]) for row in rows} == {(relay, case) for relay in RELAYS for case in cases}
    for row in rows:
        assert set(row["figures"]) == cases[row["case"]]
        assert all(figure > 0 for figure in row["figures"].values()), row
    joined = [row["figures"] for row in rows if (row["relay"], row["case"]) == ("zmq-broker", "flat-16")]
    assert all(figures["tokens_per_s"] == pytest.approx(16 * figures["messages_per_s"]) for figures in joined)
    assert ("nats: skipped: " in done.stdout) is not HAS_NATS
    assert "in brackets the ratio to bare" in done.stdout


@pytest.mark.parametrize(
    ("script", "option", "word", "told"),
    [
        ("relay.py", "--rounds", "0", "expected an integer above 0, got '0'"),
        ("request_rate.py", "--seconds", "nan", "expected a number above 0, got 'nan'"),
        ("latency.py", "--relays", "nobody", "invalid choice: 'nobody'"),
        ("relay.py", "--json", "/nowhere/rows.json", "--json: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused(script: str, option: str, word: str, told: str) -> None:
    done = run(script, option, word)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
