"""The package as others install it: a wheel with every part, which serves without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from tokenmq.client import Client
from tokenmq.client.local import LocalCluster
with LocalCluster() as cluster:
    cluster.start_worker("--engine", "synthetic", "--model", "toy")
    cluster.wait_ready("toy")
    with Client(cluster.frontend) as client:
        print(len(client.generate("toy", prompt="Hello", max_tokens=8).text().split()))
"""


@pytest.mark.slow
def test_a_plain_installation_has_every_part_and_serves(tmp_path: Path) -> None:
    source = tmp_path / "source"
    # A copy: building in place would leave a folder `build`, whose old files go into the next wheel.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], check=True, timeout=240)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = ("broker", "cli", "client", "protocol", "transport", "worker")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert files
    assert {f"tokenmq/{path.relative_to(ROOT)}" for path in files} == {name for name in names if name.endswith(".py")}
    assert "tokenmq/protocol/SPEC.md" in names
    assert all(f"tokenmq/{folder}/py.typed" in names for folder in folders)
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    subprocess.run(
        [home / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install",
         "--constraint", ROOT / "constraints.txt", wheel],
        check=True, timeout=240,
    )  # fmt: skip
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [home / "bin/python", "-c", PROGRAM], cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "8"), done.stderr
    listed = subprocess.run([home / "bin/python", "-m", "pip", "list"], capture_output=True, text=True, check=True)
    assert "torch" not in listed.stdout
    for command in ("zmq-broker", "zmq-worker", "zmq-client"):
        subprocess.run([home / f"bin/{command}", "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
