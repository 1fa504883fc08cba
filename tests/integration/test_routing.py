"""Where requests go, with real brokers and workers: hedges, and what the broker tells of its choice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenmq.client import Client, Stream
from tokenmq.client.local import LocalCluster, LocalProcess
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import PATIENCE_S, at_rest, eventually

MakeCluster = Callable[..., LocalCluster]
MODEL = "toy"
HEDGE_AFTER_S = 0.1


def text(seed: int, tokens: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(tokens))


def start(cluster: LocalCluster, *names: str, slots: int = 4) -> dict[str, LocalProcess]:
    """Start workers of one speed and wait for them."""
    options = ("--engine", "synthetic", "--model", MODEL, "--speed", "1", "--slots", str(slots))
    workers = {name: cluster.start_worker(*options, "--worker-name", name) for name in names}
    cluster.wait_ready(MODEL, workers=len(names))
    return workers


# Hedging


@contextmanager
def stopped(worker: LocalProcess) -> Iterator[None]:
    """A worker that takes requests and answers none, as one with a very long prompt before it does."""
    worker.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        worker.send_signal(signal.SIGCONT)


def read_hedged(client: Client, late: str, seed: int) -> Stream:
    """Read streams until one has gone to the late worker first; return that one."""
    for _ in range(4):  # equals take turns
        stream = client.generate(MODEL, "x", max_tokens=20, seed=seed)
        assert stream.text() == text(seed, 20)
        if any((attempt.number, attempt.worker) == (1, late) for attempt in stream.attempts):
            return stream
    raise AssertionError(f"nothing went to {late}")


def test_a_second_worker_answers_for_one_that_is_late(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--expiry", str(PATIENCE_S))
    workers = start(cluster, "late", "quick")
    with Client(cluster.frontend, hedge_after_s=HEDGE_AFTER_S) as client:
        with stopped(workers["late"]):
            stream = read_hedged(client, "late", seed=4)
            assert stream.worker == "quick"
            first, second = stream.attempts
            assert (first.number, first.worker, first.hedge, first.cancelled) == (1, "late", False, True)
            assert (second.number, second.worker, second.hedge, second.cancelled) == (2, "quick", True, False)
            assert first.error is second.error is None
            assert client.status()["counters"]["hedges"] >= 1
        # The slower one is told to stop, and gives its slot back.
        eventually(lambda: at_rest(client), "no slot is left charged")


def test_a_hedge_for_which_nobody_is_free_costs_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--expiry", str(PATIENCE_S))
    workers = start(cluster, "only")
    with Client(cluster.frontend, hedge_after_s=HEDGE_AFTER_S) as client:
        with stopped(workers["only"]):
            stream = client.generate(MODEL, "x", max_tokens=20, seed=4)
            eventually(lambda: any(attempt.cancelled for attempt in stream.attempts), "a hedge is refused")
        assert stream.text() == text(4, 20)
        refused, first = stream.attempts
        assert (refused.number, refused.worker, refused.hedge) == (2, "", True)
        assert (first.number, first.worker, first.error) == (1, "only", None)
        eventually(lambda: at_rest(client), "no slot is left charged")


def test_when_the_late_worker_dies_its_hedge_goes_on(make_cluster: MakeCluster) -> None:
    """Both are late: the one that dies first leaves the stream to the other."""
    cluster = make_cluster("--expiry", str(PATIENCE_S))
    workers = start(cluster, "one", "two")
    with Client(cluster.frontend, hedge_after_s=HEDGE_AFTER_S) as client:
        with stopped(workers["one"]), stopped(workers["two"]):
            stream = client.generate(MODEL, "x", max_tokens=20, seed=4)
            eventually(lambda: len(stream.attempts) == 2 and stream.attempts[1].worker, "both have workers")
            first, second = stream.attempts
            workers[first.worker].kill()
            eventually(lambda: stream.attempts[0].error, "the loss is noticed")
            workers[second.worker].send_signal(signal.SIGCONT)
            assert stream.text() == text(4, 20)
        assert [attempt.error.code if attempt.error else "" for attempt in stream.attempts] == ["worker_lost", ""]
        assert stream.worker == second.worker


# What the broker tells of its choice


def test_the_command_says_why_a_worker_was_chosen(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    start(cluster, "one", "two")
    command = [Path(sys.executable).parent / "zmq-client", "--broker", cluster.frontend, "generate", MODEL, "x"]
    command += ["--max-tokens", "3", "--seed", "4", "--session", "s", "--priority", "9", "--hedge-after", "5"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr
        return done

    told = run("--explain")
    assert told.stdout == text(4, 3) + "\n"
    (line,) = told.stderr.splitlines()
    assert ": shortest-queue chose " in line
    assert "one of 2: " in line
    assert all(f"{name} (load 0 of 4, " in line for name in ("one", "two"))
    summary = json.loads(run("--explain", "--json").stdout.splitlines()[-1])
    (decision,) = summary["routing"]
    assert decision["worker"] == summary["worker"]
    assert {worker["worker"] for worker in decision["considered"]} == {"one", "two"}
    untold = run("--json")
    assert untold.stderr == ""
    assert json.loads(untold.stdout.splitlines()[-1])["routing"] == []
