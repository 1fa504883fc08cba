"""LocalCluster: several brokers, the same ports after a restart, what it says when something is wrong."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster, LocalClusterError, free_ports

from .conftest import PATIENCE_S, eventually, worker_names

MODEL = "toy"
SYNTHETIC = ("--engine", "synthetic", "--model", MODEL)

MakeCluster = Callable[[int], LocalCluster]


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[MakeCluster]:
    """Start a cluster of so many brokers that ends with the test."""
    with ExitStack() as clusters:
        yield lambda number: clusters.enter_context(LocalCluster(brokers=number, folder=tmp_path))


def names_at(endpoint: str) -> set[str]:
    with Client(endpoint, connect_timeout_s=PATIENCE_S) as client:
        return worker_names(client)


def broker_at(endpoint: str) -> str:
    with Client(endpoint, connect_timeout_s=PATIENCE_S) as client:
        return str(client.status()["broker"])


def test_each_worker_registers_with_each_broker(brokers: MakeCluster) -> None:
    cluster = brokers(3)
    for _ in range(2):
        cluster.start_worker(*SYNTHETIC)
    cluster.wait_ready(MODEL, workers=2, timeout_s=PATIENCE_S)
    for endpoint in cluster.frontends:
        assert names_at(endpoint) == {"worker-1", "worker-2"}
    assert [broker_at(endpoint) for endpoint in cluster.frontends] == ["broker-1", "broker-2", "broker-3"]
    assert len({*cluster.frontends, *cluster.backends}) == 6
    assert (cluster.broker, cluster.frontend, cluster.backend) == (
        cluster.brokers[0], cluster.frontends[0], cluster.backends[0]
    )  # fmt: skip


def test_a_broker_comes_back_on_its_ports_while_the_other_one_goes_on(brokers: MakeCluster) -> None:
    cluster = brokers(2)
    cluster.start_worker(*SYNTHETIC)
    cluster.wait_ready(MODEL, timeout_s=PATIENCE_S)
    cluster.brokers[1].kill()
    assert names_at(cluster.frontends[0]) == {"worker-1"}
    cluster.brokers[1].restart()
    eventually(lambda: names_at(cluster.frontends[1]) == {"worker-1"}, "the worker is at both brokers again")
    assert broker_at(cluster.frontends[1]) == "broker-2"


def test_a_worker_with_endpoints_of_its_own_gets_no_others(brokers: MakeCluster) -> None:
    cluster = brokers(2)
    cluster.start_worker(*SYNTHETIC, "--broker", cluster.backends[1])
    eventually(lambda: names_at(cluster.frontends[1]) == {"worker-1"}, "the worker is ready")
    assert names_at(cluster.frontends[0]) == set()


def test_waiting_ends_when_one_of_the_brokers_is_dead(brokers: MakeCluster) -> None:
    cluster = brokers(2)
    cluster.start_worker(*SYNTHETIC)
    cluster.brokers[1].kill()
    with pytest.raises(LocalClusterError, match="broker-2 has ended"):
        cluster.wait_ready(MODEL, timeout_s=PATIENCE_S)


def test_waiting_ends_when_one_of_the_brokers_lacks_a_worker(brokers: MakeCluster) -> None:
    cluster = brokers(2)
    cluster.start_worker(*SYNTHETIC, "--broker", cluster.backends[0])
    eventually(lambda: names_at(cluster.frontends[0]) == {"worker-1"}, "the worker is ready at the first")
    with pytest.raises(LocalClusterError, match=r"waiting for 1 workers of toy: not ready after 0\.2 s"):
        cluster.wait_ready(MODEL, timeout_s=0.2)


def test_keys_of_another_cluster_in_the_environment_disturb_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("CLIENT_KEY", "CLIENT_SERVER_KEY", "WORKER_KEY", "WORKER_SERVER_KEY")
    for each in (*parts, "BROKER_UPLINK_KEY", "BROKER_UPLINK_SERVER_KEYS"):
        monkeypatch.setenv(f"TOKENMQ_{each}", "/nowhere/key")
    monkeypatch.setenv("TOKENMQ_BROKER_CURVE", "/nowhere")
    with LocalCluster(folder=tmp_path) as cluster:
        cluster.start_worker(*SYNTHETIC)
        cluster.wait_ready(MODEL, timeout_s=PATIENCE_S)
        with Client(cluster.frontend, server_key="", key="") as client:
            assert client.generate(MODEL, "x", max_tokens=2).text()


def test_a_cluster_has_a_broker() -> None:
    with pytest.raises(ValueError, match="brokers: expected 1 or more, got 0"):
        LocalCluster(brokers=0)


def test_free_ports_are_different_and_nobody_listens_there() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
