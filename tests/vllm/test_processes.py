"""Workers with vLLM that are killed, ended, or lose vLLM's core: what readers are told, and that nothing is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tokenmq.client import CannotResumeError, Client, TokenmqError
from tokenmq.client.local import LocalCluster

from .conftest import MODEL, PATIENCE_S, START_S, eventually

pytestmark = pytest.mark.timeout(2 * START_S + 2 * PATIENCE_S)


@pytest.fixture
def own_cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        yield made


def family(worker: Any) -> list[psutil.Process]:
    """The processes below a worker; vLLM's core and at least one of its workers are among them."""
    found = psutil.Process(worker.pid).children(recursive=True)
    assert sum("VLLM" in " ".join(process.cmdline()) for process in found) >= 2
    return found


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_sigkill_of_a_worker(own_cluster: LocalCluster, start_worker: Callable[..., Any]) -> None:
    for _ in range(2):
        start_worker(own_cluster)
    own_cluster.wait_ready(MODEL, workers=2, timeout_s=START_S)
    with Client(own_cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="The sea is", max_tokens=900, ignore_eos=True)
        chunks = iter(stream)
        next(chunks)
        (busy,) = [row["name"] for row in client.workers() if row["in_flight"]]
        (victim,) = [worker for worker in own_cluster.workers if worker.name == busy]
        children = family(victim)
        victim.kill()
        # The tokens that were read are not those of another stream: the reader is told.
        with pytest.raises(CannotResumeError):
            for _ in chunks:
                pass
        eventually(lambda: all_gone(children), "vLLM's processes end with the worker")
        after = client.generate(MODEL, prompt="The sea is", max_tokens=4, ignore_eos=True)
        assert sum(len(chunk.token_ids) for chunk in after) == 4
        assert after.worker != victim.name


def test_sigterm_lets_a_stream_end_and_leaves_nothing(
    own_cluster: LocalCluster, start_worker: Callable[..., Any]
) -> None:
    worker = start_worker(own_cluster, "--grace", str(PATIENCE_S))
    own_cluster.wait_ready(MODEL, timeout_s=START_S)
    children = family(worker)
    with Client(own_cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="The sea is", max_tokens=40, ignore_eos=True)
        chunks = iter(stream)
        next(chunks)
        # A terminal's Ctrl-C reaches vLLM's processes, too: they must let the stream end as well.
        for process in children:
            process.send_signal(signal.SIGINT)
        worker.send_signal(signal.SIGTERM)
        assert sum(len(chunk.token_ids) for chunk in chunks) == 39
        assert stream.finish_reason == "length"
    assert worker.wait(PATIENCE_S) == 0
    eventually(lambda: all_gone(children), "vLLM's processes end with the worker")


def test_the_end_of_vllms_core_ends_the_worker(own_cluster: LocalCluster, start_worker: Callable[..., Any]) -> None:
    worker = start_worker(own_cluster)
    own_cluster.wait_ready(MODEL, timeout_s=START_S)
    children = family(worker)
    (core,) = [process for process in children if "VLLM::EngineCore" in " ".join(process.cmdline())]
    told: list[TokenmqError] = []
    with Client(own_cluster.frontend, recovery_timeout_s=5.0) as client:
        stream = client.generate(MODEL, prompt="The sea is", max_tokens=900, ignore_eos=True)
        chunks = iter(stream)
        next(chunks)

        def read() -> None:
            try:
                for _ in chunks:
                    pass
            except TokenmqError as error:
                told.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        core.kill()
        reader.join(PATIENCE_S)
        assert not reader.is_alive()
    assert told
    assert worker.wait(PATIENCE_S) == 1
    assert "vLLM's engine core has ended" in worker.log.read_text()
    eventually(lambda: all_gone(children), "vLLM's other processes end, too")
