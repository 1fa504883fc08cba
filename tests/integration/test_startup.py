"""What the commands import: --help next to nothing, and none of them what only some engines need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmq.client.local import LocalCluster

from .conftest import PATIENCE_S

BIN = Path(sys.executable).parent
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "startup.py"
#: Has Python tell on standard error what it imports, as it does it.
TELL = "PYTHONPROFILEIMPORTTIME"
#: Of engines, of asyncio's users, of the look for other packages' entry points.
HEAVY = {
    "torch", "transformers", "tokenizers", "huggingface_hub", "vllm", "aiohttp", "numpy", "PIL", "asyncio", "ssl",
    "importlib.metadata",
}  # fmt: skip
#: Needed to work, and not to tell how.
WORKING = {
    "zmq", "tokenmq.protocol.messages", "tokenmq.broker.server", "tokenmq.worker.server", "tokenmq.cli.supervisor",
    "tokenmq.client.core",
}  # fmt: skip


def imported(told: str) -> set[str]:
    lines = [line for line in told.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def run(command: str, *arguments: str) -> set[str]:
    """Run a command to its good end; return what it imported."""
    done = subprocess.run(
        [BIN / command, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        env={**os.environ, TELL: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return imported(done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("zmq-broker", "--help"),
        ("zmq-worker", "--help"),
        ("zmq-client", "--help"),
        ("zmq-client", "generate", "--help"),
        ("zmq-client", "drain", "--help"),
        ("zmq-worker", "--version"),
    ],
)
def test_help_imports_little(arguments: tuple[str, ...]) -> None:
    modules = run(*arguments)
    assert f"tokenmq.cli.{arguments[0].removeprefix('zmq-')}" in modules
    assert not modules & (HEAVY | WORKING)


def test_who_works_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(TELL, "1")
    with LocalCluster(folder=tmp_path) as cluster:
        worker = cluster.start_worker("--engine", "synthetic", "--model", "toy")
        cluster.wait_ready("toy")
        clients = [
            run("zmq-client", "--broker", cluster.frontend, *words)
            for words in (("models",), ("generate", "toy", "Hello", "--max-tokens", "2"))
        ]
        broker_log, worker_log = cluster.broker.log, worker.log
    found = [imported(broker_log.read_text()), imported(worker_log.read_text()), *clients]
    for modules, own in zip(found, ("broker.core", "worker.core", "client.core", "client.core"), strict=True):
        assert f"tokenmq.{own}" in modules
        assert not modules & HEAVY
    assert "tokenmq.cli.supervisor" not in found[1]


def test_the_benchmark_measures_every_command(tmp_path: Path) -> None:
    file = tmp_path / "startup.json"
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--quick", "--json", file], capture_output=True, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rounds"]
    relays = [row["relay"] for row in rows]
    assert {"python", "import zmq", "broker listens", "worker joins", "client models", "first token"} <= set(relays)
    assert len(relays) == len(set(relays))
    for row in rows:
        assert row["relay"] in done.stdout
        assert all(value > 0 for value in row["figures"].values())


@pytest.mark.parametrize("marker", ["", "never said"])
def test_the_benchmark_takes_no_time_of_what_failed(marker: str) -> None:
    launch = [sys.executable, "-I", "-S", str(BENCHMARK.with_name("launch.py"))]
    done = subprocess.run(
        [*launch, marker, sys.executable, "-c", "raise SystemExit('no')"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "no\n")
