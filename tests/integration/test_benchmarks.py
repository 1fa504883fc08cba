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


def test_every_kind_of_scale_is_measured(tmp_path: Path) -> None:
    growth = {"cpu_us_per_token", "cpu_us_above_idle"}
    paced = TOKENS | TIMES | {"of_the_plan"}
    cases = {
        "held-20000": paced,
        "held-8000": paced,
        "kept-512": paced,
        "memory-shared": {"kb_per_stream", "kb_that_stay", "kb_more_again", "megabytes_before", "megabytes"},
        "idle-10": SHARES,
        "streams-100": paced | growth,
        "workers-100": paced | growth,
        "clients-1": {"process_megabytes", "kb_each", "cpu_share_each", "broker_cpu_share_each"},
        "worker": {"process_megabytes", "cpu_share_each", "broker_cpu_share_each"},
    }
    path = tmp_path / "rows.json"
    done = run("scale.py", "--quick", "--relays", "zmq-broker", "bare", "--cases", *cases, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = json.loads(path.read_text())["rounds"]
    ours = {row["case"]: row["figures"] for row in rows if row["relay"] == "zmq-broker"}
    assert {case: set(figures) for case, figures in ours.items()} == cases
    # Sessions, connections and requests are the broker's alone.
    assert {row["case"] for row in rows if row["relay"] == "bare"} == {
        case for case, figures in cases.items() if "p99_ms" in figures
    }
    assert all(figures["p50_ms"] <= figures["max_ms"] for figures in ours.values() if "p50_ms" in figures)
    assert "memory-shared: kb_per_stream: asked for below 4 KiB, measured " in done.stdout
    # Of what growth is measured against, one half is not here.
    assert "cpu_us_above_idle against" not in done.stdout


def test_what_curve_costs_is_measured_by_thread(tmp_path: Path) -> None:
    used = {"per_s", "cpu_us_each", "loop_us_each", "io_us_each"}
    waits = {"p50_ms", "p99_ms"}
    cases = {"flat": used, "flat-16": used, "paced": used | waits, "requests": used, "connect": used | waits}
    path = tmp_path / "rows.json"
    done = run("curve.py", "--quick", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = json.loads(path.read_text())["rounds"]
    assert {(row["case"], row["relay"]) for row in rows} == {
        (case, how) for case in cases for how in ("plain", "curve")
    }
    for row in rows:
        figures = row["figures"]
        assert set(figures) == cases[row["case"]]
        assert all(figure > 0 for figure in figures.values()), row
        assert figures["cpu_us_each"] == pytest.approx(figures["loop_us_each"] + figures["io_us_each"])


@pytest.mark.parametrize(
    ("kind", "sends"),
    [("requests", True), ("unread", True), ("strays", True), ("noise", True), ("greets", True), ("half", False)],
)
def test_a_flood_and_what_others_notice_of_it(kind: str, sends: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run("flood.py", "--quick", "--cases", kind, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = {row["relay"]: row["figures"] for row in json.loads(path.read_text())["rounds"]}
    assert set(rows) == {"quiet", "neighbour", "flooded"}
    for how, figures in rows.items():
        assert 0 < figures["p50_ms"] <= figures["p99_ms"] <= figures["max_ms"]
        assert 0 < figures["request_p50_ms"] <= figures["request_p99_ms"]
        assert figures["peak_mib"] > 0
        if how != "quiet":
            assert figures["flood_connections_per_s"] > 0
            assert (figures["flood_messages_per_s"] > 0) is sends


def test_more_connections_than_files_may_be_open_are_not_tried() -> None:
    script = f"ulimit -n 150 && exec {sys.executable} {BENCHMARKS / 'scale.py'} --quick --cases held-8000 idle-1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-8000: skipped: needs 188 open files, the hard limit is 150 (ulimit -Hn)" in done.stdout
    assert "held-8000: c-proxy" not in done.stdout
    assert "idle-1: zmq-broker: relay_cpu_share" in done.stdout


@pytest.mark.parametrize(
    ("script", "option", "word", "told"),
    [
        ("relay.py", "--rounds", "0", "expected an integer above 0, got '0'"),
        ("request_rate.py", "--seconds", "nan", "expected a number above 0, got 'nan'"),
        ("latency.py", "--relays", "nobody", "invalid choice: 'nobody'"),
        ("scale.py", "--cases", "held-9", "invalid choice: 'held-9'"),
        ("relay.py", "--json", "/nowhere/rows.json", "--json: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused(script: str, option: str, word: str, told: str) -> None:
    done = run(script, option, word)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
