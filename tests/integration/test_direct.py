"""Chunks past the broker, with real processes: they come from the worker, and whatever breaks, no token is missed."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenmq.client import AsyncClient, Client
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import Attach, Credit, Disconnect, Heartbeat
from tokenmq.worker.engines.synthetic import token_at, vector_of

from .conftest import PATIENCE_S, at_rest, eventually
from .test_recovery import MODEL, PACED, SYNTHETIC, Reader, expected, holder, read

LOOPBACK = "127.0.0.0/8"
DOOR = ("--direct", "tcp://127.0.0.1:*")

MakeCluster = Callable[..., LocalCluster]


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> LocalCluster:
    made = make_cluster()
    made.start_worker(*PACED, *DOOR)
    made.wait_ready(MODEL)
    return made


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.frontend, direct=LOOPBACK) as made:
        connect(made)
        yield made


def connect(client: Client) -> None:
    """Ask until an answer comes past the broker: the first may be there before the connection is."""

    def came_direct() -> bool:
        stream = client.generate(MODEL, "x", max_tokens=1)
        stream.text()
        return stream.attempts[-1].direct

    eventually(came_direct, "chunks come past the broker")


def passed(client: Client) -> int:
    """Return how many messages with chunks have gone through the broker."""
    return int(client.status()["counters"]["chunk_messages"])


def went_direct(reader: Reader) -> list[bool]:
    return [attempt.direct for attempt in reader.stream.attempts]


def test_chunks_come_from_the_worker_and_the_broker_sees_none(client: Client) -> None:
    before = passed(client)
    readers = [read(client, seed) for seed in range(20)]
    for reader in readers:
        reader.end()
        assert went_direct(reader) == [True]
    assert passed(client) == before
    eventually(lambda: at_rest(client), "no request is left anywhere")


def test_logprobs_and_vectors_come_the_same_way(client: Client) -> None:
    before = passed(client)
    stream = client.generate(MODEL, "x", max_tokens=5, logprobs=2, seed=1)
    assert [len(one.top) for chunk in stream for one in chunk.logprobs] == [2] * 5
    assert client.embed(MODEL, ["a", "b"])[1] == pytest.approx(list(memoryview(vector_of("b")).cast("f")))
    assert passed(client) == before


def test_a_stream_that_is_left_ends_at_the_worker(client: Client) -> None:
    reader = read(client, 1, tokens=10_000)
    reader.wait_for(5)
    reader.stream.cancel()
    eventually(lambda: at_rest(client), "the worker has stopped")


def test_a_killed_worker_costs_the_reader_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker(*PACED, *DOOR)
    cluster.wait_ready(MODEL, workers=2)
    with Client(cluster.frontend, direct=LOOPBACK) as client:
        connect(client)
        connect(client)  # the broker takes turns
        reader = read(client, 3)
        reader.wait_for(10)
        dead = holder(client)
        next(process for process in cluster.workers if process.name == dead).kill()
        reader.end()
        first, *_, last = reader.stream.attempts
        assert (first.worker, first.direct) == (dead, True)
        assert last.worker != dead
        assert last.first_token >= 10


def test_a_broker_that_restarts_costs_the_reader_nothing(cluster: LocalCluster, client: Client) -> None:
    reader = read(client, 4)
    reader.wait_for(10)
    cluster.broker.kill()
    cluster.broker.restart()
    reader.end()
    assert reader.causes()[0] == "broker_lost"
    connect(client)  # with another key, by the same connection


def test_an_endpoint_that_cannot_be_reached_costs_nothing(make_cluster: MakeCluster, tmp_path: Path) -> None:
    door = tmp_path / "door"
    cluster = make_cluster()
    cluster.start_worker(*PACED, "--direct", f"ipc://{door}")
    cluster.wait_ready(MODEL)
    door.unlink()
    with Client(cluster.frontend, direct="ipc") as client:
        reader = read(client, 5)
        reader.end()
        assert went_direct(reader) == [False]
        assert passed(client) > 0


def test_an_ipc_door_is_open_to_those_who_name_it(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster()
    cluster.start_worker(*PACED, "--direct", f"ipc://{tmp_path / 'door'}")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend, direct=["ipc", "10.0.0.0/8"]) as client:
        connect(client)


def test_nobody_is_dialled_outside_the_named_networks(cluster: LocalCluster) -> None:
    with Client(cluster.frontend, direct="10.0.0.0/8") as client:
        for seed in range(3):
            reader = read(client, seed, tokens=20)
            reader.end()
            assert went_direct(reader) == [False]


def test_a_client_that_did_not_ask_is_served_through_the_broker_beside_one_that_did(
    cluster: LocalCluster, client: Client
) -> None:
    with Client(cluster.frontend) as other:
        before = passed(client)
        mine, theirs = read(client, 6), read(other, 7)
        mine.end()
        theirs.end()
        assert (went_direct(mine), went_direct(theirs)) == ([True], [False])
        assert passed(client) > before


def test_a_reader_that_stops_delays_nobody(cluster: LocalCluster) -> None:
    with Client(cluster.frontend, direct=LOOPBACK, window_tokens=16) as client:
        connect(client)
        stopped = client.generate(MODEL, "x", max_tokens=150, seed=8)
        assert next(stopped).offset == 0
        reader = read(client, 9)
        reader.end()
        assert went_direct(reader) == [True]
        rest = [token for chunk in stopped for token in chunk.token_ids]
        assert rest == expected(8, 150)[0][1:]
        assert [attempt.direct for attempt in stopped.attempts] == [True]


STOPPED = """
import sys
from tokenmq.client import Client
from tokenmq.worker.engines.synthetic import token_at
with Client(sys.argv[1], direct="127.0.0.1", window_tokens=4096) as client:
    while True:
        stream = client.generate("toy", "x", max_tokens=1)
        stream.text()
        if stream.attempts[-1].direct:
            break
    streams = [client.generate("toy", "x", max_tokens=3000, seed=seed) for seed in range(8)]
    print("begun", next(streams[0]).offset, flush=True)
    for seed, stream in enumerate(streams):
        ids = [token for chunk in stream for token in chunk.token_ids]
        assert ids == [token_at(seed, position) for position in range(3000)][seed == 0:], seed
    print("whole", flush=True)
"""


def test_a_client_process_that_stands_still_delays_nobody(make_cluster: MakeCluster) -> None:
    """It is sent to for as long as its credit lasts, and then given up like any other that has fallen silent."""
    cluster = make_cluster()
    cluster.start_worker(*SYNTHETIC, "--slots", "50", "--tokens-per-second", "1000", *DOOR)
    cluster.wait_ready(MODEL)
    command = [sys.executable, "-c", STOPPED, cluster.frontend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as frozen:
        try:
            assert frozen.stdout is not None
            assert frozen.stdout.readline() == "begun 0\n"
            frozen.send_signal(signal.SIGSTOP)
            with Client(cluster.frontend, direct=LOOPBACK) as client:
                connect(client)
                for seed in range(4):
                    reader = read(client, seed, tokens=500)
                    reader.end()
                    assert went_direct(reader) == [True]
            frozen.send_signal(signal.SIGCONT)
            assert frozen.stdout.readline() == "whole\n"
            assert frozen.wait(PATIENCE_S) == 0
        finally:
            frozen.kill()


def test_asyncio(cluster: LocalCluster) -> None:
    async def ask() -> None:
        async with AsyncClient(cluster.frontend, direct=["127.0.0.1"]) as client:
            while True:
                stream = client.generate(MODEL, "x", max_tokens=20, seed=1)
                ids = [token async for chunk in stream for token in chunk.token_ids]
                assert ids == [token_at(1, position) for position in range(20)]
                if stream.attempts[-1].direct:
                    return

    asyncio.run(asyncio.wait_for(ask(), PATIENCE_S))


def test_strangers_at_the_door_get_nothing(cluster: LocalCluster, client: Client) -> None:
    """Keys and ids cannot be guessed; who breaks the protocol is sent away, and nobody else notices."""
    import zmq

    door = eventually(lambda: door_of(cluster), "the worker has told its door")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(door)
        reader = read(client, 10)
        reader.wait_for(5)
        for message in (Attach(b"g" * 16), Credit(bytes.fromhex(reader.stream.id), 1, 10_000), Heartbeat(0)):
            stranger.send_multipart(encode(message))
        assert stranger.poll(PATIENCE_S * 1000)
        assert isinstance(decode(stranger.recv_multipart()), Disconnect)
        stranger.send(b"nonsense")
        assert stranger.poll(PATIENCE_S * 1000)
        assert isinstance(decode(stranger.recv_multipart()), Disconnect)
        reader.end()
        assert went_direct(reader) == [True]
        assert not stranger.poll(0)


def door_of(cluster: LocalCluster) -> str:
    lines = [line for line in cluster.workers[0].log.read_text().splitlines() if " direct_offered " in line]
    return lines[0].rpartition("endpoint=")[2].strip() if lines else ""


# Commands.


def refused(*options: str) -> str:
    command = [sys.executable, "-m", "tokenmq.cli.worker", *SYNTHETIC, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    return line


def test_what_cannot_be_a_door_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "already in use" in refused("--direct", f"tcp://127.0.0.1:{port}")
    assert "name the one address" in refused("--direct", "tcp://*:6000", "--insecure")
    assert "--insecure" in refused("--direct", "tcp://192.0.2.1:6000")
    assert "invalid endpoint" in refused("--direct", "6000")
    assert "cannot listen" in refused("--direct", "tcp://192.0.2.1:6000", "--insecure")


def test_zmq_client_takes_its_answer_from_the_worker(cluster: LocalCluster) -> None:
    def ask(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tokenmq.cli.client", "--broker", cluster.frontend, "generate", MODEL, "x"]
        command += ["--max-tokens", "5", "--seed", "1", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)

    assert ask("--direct", "127.0.0.1").stdout.strip() == expected(1, 5)[1].strip()
    failed = ask("--direct", "127.0.0.1/8")
    assert failed.returncode != 0
    assert len(failed.stderr.splitlines()) == 1
    assert "an address in 127.0.0.0/8" in failed.stderr


def test_a_worker_that_stands_still_is_given_up_and_may_come_back(client: Client, cluster: LocalCluster) -> None:
    reader = read(client, 11, tokens=600)
    reader.wait_for(10)
    cluster.workers[0].send_signal(signal.SIGSTOP)
    eventually(lambda: len(reader.stream.attempts) > 1, "the attempt is given up")
    cluster.workers[0].send_signal(signal.SIGCONT)
    reader.end()
    assert went_direct(reader)[0]
