"""Management through the commands, with real processes: who gets requests, who stays, who may change it, trees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster, LocalProcess, free_ports
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import PATIENCE_S, eventually

BIN = Path(sys.executable).parent
MODEL = "toy"
MakeCluster = Callable[..., LocalCluster]


def command(frontend: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run zmq-client to its end."""
    return subprocess.run(
        [BIN / "zmq-client", "--broker", frontend, *arguments],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def does(frontend: str, *arguments: str) -> str:
    """Run zmq-client; return what it prints. It must succeed."""
    done = command(frontend, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.rstrip("\n")


def rows(frontend: str, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in does(frontend, *arguments, "--json").splitlines()]


def text(seed: int, tokens: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(tokens))


def start(cluster: LocalCluster, workers: int = 1, *options: str) -> None:
    for _ in range(workers):
        cluster.start_worker("--engine", "synthetic", "--model", MODEL, *options)
    cluster.wait_ready(MODEL, workers=workers)


def state(client: Client, worker: str) -> str:
    return next((str(row["state"]) for row in client.workers() if row["name"] == worker), "gone")


# One broker


def test_models_in_the_order_of_internvl(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--model-order", "internvl")
    for model in ("InternVL2-2B", "a", "InternVL2-26B", "InternVL2-Pro"):
        cluster.start_worker("--engine", "synthetic", "--model", model)
        cluster.wait_ready(model)
    names = ["InternVL2-Pro", "InternVL2-26B", "InternVL2-2B", "a"]
    assert [row["name"] for row in rows(cluster.frontend, "models")] == names
    assert [row["name"] for row in rows(cluster.frontend, "models", "--order", "name")] == sorted(names)


def test_policy_and_speed_are_changed_while_it_runs(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, 2, "--speed", "10", "--slots", "4")
    assert does(cluster.frontend, "set-speed", "worker-2", "50") == "worker-2 is reckoned with 50 tokens/s"
    shown = does(cluster.frontend, "route", MODEL).splitlines()
    assert shown[0] == f"{MODEL} -> worker-2 (shortest-queue; workers with a free slot: 2; waiting: 0)"
    assert shown[1].split() == ["WORKER", "LOAD", "SLOTS", "SPEED", "COST"]
    [route] = rows(cluster.frontend, "route", MODEL)
    assert [each["worker"] for each in route["considered"]] == ["worker-2", "worker-1"]
    assert does(cluster.frontend, "set-speed", "worker-2", "auto") == "worker-2 is reckoned with 10 tokens/s"
    assert does(cluster.frontend, "set-policy", "lottery") == "policy: lottery, before: shortest-queue"
    [status] = rows(cluster.frontend, "status")
    assert status["policy"] == "lottery"
    wrong = command(cluster.frontend, "set-policy", "best")
    assert (wrong.returncode, "known are" in wrong.stderr, "shortest-queue" in wrong.stderr) == (1, True, True)
    assert command(cluster.frontend, "set-speed", "worker-2", "fast").returncode == 2


def test_status_shows_what_waits_in_a_line_a_person_reads(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, 1, "--slots", "1", "--tokens-per-second", "5")
    with Client(cluster.frontend) as client:
        streams = [client.generate(MODEL, prompt="x", max_tokens=1000) for _ in range(3)]
        eventually(lambda: client.status()["requests"]["waiting"] == 2, "two requests wait")
        [line] = [line for line in does(cluster.frontend, "status").splitlines() if line.startswith("waiting")]
        assert line.split()[1:5] == [f"{MODEL}:", "2", "of", "1"]
        assert "the oldest for" in line
        assert "none has left yet" in line
        for stream in streams:
            stream.cancel()


def test_a_worker_is_held_and_let_go_again(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, 2, "--tokens-per-second", "100")
    said = does(cluster.frontend, "drain", "worker-1", "--stay", "--wait", "10")
    assert said.splitlines() == [
        "worker-1 gets no new requests; requests in flight: 0", "worker-1 has finished",
    ]  # fmt: skip
    with Client(cluster.frontend) as client:
        served = {client.generate(MODEL, prompt="x", max_tokens=2) for _ in range(6)}
        assert {(stream.text(), stream.worker)[1] for stream in served} == {"worker-2"}
        cluster.workers[0].kill()
        cluster.workers[0].restart()  # it comes back under its name, and is held still
        eventually(lambda: state(client, "worker-1") == "ready", "the worker is back")
        table = does(cluster.frontend, "workers")
        assert "ready, held" in table
        assert does(cluster.frontend, "undrain", "worker-1") == "worker-1 may get requests again"
        streams = [client.generate(MODEL, prompt="x", max_tokens=50) for _ in range(6)]
        assert {(stream.text(), stream.worker)[1] for stream in streams} == {"worker-1", "worker-2"}


def test_a_worker_that_leaves_is_called_back(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, 1, "--tokens-per-second", "50", "--slots", "4")
    with Client(cluster.frontend) as client:
        running = client.generate(MODEL, prompt="x", max_tokens=10_000, seed=1)
        next(running)
        assert does(cluster.frontend, "drain", "worker-1", "--grace", "600") == (
            "worker-1 drains; requests in flight: 1"
        )
        eventually(lambda: state(client, "worker-1") == "draining", "the worker drains")
        waiting = client.generate(MODEL, prompt="x", max_tokens=5, seed=2)
        assert does(cluster.frontend, "undrain", "worker-1") == "worker-1 was told not to leave"
        assert waiting.text() == text(2, 5)
        assert state(client, "worker-1") == "ready"
        running.cancel()
        eventually(lambda: client.workers()[0]["in_flight"] == 0, "the worker is idle")
        assert client.generate(MODEL, prompt="x", max_tokens=5, seed=3).text() == text(3, 5)
    assert cluster.workers[0].exit_code is None


def test_a_worker_is_removed_and_its_requests_go_on_elsewhere(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, 2, "--tokens-per-second", "50")
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=60, seed=1)
        begun = next(stream).text
        first = eventually(lambda: stream.attempts[-1].worker if stream.attempts else "", "a worker has it")
        assert does(cluster.frontend, "remove", first) == f"{first} is removed; requests in flight: 1"
        assert begun + stream.text() == text(1, 60)
        assert stream.worker != first
        assert [row["name"] for row in client.workers()] == [stream.worker]
    removed = cluster.workers[int(first[-1]) - 1]
    assert removed.wait() == 0
    assert "removed" in removed.log.read_text()


def test_refresh_finds_who_is_there(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, 2)
    assert does(cluster.frontend, "refresh") == "workers: 2; dropped: none"
    cluster.workers[0].kill()
    # The broker may have noticed by itself already: then there was nobody to drop.
    [found] = rows(cluster.frontend, "refresh")
    assert found["workers"] == 1
    assert found["dropped"] in ([], ["worker-1"])
    assert [row["name"] for row in rows(cluster.frontend, "workers")] == ["worker-2"]


@pytest.mark.parametrize("admin", [False, True])
def test_a_broker_that_other_machines_reach_takes_no_orders_unless_it_is_told_to(
    make_cluster: MakeCluster, admin: bool
) -> None:
    options = ["--frontend", "tcp://0.0.0.0:*", "--insecure", *(["--insecure-admin"] if admin else [])]
    cluster = make_cluster(*options)
    start(cluster)
    done = command(cluster.frontend, "set-policy", "lottery")
    assert done.returncode == (0 if admin else 1)
    if not admin:
        assert "forbidden" in done.stderr
        assert "--insecure-admin" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert [row["name"] for row in rows(cluster.frontend, "workers")] == ["worker-1"]  # everybody may look


# A tree: root, west below it, north below west


@contextmanager
def below(cluster: LocalCluster, name: str, parent: str) -> Iterator[tuple[LocalProcess, str, str]]:
    """Run a broker below another one; give its process and its endpoints for clients and workers."""
    frontend, backend = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
    options = ("--name", name, "--frontend", frontend, "--backend", backend, "--uplink", parent)
    process = LocalProcess(name, [str(BIN / "zmq-broker"), *options], cluster.folder / f"{name}.log")
    try:
        yield process, frontend, backend
    finally:
        process.terminate()
        process.finish()


def test_workers_behind_two_brokers_are_shown_summed_and_told_what_to_do(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    synthetic = ("--engine", "synthetic", "--model", MODEL, "--slots", "3")
    with (
        below(cluster, "west", cluster.backend) as (_, _, west),
        below(cluster, "north", west) as (_, _, north),
        Client(cluster.frontend) as client,
    ):
        cluster.start_worker(*synthetic)
        cluster.start_worker(*synthetic, "--broker", west)
        cluster.start_worker(*synthetic, "--broker", north)
        names = ["west", "west/north", "west/north/worker-3", "west/worker-2", "worker-1"]
        eventually(
            lambda: sorted(row["name"] for row in client.workers(tree=True) if row["state"] == "ready") == names,
            "the tree stands",
        )
        shown = does(cluster.frontend, "workers", "--tree").splitlines()[1:]
        assert [line[: len(line) - len(line.lstrip())] + line.split()[0] for line in shown] == [
            "west", "  west/north", "    west/north/worker-3", "  west/worker-2", "worker-1",
        ]  # fmt: skip
        [status] = rows(cluster.frontend, "status", "--tree")
        assert (status["tree"]["workers"], status["tree"]["slots"]) == (3, 9)
        assert [row["path"] for row in status["tree"]["brokers"]] == ["", "west", "west/north"]
        assert "all workers" in does(cluster.frontend, "status", "--tree")

        leaf = "west/north/worker-3"
        assert (
            does(cluster.frontend, "drain", leaf, "--stay") == f"{leaf} gets no new requests; requests in flight: 0"
        )
        held = {row["name"]: row["held"] for row in client.workers(tree=True)}
        assert [name for name in names if held[name]] == [leaf]
        assert does(cluster.frontend, "undrain", leaf) == f"{leaf} may get requests again"
        assert does(cluster.frontend, "set-speed", leaf, "7").startswith(f"{leaf} is reckoned with 7 ")
        wrong = command(cluster.frontend, "drain", "west/north/nobody")
        assert wrong.returncode == 1
        assert "west: north: no worker 'nobody' here; workers: worker-3" in wrong.stderr
        does(cluster.frontend, "remove", leaf)
        assert cluster.workers[2].wait() == 0
        eventually(lambda: leaf not in {row["name"] for row in client.workers(tree=True)}, "it is gone")


def test_a_broker_below_that_is_frozen_delays_the_tree_by_a_second_and_no_more(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--heartbeat-interval", "10", "--expiry", "50")
    with below(cluster, "west", cluster.backend) as (process, _, _), Client(cluster.frontend) as client:
        eventually(lambda: [row["name"] for row in client.workers()] == ["west"], "west has registered")
        process.send_signal(signal.SIGSTOP)
        [row] = client.workers(tree=True)
        assert row["answered"] is False
        done = command(cluster.frontend, "drain", "west/gpu")
        assert done.returncode == 1
        assert "broker west did not answer within 2 s" in done.stderr
