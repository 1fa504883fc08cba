"""The vllm engine where vLLM is not installed, and the parts of it that need none; the rest is in tests/vllm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from tokenmq.cli.worker import main
from tokenmq.worker.engines.vllm import lifeline

WAIT_S = 60.0
#: A child that waits for its parent's end, or, without the variable, for its own input.
FAMILY = """
import multiprocessing, sys, time
from tokenmq.worker.engines.vllm import lifeline

def child(ready):
    lifeline.end_with_parent()
    lifeline.end_with_parent()
    ready.set()
    time.sleep(120)

if __name__ == "__main__":
    if "armed" in sys.argv:
        lifeline.arm()
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=child, args=(ready,))
    process.start()
    ready.wait()
    print(process.pid, flush=True)
    time.sleep(120)
"""


def test_without_vllm_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    result = CliRunner().invoke(main, ["--engine", "vllm", "--model", "x"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: engine 'vllm' needs vllm, which is not installed: pip install \"tokenmq[vllm]\"\n"
    )


def test_engine_options_are_for_vllm_only() -> None:
    result = CliRunner().invoke(main, ["--engine", "synthetic", "--model", "x", "--engine-option", "a=1"])
    assert result.exit_code == 2
    assert result.stderr == "error: --engine-option: it is for the engine vllm, not for synthetic\n"


def exists(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:  # nobody may be there to reap it
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("armed", [True, False])
def test_a_child_ends_with_a_parent_that_is_killed(armed: bool, tmp_path: os.PathLike[str]) -> None:
    program = os.path.join(tmp_path, "family.py")
    with open(program, "w", encoding="utf-8") as file:
        file.write(FAMILY)
    parent = subprocess.Popen([sys.executable, program, *(["armed"] if armed else [])], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    if armed:
        end = time.monotonic() + WAIT_S
        while exists(child) and time.monotonic() < end:
            time.sleep(0.01)
        assert not exists(child)
    else:
        # It is left alone, as long as anything can be seen: the plugin is there for other people's vLLM, too.
        assert exists(child)
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("chosen", "then"), [(None, None), ("", "tokenmq"), ("mine", "mine,tokenmq"), ("tokenmq,x", "tokenmq,x")]
)
def test_a_choice_of_plugins_gets_ours(chosen: str | None, then: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lifeline.VARIABLE, "")
    if chosen is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    lifeline.arm()
    assert os.environ.get("VLLM_PLUGINS") == then
    assert os.environ[lifeline.VARIABLE] == "1"
