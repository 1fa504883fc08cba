"""The example of a policy of one's own, installed as a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster

MakeCluster = Callable[..., LocalCluster]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "policy"


@pytest.mark.slow
def test_an_installed_policy_chooses(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(EXAMPLE, source)  # building leaves files there
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--target", target, source], check=True, timeout=240)
    paths = [str(target), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    cluster = make_cluster("--policy", "long-to-big")
    cluster.start_worker("--engine", "synthetic", "--model", "toy", "--slots", "2", "--worker-name", "small")
    cluster.start_worker("--engine", "synthetic", "--model", "toy", "--slots", "9", "--worker-name", "big")
    cluster.wait_ready("toy", workers=2)
    with Client(cluster.frontend) as client:
        assert client.status()["policy"] == "long-to-big"
        for _ in range(4):
            stream = client.generate("toy", "x" * 10_000, max_tokens=2)
            stream.text()
            assert stream.worker == "big"


def test_an_unknown_policy_is_refused_with_those_that_there_are() -> None:
    command = [sys.executable, "-m", "tokenmq.cli.broker", "--policy", "fifo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "unknown policy 'fifo'; known are least-tokens, lottery, power-of-two" in done.stderr
    assert "Traceback" not in done.stderr
