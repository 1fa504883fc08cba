"""A broker that is held to one core sees to it that its threads do not take it from one another."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="schedulers are the system's own")


@pytest.mark.parametrize("alone", [True, False])
def test_the_threads_of_a_broker_on_one_core_do_not_interrupt_it(tmp_path: Path, alone: bool) -> None:
    before = os.sched_getaffinity(0)
    if len(before) == 1 and not alone:
        pytest.skip("this machine has one core")
    try:
        if alone:
            os.sched_setaffinity(0, {min(before)})
        cluster = LocalCluster(folder=tmp_path)
    finally:
        os.sched_setaffinity(0, before)
    with cluster:
        cluster.start_worker("--engine", "synthetic", "--model", "m")
        with Client(cluster.frontend) as client:
            assert len(client.generate("m", prompt="x", max_tokens=5).text()) > 0
        threads = [int(thread) for thread in os.listdir(f"/proc/{cluster.broker.pid}/task")]
        policies = {os.sched_getscheduler(thread) for thread in threads}
        assert policies == {os.SCHED_BATCH if alone else os.SCHED_OTHER}
