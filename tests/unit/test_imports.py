"""The pure parts work where zmq cannot be imported, and the light parts load nothing heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

PURE = (
    "tokenmq.protocol.codec",
    "tokenmq.protocol.payload",
    "tokenmq.protocol.liveness",
    "tokenmq.protocol.credit",
    "tokenmq.broker.core",
    "tokenmq.broker.doorman",
    "tokenmq.broker.meters",
    "tokenmq.transport.visitors",
    "tokenmq.worker.core",
    "tokenmq.cli.supervisor",
    "tokenmq.client.core",
)


def loaded_after(statement: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; print(' '.join(sys.modules))"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", PURE)
def test_cores_need_no_zmq(module: str) -> None:
    modules = loaded_after(f"sys.modules['zmq'] = None; import {module}").split()
    assert module in modules


@pytest.mark.parametrize("module", ["tokenmq.client", "tokenmq.broker.server", "tokenmq.worker.server"])
def test_libraries_load_nothing_heavy(module: str) -> None:
    modules = loaded_after(f"import {module}").split()
    assert module in modules
    assert not {"torch", "transformers", "numpy", "asyncio"} & set(modules)
