"""Broker, workers and clients as real processes on real sockets, with the synthetic engine: streams, kills, stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from tokenmq.client import AsyncClient, Client, WorkerLostError
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.codec import PREFIX
from tokenmq.protocol.messages import Command
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import at_rest, eventually, worker_names

MODEL = "toy"
SYNTHETIC = ("--engine", "synthetic", "--model", MODEL)

MakeCluster = Callable[..., LocalCluster]


def expected(seed: int, tokens: int) -> tuple[list[int], str]:
    ids = [token_at(seed, position) for position in range(tokens)]
    return ids, "".join(map(text_of, ids))


@pytest.mark.slow
def test_a_thousand_streams_at_once_arrive_whole_and_in_order(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for _ in range(4):
        cluster.start_worker(*SYNTHETIC, "--slots", "250", "--tokens-per-second", "100")
    cluster.wait_ready(MODEL, workers=4)

    async def read(client: AsyncClient, seed: int) -> str:
        stream = client.generate(MODEL, prompt="x", max_tokens=50, seed=seed)
        ids: list[int] = []
        text = ""
        async for chunk in stream:
            assert chunk.offset == len(ids)
            ids.extend(chunk.token_ids)
            text += chunk.text
        assert (ids, text) == expected(seed, 50)
        assert stream.finish_reason == "length"
        assert stream.usage is not None
        assert stream.usage.completion_tokens == 50
        return str(stream.worker)

    async def run() -> list[str]:
        async with AsyncClient(cluster.frontend, connect_timeout_s=30) as client:
            return await asyncio.gather(*(read(client, seed) for seed in range(1000)))

    served = asyncio.run(run())
    counts = [served.count(f"worker-{number}") for number in (1, 2, 3, 4)]
    assert sum(counts) == 1000
    assert min(counts) > 150  # in turns; a stream that ends early makes room for one more on its worker
    with Client(cluster.frontend) as client:
        eventually(lambda: at_rest(client), "all counters are zero")
        counters = client.status()["counters"]
    assert counters["finished"] == counters["requests"] == 1000
    assert counters["failed"] == counters["chunk_messages_dropped"] == counters["late_answers"] == 0


def test_a_killed_worker_is_an_error_long_before_the_expiry(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--heartbeat-interval", "10", "--expiry", "50")
    for _ in range(2):
        cluster.start_worker(*SYNTHETIC, "--slots", "4", "--tokens-per-second", "20")
    cluster.wait_ready(MODEL, workers=2)
    with Client(cluster.frontend, resume=False) as client:
        streams = [client.generate(MODEL, prompt="x", max_tokens=200, seed=seed) for seed in range(2)]
        for stream in streams:
            next(stream)  # both run, one on each worker
        victim = cluster.workers[0]
        began = time.monotonic()
        victim.kill()
        with pytest.raises(WorkerLostError) as caught:
            [stream.text() for stream in streams]
        took = time.monotonic() - began
        assert caught.value.retryable
        assert "worker-1" in caught.value.message
        assert took < 10  # not by a missed heartbeat: the connection broke
        survivor = client.generate(MODEL, prompt="x", max_tokens=5, seed=9)
        assert survivor.text() == expected(9, 5)[1]
        assert survivor.worker == "worker-2"
        victim.restart()
        eventually(lambda: worker_names(client) == {"worker-1", "worker-2"}, "the restarted worker is back")


def test_workers_and_clients_come_back_after_the_broker_was_killed(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker(*SYNTHETIC)
    cluster.wait_ready(MODEL, workers=2)
    with Client(cluster.frontend, connect_timeout_s=30) as client:
        assert client.generate(MODEL, prompt="x", max_tokens=3, seed=1).text() == expected(1, 3)[1]
        cluster.broker.kill()
        cluster.broker.restart()
        eventually(lambda: worker_names(client) == {"worker-1", "worker-2"}, "both workers have registered again")
        assert client.generate(MODEL, prompt="x", max_tokens=3, seed=2).text() == expected(2, 3)[1]


def test_a_worker_that_is_busy_in_one_step_is_not_expired(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("BUSY_S", "4")
    cluster = make_cluster("--heartbeat-interval", "0.2", "--expiry", "1")
    cluster.start_worker("--engine", "busy_engine:BusyEngine", "--model", MODEL, "--stall-after", "2")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=3, seed=1)
        eventually(lambda: client.workers()[0]["state"] == "stalled", "the long step is told")
        assert stream.text() == expected(1, 3)[1]
        eventually(lambda: client.workers()[0]["state"] == "ready", "the worker is ready again")
        assert client.status()["counters"]["workers_lost"] == 0


def test_a_stopped_worker_is_noticed_and_registers_anew_when_it_goes_on(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--heartbeat-interval", "0.2", "--expiry", "1")
    cluster.start_worker(*SYNTHETIC, "--tokens-per-second", "20")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=1000, seed=1, resume=False)
        next(stream)
        cluster.workers[0].send_signal(signal.SIGSTOP)
        with pytest.raises(WorkerLostError, match="silent"):
            stream.text()
        assert client.workers() == []
        cluster.workers[0].send_signal(signal.SIGCONT)
        eventually(lambda: worker_names(client) == {"worker-1"}, "the worker is back")
        assert client.generate(MODEL, prompt="x", max_tokens=3, seed=2).text() == expected(2, 3)[1]
        eventually(lambda: at_rest(client), "nothing of the old stream is left")


def test_random_bytes_on_both_ports_disturb_nobody(make_cluster: MakeCluster) -> None:
    """TOKENMQ_TEST_NOISE_S makes it last longer."""
    noise_s = float(os.environ.get("TOKENMQ_TEST_NOISE_S", "4"))
    cluster = make_cluster()
    rate = 50
    cluster.start_worker(*SYNTHETIC, "--tokens-per-second", str(rate))
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        tokens = int(noise_s * rate)
        stream = client.generate(MODEL, prompt="x", max_tokens=tokens, seed=3)
        next(stream)
        with zmq.Context() as context:
            _make_noise(context, [cluster.frontend, cluster.backend], noise_s)
        assert cluster.broker.exit_code is None
        rest = stream.text()
        assert expected(3, tokens)[1].endswith(rest)
        assert stream.finish_reason == "length"
        counters = client.status()["counters"]
        assert counters["malformed"] > 100
        assert counters["workers_lost"] == 0


def _make_noise(context: zmq.Context[zmq.Socket[bytes]], endpoints: list[str], seconds: float) -> None:
    """Send random bytes as raw TCP, as ZeroMQ messages, and behind true headers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for endpoint in endpoints:
            host, port = endpoint.removeprefix("tcp://").split(":")
            with socket.create_connection((host, int(port)), timeout=10) as raw:
                raw.sendall(os.urandom(200))
            with context.socket(zmq.DEALER) as dealer:
                dealer.linger = 200
                dealer.sndtimeo = 1000
                dealer.connect(endpoint)
                for command in Command:
                    dealer.send(os.urandom(40))
                    dealer.send_multipart([PREFIX[command] + os.urandom(46), os.urandom(5)])
                    dealer.send(PREFIX[command] + os.urandom(76))
                assert dealer.poll(10_000), "the broker tells a stranger that it is one"
