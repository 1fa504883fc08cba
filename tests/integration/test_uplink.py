"""Brokers below brokers as real processes: a tree streams, and whatever is killed in it, readers do not notice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client, NoWorkerError
from tokenmq.client.local import LocalCluster, free_ports

from .conftest import PATIENCE_S, at_rest, eventually
from .test_recovery import MODEL, PACED, Reader, expected, read

MakeCluster = Callable[..., LocalCluster]
#: So many brokers stand below the root, and so many workers below each of them.
MIDS = 2
WORKERS = 2
#: Slots of all of these.
ALL_SLOTS = MIDS * WORKERS * 50


class Tree:
    """Roots, below each of them the same brokers, and workers below these.

    Attributes:
        roots: the brokers that clients know.
        mids: by name: the cluster of a broker below all roots.
    """

    def __init__(self, make_cluster: MakeCluster, roots: int = 1) -> None:
        self.roots = make_cluster(brokers=roots)
        uplinks = [part for backend in self.roots.backends for part in ("--uplink", backend)]
        self.mids = {name: make_cluster("--name", name, *uplinks) for name in [f"mid-{n + 1}" for n in range(MIDS)]}
        for mid in self.mids.values():
            for _ in range(WORKERS):
                mid.start_worker(*PACED)
        for mid in self.mids.values():
            mid.wait_ready(MODEL, workers=WORKERS)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until each root knows all that is below it."""
        for frontend in self.roots.frontends:
            with Client(frontend, connect_timeout_s=PATIENCE_S) as client:
                eventually(lambda client=client: len(leaves(client)) == MIDS * WORKERS, "all workers are there")
                # A question goes down at once; what a broker below tells of itself comes a little later.
                eventually(lambda client=client: told_slots(client) == ALL_SLOTS, "the root knows what they can do")

    def client(self) -> Client:
        return Client(list(self.roots.frontends), connect_timeout_s=PATIENCE_S)

    def rests(self) -> None:
        """Wait until nothing is left anywhere, not even a row in an engine."""
        for frontend in [*self.roots.frontends, *(mid.frontend for mid in self.mids.values())]:
            with Client(frontend, connect_timeout_s=PATIENCE_S) as client:
                eventually(lambda client=client: at_rest(client), f"nothing is left at {frontend}")


def told_slots(client: Client) -> int:
    """Return the slots of those below a broker, as they have told it."""
    return sum(row["slots"] for row in client.workers() if row["state"] == "ready")


def leaves(client: Client) -> dict[str, dict[str, Any]]:
    """The ready workers of the tree that are no brokers."""
    rows = client.workers(tree=True)
    return {row["name"]: row for row in rows if not row["broker"] and row["state"] == "ready"}


def places(readers: list[Reader]) -> list[str]:
    """Wait until each reader's stream has a worker, and return them: `mid-1/worker-2`."""

    def found() -> list[str]:
        names = [reader.stream.attempts[-1].worker for reader in readers]
        return names if all("/" in name for name in names) else []

    return eventually(found, "all streams are at workers")  # type: ignore[no-any-return]


def test_streams_go_through_two_brokers_and_the_figures_add_up(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client:
        # None of them ends before the last one has begun, however slow the machine.
        readers = [read(client, seed, tokens=300) for seed in range(20)]
        names = places(readers)
        assert {name: names.count(name) for name in leaves(client)} == dict.fromkeys(leaves(client), 5)
        total = client.status(tree=True)["tree"]
        assert (total["workers"], total["slots"]) == (4, 200)
        assert total["requests"]["running"] == 20
        for reader, name in zip(readers, names, strict=True):
            reader.end()
            assert reader.stream.worker == name
            assert len(reader.stream.attempts) == 1
    tree.rests()


def test_a_reader_that_leaves_frees_the_row_in_the_engine(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client:
        reader = read(client, 1, tokens=100_000)
        reader.wait_for(3)
        [name] = places([reader])
        mid, worker = name.split("/")
        with Client(tree.mids[mid].frontend) as below:
            eventually(lambda: {row["name"]: row["running"] for row in below.workers()}[worker] == 1, "it runs")
            reader.stream.cancel()
            eventually(lambda: at_rest(below), "the row is free")
    tree.rests()


def test_a_slow_reader_holds_its_own_stream_up_and_no_other(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    narrow = Client(tree.roots.frontend, window_tokens=8)
    with narrow, tree.client() as client:
        slow = narrow.generate(MODEL, "x", max_tokens=100, seed=3)
        quick = read(client, 4)
        quick.end()
        # The window is used up long ago: the rest waits at the worker, and takes no slot on any level.
        eventually(lambda: [row["parked"] for row in client.workers()].count(1) == 1, "the stream is parked")
        assert (slow.text(), slow.token_ids) == (expected(3, 100)[1], expected(3, 100)[0])
    tree.rests()


def test_a_killed_worker_below_costs_the_reader_nothing(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client:
        readers = [read(client, seed) for seed in range(8)]
        for reader in readers:
            reader.wait_for(3)
        names = places(readers)
        mid, worker = names[0].split("/")
        tree.mids[mid].workers[int(worker[-1]) - 1].kill()
        for reader, name in zip(readers, names, strict=True):
            reader.end()
            if name == names[0]:
                assert reader.causes() == ["worker_lost"]
                assert reader.stream.attempts[0].worker == name
                assert reader.stream.worker != name
            else:
                assert reader.causes() == []


def test_a_killed_broker_in_the_middle_costs_the_reader_nothing(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client:
        readers = [read(client, seed) for seed in range(8)]
        for reader in readers:
            reader.wait_for(3)
        names = places(readers)
        tree.mids["mid-1"].broker.kill()
        for reader, name in zip(readers, names, strict=True):
            reader.end()
            lost = name.startswith("mid-1/")
            assert reader.causes() == (["worker_lost"] if lost else [])
            assert str(reader.stream.worker).startswith("mid-2/")
        tree.mids["mid-1"].broker.restart()
        tree.wait_ready()
        tree.rests()


def test_a_killed_root_costs_the_reader_nothing_where_there_are_two(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster, roots=2)
    with tree.client() as client:
        readers = [read(client, seed) for seed in range(8)]
        for reader in readers:
            reader.wait_for(3)
        # Until the client has a session with the first root, which it prefers, requests go to the other one.
        used = readers[-1].stream.attempts[0].broker
        tree.roots.brokers[tree.roots.frontends.index(used)].kill()
        for reader in readers:
            reader.end()
            hit = reader.stream.attempts[0].broker == used
            assert reader.causes() == (["broker_lost"] if hit else [])
            assert reader.stream.attempts[-1].broker != used
        tree.roots.brokers[tree.roots.frontends.index(used)].restart()
        tree.wait_ready()
        tree.rests()


def test_a_root_that_is_started_again_costs_the_reader_nothing(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client:
        readers = [read(client, seed) for seed in range(8)]
        for reader in readers:
            reader.wait_for(3)
        tree.roots.broker.kill()
        tree.roots.broker.restart()
        for reader in readers:
            reader.end()
            assert reader.causes()[0] == "broker_lost"
    tree.rests()


def test_brokers_in_the_middle_are_started_anew_one_after_the_other(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client:
        readers = [read(client, seed, tokens=200) for seed in range(8)]
        for reader in readers:
            reader.wait_for(3)
        for mid in tree.mids.values():
            mid.broker.terminate()
            assert mid.broker.wait(PATIENCE_S) == 0
            mid.broker.restart()
            mid.wait_ready(MODEL, workers=WORKERS)
            tree.wait_ready()
        for reader in readers:
            reader.end()
            # They had time enough to end where they were.
            assert reader.causes() == []


def test_a_broker_below_is_sent_away_by_its_parent_and_serves_the_others(make_cluster: MakeCluster) -> None:
    tree = Tree(make_cluster)
    with tree.client() as client, Client(tree.mids["mid-1"].frontend) as below:
        readers = [read(client, seed) for seed in range(8)]
        for reader in readers:
            reader.wait_for(3)
        client.drain("mid-1")
        for reader in readers:
            reader.end()
            assert reader.causes() == []
        eventually(lambda: {row["name"] for row in client.workers()} == {"mid-2"}, "the broker has left")
        assert below.generate(MODEL, "x", max_tokens=5, seed=9).text() == expected(9, 5)[1]
        assert tree.mids["mid-1"].broker.exit_code is None


def test_brokers_below_each_other_say_so_and_go_on(make_cluster: MakeCluster) -> None:
    ports = free_ports(2)
    backends = [f"tcp://127.0.0.1:{port}" for port in ports]
    pair = [
        make_cluster("--name", name, "--backend", own, "--uplink", other)
        for name, own, other in (("a", backends[0], backends[1]), ("b", backends[1], backends[0]))
    ]

    def warnings(event: str) -> list[str]:
        lines = [line for cluster in pair for line in cluster.broker.log.read_text().splitlines()]
        return [line for line in lines if f" warning broker {event} " in line]

    eventually(lambda: len(warnings("uplink_loop")) >= 2, "the loop was found, and tried again")
    eventually(lambda: any("loop:" in line for line in warnings("broker_lost")), "whoever was refused says why")
    assert all("--uplink" in line for line in warnings("uplink_loop"))
    with Client(pair[0].frontend) as client:
        with pytest.raises(NoWorkerError):
            client.generate(MODEL, "x", max_tokens=5, seed=9, resume=False).text()
        pair[0].start_worker(*PACED)
        pair[0].wait_ready(MODEL)
        assert client.generate(MODEL, "x", max_tokens=5, seed=9).text() == expected(9, 5)[1]
    # One try a second at first, and then fewer and fewer; a storm would be hundreds.
    assert len(warnings("uplink_loop")) < 15


def test_a_broker_below_without_a_name_of_its_own_is_told_to_take_one(make_cluster: MakeCluster) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "zmq-broker", "--uplink", "tcp://127.0.0.1:5556"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "--name" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Isolated networks

_ISOLATED = """
import json, socket, sys
from tokenmq.client.local import LocalCluster

uplink, elsewhere, *worker = json.loads(sys.argv[1])
with socket.socket() as probe:
    reached = probe.connect_ex(("127.0.0.1", elsewhere)) == 0
with LocalCluster("--name", "island", "--uplink", uplink) as cluster:
    cluster.start_worker(*worker)
    cluster.wait_ready("toy")
    print(json.dumps({"reached": reached}), flush=True)
    sys.stdin.read()
"""


def _no_namespaces() -> str:
    """Why no network namespace can be made here; empty where one can."""
    command = ["unshare", "--map-root-user", "--net", "ip", "link", "set", "lo", "up"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError as error:
        return str(error)
    return done.stderr.strip() or ("" if done.returncode == 0 else f"unshare: exit code {done.returncode}")


def test_networks_that_only_a_pair_of_brokers_joins(make_cluster: MakeCluster, tmp_path: Path) -> None:
    if reason := _no_namespaces():
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    joint = f"ipc://{tmp_path}/joint"  # a path is the one thing that both have
    root = make_cluster("--backend", joint)
    arguments = json.dumps([joint, int(root.frontend.rpartition(":")[2]), *PACED])
    script = f'ip link set lo up && exec "{sys.executable}" -c "$0" "$1"'
    island = subprocess.Popen(
        ["unshare", "--map-root-user", "--net", "sh", "-c", script, _ISOLATED, arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert island.stdout is not None
        assert json.loads(island.stdout.readline()) == {"reached": False}
        root.wait_ready(MODEL)
        with Client(root.frontend) as client:
            assert set(leaves(client)) == {"island/worker-1"}
            reader = read(client, 5)
            reader.end()
            assert reader.stream.worker == "island/worker-1"
            eventually(lambda: at_rest(client), "nothing is left")
    finally:
        island.communicate(timeout=PATIENCE_S)
    assert island.returncode == 0


def test_a_frozen_broker_in_the_middle_is_given_up_and_comes_back(make_cluster: MakeCluster) -> None:
    root = make_cluster("--heartbeat-interval", "0.2", "--expiry", "1")
    mids = [make_cluster("--name", name, "--uplink", root.backend) for name in ("mid-1", "mid-2")]
    for mid in mids:
        mid.start_worker(*PACED)
    root.wait_ready(MODEL, workers=2)
    with Client(root.frontend) as client:
        readers = [read(client, seed) for seed in range(4)]
        for reader in readers:
            reader.wait_for(3)
        names = places(readers)
        mids[0].broker.send_signal(signal.SIGSTOP)
        for reader, name in zip(readers, names, strict=True):
            reader.end()
            assert reader.causes() == (["worker_lost"] if name.startswith("mid-1") else [])
        mids[0].broker.send_signal(signal.SIGCONT)
        eventually(lambda: len(leaves(client)) == 2, "it has registered again")
        for mid in mids:
            with Client(mid.frontend) as below:
                eventually(lambda below=below: at_rest(below), "nothing is left below")
