"""What a user sees when something around the commands fails: one line on standard error, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tokenmq.client.local import LocalCluster, LocalClusterError

from .conftest import PATIENCE_S

CLIENT = str(Path(sys.executable).parent / "zmq-client")
WORKER = str(Path(sys.executable).parent / "zmq-worker")
MODEL = "toy"


def start(cluster: LocalCluster, *arguments: str, **places: int) -> subprocess.Popen[str]:
    """Start zmq-client and wait for its first character of output."""
    variables = {**os.environ, "TOKENMQ_CLIENT_BROKER": cluster.frontend}
    return subprocess.Popen(
        [CLIENT, *arguments], text=True, env=variables,
        # What a shell has put into the background ignores Ctrl-C, and so does all that it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **places},
    )  # fmt: skip


@pytest.fixture
def cluster(make_cluster: Callable[..., LocalCluster]) -> LocalCluster:
    made = make_cluster()
    made.start_worker("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", "50")
    made.wait_ready(MODEL)
    return made


@pytest.mark.parametrize(("options", "code"), [((), "no_broker"), (("--no-resume",), "broker_lost")])
def test_a_broker_that_dies_in_mid_stream_is_one_line(
    cluster: LocalCluster, options: tuple[str, ...], code: str
) -> None:
    process = start(cluster, "--recovery-timeout", "1", "generate", MODEL, "x", "--max-tokens", "10000", *options)
    assert process.stdout is not None
    assert process.stdout.read(1)
    cluster.broker.kill()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert len(errors.splitlines()) == 1, errors
    assert f"({code})" in errors


def test_ctrl_c_leaves_whole_lines_of_json(cluster: LocalCluster) -> None:
    process = start(cluster, "generate", MODEL, "x", "--max-tokens", "10000", "--json")
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert not errors.strip()
    assert all(line.endswith("}") for line in output.splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize("arguments", [("models",), ("status",), ("generate", MODEL, "x", "--max-tokens", "3")])
def test_a_full_disk_is_one_line(cluster: LocalCluster, arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = start(cluster, *arguments, stdout=full.fileno())
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert errors == "error: cannot read or write: No space left on device\n"


def test_json_by_an_environment_variable(cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMQ_CLIENT_JSON", "1")
    output, _ = start(cluster, "models").communicate(timeout=PATIENCE_S)
    assert output.startswith('{"name": "toy"')


def test_a_broker_that_does_not_start_is_not_waited_for() -> None:
    started = time.monotonic()
    with LocalCluster("--policy", "nonesuch") as cluster, pytest.raises(LocalClusterError, match="nonesuch"):
        cluster.wait_ready(MODEL, timeout_s=PATIENCE_S * 10)
    assert time.monotonic() - started < PATIENCE_S


def test_an_empty_model_is_one_clear_line() -> None:
    done = subprocess.run(
        [WORKER, "--engine", "synthetic", "--model", ""], capture_output=True, text=True, timeout=PATIENCE_S,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: --model: it must not be empty\n")
