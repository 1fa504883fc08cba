"""A reader never notices a fault: real processes are killed, stopped, drained and restarted under running streams."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokenmq.client import (
    Client,
    DeadlineError,
    FirstTokenTimeoutError,
    InterTokenTimeoutError,
    NoBrokerError,
    NoWorkerError,
    QueueTimeoutError,
    Stream,
    TokenmqError,
    WorkerLostError,
)
from tokenmq.client.local import LocalCluster
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import PATIENCE_S, at_rest, eventually, worker_names

MODEL = "toy"
SYNTHETIC = ("--engine", "synthetic", "--model", MODEL)
RATE = 50
PACED = (*SYNTHETIC, "--slots", "50", "--tokens-per-second", str(RATE))

MakeCluster = Callable[..., LocalCluster]


def expected(seed: int, tokens: int) -> tuple[list[int], str]:
    ids = [token_at(seed, position) for position in range(tokens)]
    return ids, "".join(map(text_of, ids))


@dataclass
class Reader:
    """A thread that reads one stream, and what it has seen."""

    stream: Stream
    seed: int
    tokens: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    error: TokenmqError | None = None

    def __post_init__(self) -> None:
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for chunk in self.stream:
                with self._news:
                    self.ids.extend(chunk.token_ids)
                    self.text += chunk.text
                    self._news.notify_all()
        except TokenmqError as error:
            self.error = error
        with self._news:
            self._news.notify_all()

    def wait_for(self, tokens: int) -> None:
        """Wait until so many tokens have come."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.ids) >= tokens or self.error, PATIENCE_S)
            assert self.error is None, self.error

    def end(self) -> None:
        """Wait for the end; every token and character must be there once, as if nothing had happened."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the stream hangs"
        assert self.error is None, self.error
        assert (self.ids, self.text) == expected(self.seed, self.tokens)
        assert self.stream.finish_reason == "length"
        assert self.stream.usage is not None
        assert self.stream.usage.completion_tokens == self.tokens

    def causes(self) -> list[str]:
        """The codes of the errors that ended its attempts."""
        return [attempt.error.code for attempt in self.stream.attempts if attempt.error is not None]


def read(client: Client, seed: int, tokens: int = 100) -> Reader:
    return Reader(client.generate(MODEL, "x", max_tokens=tokens, seed=seed), seed, tokens)


@contextmanager
def two_workers(cluster: LocalCluster, *options: str) -> Iterator[Client]:
    for _ in range(2):
        cluster.start_worker(*PACED, *options)
    cluster.wait_ready(MODEL, workers=2)
    with Client(list(cluster.frontends), connect_timeout_s=PATIENCE_S) as client:
        yield client


def holder(client: Client) -> str:
    """The name of the worker that has the one request there is."""
    (name,) = eventually(
        lambda: [row["name"] for row in client.workers() if row["in_flight"]], "a worker has the request"
    )
    return str(name)


def test_a_killed_worker_costs_the_reader_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    with two_workers(cluster) as client:
        readers = [read(client, seed) for seed in range(20)]
        for reader in readers:
            reader.wait_for(3)
        cluster.workers[0].kill()
        for reader in readers:
            reader.end()
        hit = [reader for reader in readers if len(reader.stream.attempts) > 1]
        assert len(hit) == 10
        for reader in hit:
            first, second = reader.stream.attempts
            assert reader.causes() == ["worker_lost"]
            assert (first.worker, first.first_token) == ("worker-1", 0)
            assert (second.worker, second.error) == ("worker-2", None)
            assert 3 <= second.first_token < 100
        eventually(lambda: at_rest(client), "nothing is left at the broker")


def test_without_resume_it_is_an_error_at_once(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    with two_workers(cluster) as client:
        stream = client.generate(MODEL, "x", max_tokens=10_000, seed=1, resume=False)
        next(stream)
        cluster.workers[int(holder(client)[-1]) - 1].kill()
        with pytest.raises(WorkerLostError) as caught:
            stream.text()
        assert caught.value.retryable
        assert len(stream.attempts) == 1


def test_a_killed_broker_costs_nothing_where_there_is_another(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(brokers=2)
    with two_workers(cluster) as client:
        # Before both sessions are open, requests go to the one that is.
        eventually(lambda: _broker_of(client) == cluster.frontends[0], "the client prefers the first broker")
        readers = [read(client, seed) for seed in range(10)]
        for reader in readers:
            reader.wait_for(3)
        cluster.brokers[0].kill()
        for reader in readers:
            reader.end()
            assert reader.causes() == ["broker_lost"]
            brokers = [attempt.broker for attempt in reader.stream.attempts]
            assert brokers == list(cluster.frontends)
        # It comes back, and is preferred again.
        cluster.brokers[0].restart()

        def back() -> bool:
            with Client(cluster.frontends[0], connect_timeout_s=PATIENCE_S) as other:
                return len(worker_names(other)) == 2

        eventually(back, "both workers are back at the first broker")
        eventually(lambda: _broker_of(client) == cluster.frontends[0], "the client goes to the first broker again")


def _broker_of(client: Client) -> str:
    stream = client.generate(MODEL, "x", max_tokens=1)
    stream.text()
    return stream.attempts[-1].broker


def test_a_restart_of_the_only_broker_is_only_a_pause(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    with two_workers(cluster) as client:
        readers = [read(client, seed) for seed in range(10)]
        for reader in readers:
            reader.wait_for(3)
        cluster.broker.kill()
        cluster.broker.restart()
        for reader in readers:
            reader.end()
            # The young broker may have to say that no worker is back yet.
            assert reader.causes()[0] == "broker_lost"
            assert set(reader.causes()) <= {"broker_lost", "no_worker"}


def test_a_request_made_while_no_worker_is_back_yet_waits_for_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    with Client(cluster.frontend, connect_timeout_s=PATIENCE_S) as client:
        reader = read(client, 3, 5)
        eventually(lambda: reader.causes() and reader.causes()[0] == "no_worker", "the broker has no worker")
        cluster.start_worker(*PACED)
        reader.end()


def test_a_stopped_worker_is_fenced_and_comes_back(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--heartbeat-interval", "0.2", "--expiry", "1")
    with two_workers(cluster) as client:
        readers = [read(client, seed, 300) for seed in range(10)]
        for reader in readers:
            reader.wait_for(3)
        cluster.workers[0].send_signal(signal.SIGSTOP)
        eventually(lambda: worker_names(client) == {"worker-2"}, "the stopped worker is given up")
        cluster.workers[0].send_signal(signal.SIGCONT)
        eventually(lambda: worker_names(client) == {"worker-1", "worker-2"}, "it registers anew")
        for reader in readers:
            reader.end()
        assert sum(reader.causes() == ["worker_lost"] for reader in readers) == 5
        eventually(lambda: at_rest(client), "nothing is left at the broker or the workers")
        assert client.status()["counters"]["disconnected"] >= 1


def test_what_a_worker_sent_before_it_left_is_read_before_it_is_given_up(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    worker = cluster.start_worker(*SYNTHETIC, "--tokens-per-second", "2000")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend, window_tokens=100_000) as client:
        tokens = 1500  # about as many messages: more than the broker takes in one round
        reader = Reader(client.generate(MODEL, "x", max_tokens=tokens, seed=6), 6, tokens)
        reader.wait_for(1)
        cluster.broker.send_signal(signal.SIGSTOP)
        worker.terminate()
        assert worker.wait(PATIENCE_S) == 0
        cluster.broker.send_signal(signal.SIGCONT)
        reader.end()
        assert reader.causes() == []


def test_rolling_restart_of_everything_fails_no_request(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--grace", "0.5", brokers=2)
    stop = threading.Event()
    failures: list[BaseException] = []
    made = [0]

    def load(client: Client, seed: int) -> None:
        try:
            while not stop.is_set():
                reader = read(client, seed, 75)
                reader.end()
                made[0] += 1
                seed += 1000
        except BaseException as error:
            failures.append(error)

    with two_workers(cluster, "--grace", "0.5") as client:
        threads = [threading.Thread(target=load, args=(client, seed), daemon=True) for seed in range(20)]
        for thread in threads:
            thread.start()
        for process in [*cluster.workers, *cluster.brokers]:
            before = made[0]
            eventually(lambda before=before: made[0] > before or failures, "streams flow")
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
            process.restart()
            cluster.wait_ready(MODEL, workers=2)
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a stream hangs"
        assert not failures, failures[0]
        eventually(lambda: at_rest(client), "nothing is left")


def test_drain_by_command_hands_over_what_does_not_end_in_time(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    with two_workers(cluster) as client:
        long, short = read(client, 1, 200), read(client, 2, 200)
        long.wait_for(3)
        short.wait_for(3)
        done = _zmq_client(cluster, "drain", "worker-1", "--grace", "0.3", "--wait", "30")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == ["worker-1 drains; requests in flight: 1", "worker-1 has left"]
        assert cluster.workers[0].wait(PATIENCE_S) == 0
        long.end()
        short.end()
        assert sorted([long.causes(), short.causes()]) == [[], ["draining"]]
        wrong = _zmq_client(cluster, "drain", "worker-9")
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("error: ")
        assert "worker-9" in wrong.stderr
        assert "worker-2" in wrong.stderr


def _zmq_client(cluster: LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenmq.cli.client", "--broker", cluster.frontend, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_the_command_goes_on_too_and_tells_of_it(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster()
    with two_workers(cluster) as client:
        command = [sys.executable, "-m", "tokenmq.cli.client", "--broker", cluster.frontend]
        command += ["generate", MODEL, "x", "--max-tokens", "100", "--seed", "5", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]
            cluster.workers[int(holder(client)[-1]) - 1].kill()
            lines += process.stdout.readlines()
        rows = [json.loads(line) for line in lines]
        assert [token for row in rows[:-1] for token in row["token_ids"]] == expected(5, 100)[0]
        assert [attempt["error"] for attempt in rows[-1]["attempts"]] == ["worker_lost", None]


def test_two_brokers_see_each_others_load(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("--heartbeat-interval", "0.1", "--expiry", "2", brokers=2)
    cluster.start_worker(*SYNTHETIC, "--slots", "4", "--tokens-per-second", "20")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontends[0]) as one, Client(cluster.frontends[1], queue_timeout_s=0.5) as two:
        running = [read(one, seed, 10_000) for seed in range(4)]
        for reader in running:
            reader.wait_for(1)

        def others() -> bool:
            (row,) = two.workers()
            return bool(row["in_flight"] == 0 and row["running"] == 4)

        eventually(others, "the second broker knows of the first one's requests")
        with pytest.raises(QueueTimeoutError):
            two.generate(MODEL, "x", max_tokens=1).text()
        for reader in running:
            reader.stream.cancel()
        eventually(lambda: at_rest(one) and at_rest(two), "all slots are free")
        assert two.generate(MODEL, "x", max_tokens=3, seed=1).text() == expected(1, 3)[1]


def test_each_timeout_has_an_error_of_its_own(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    worker = cluster.start_worker(*SYNTHETIC, "--slots", "2", "--tokens-per-second", "20")
    cluster.wait_ready(MODEL)
    patience = {"max_attempts": 1, "connect_timeout_s": PATIENCE_S}
    with Client(cluster.frontend, first_token_timeout_s=0.5, inter_token_timeout_s=0.5, **patience) as client:
        with pytest.raises(DeadlineError):
            client.generate(MODEL, "x", max_tokens=10_000, deadline_s=0.3).text()
        stream = client.generate(MODEL, "x", max_tokens=10_000)
        next(stream)
        worker.send_signal(signal.SIGSTOP)  # for less than the expiry: only the reader notices
        with pytest.raises(InterTokenTimeoutError):
            stream.text()
        with pytest.raises(FirstTokenTimeoutError):
            client.generate(MODEL, "x", max_tokens=1).text()
        worker.send_signal(signal.SIGCONT)
        eventually(lambda: at_rest(client), "what was given up is cancelled")


def test_a_silent_worker_is_left_for_another(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker(*PACED)
    cluster.wait_ready(MODEL, workers=2)
    with Client(cluster.frontend, inter_token_timeout_s=0.7, connect_timeout_s=PATIENCE_S) as client:
        reader = read(client, 8, 100)
        reader.wait_for(3)
        name = holder(client)
        cluster.workers[int(name[-1]) - 1].send_signal(signal.SIGSTOP)
        reader.end()
        assert reader.causes() == ["inter_token_timeout"]
        assert reader.stream.attempts[0].worker == name != reader.stream.attempts[1].worker


def test_a_reader_that_pauses_costs_others_nothing_and_gets_all(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.start_worker(*SYNTHETIC, "--slots", "2", "--tokens-per-second", "200")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend, window_tokens=16, inter_token_timeout_s=0.5) as client:
        paused = client.generate(MODEL, "x", max_tokens=400, seed=1)
        ids = list(next(paused).token_ids)
        # Its engine is done long before it reads on; two others use both slots meanwhile, longer than any timeout.
        others = [read(client, seed, 200) for seed in (2, 3)]
        for reader in others:
            reader.end()
        eventually(lambda: client.workers()[0]["parked"] == 1, "only its tokens wait, and no slot")
        for chunk in paused:
            ids.extend(chunk.token_ids)
        assert ids == expected(1, 400)[0]
        assert len(paused.attempts) == 1, "a pause of the reader is no silence of the worker"


def test_random_aborts_leave_every_counter_at_zero(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    draw = random.Random(11)
    with two_workers(cluster) as client:
        for _ in range(4):
            streams = [client.generate(MODEL, "x", max_tokens=draw.choice([5, 10_000])) for _ in range(150)]
            draw.shuffle(streams)
            for number, stream in enumerate(streams):  # waiting, running, and ended ones
                if number % 3 == 0:
                    stream.cancel()
                elif number % 3 == 1:
                    left = draw.randint(1, 3)
                    for _ in stream:
                        left -= 1
                        if not left:
                            break
            del streams, stream  # and what nobody refers to any more
            eventually(lambda: at_rest(client), "nothing is left")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_dies_or_falls_silent_frees_its_rows(make_cluster: MakeCluster, number: int) -> None:
    cluster = make_cluster("--heartbeat-interval", "0.2", "--expiry", "1")
    with two_workers(cluster) as client:
        command = [sys.executable, "-m", "tokenmq.cli.client", "--broker", cluster.frontend]
        command += ["generate", MODEL, "x", "--max-tokens", "100000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.read(5)
            process.send_signal(number)
            eventually(lambda: at_rest(client), "its request is gone everywhere")
            process.kill()


def test_attempts_are_bounded(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.start_worker(*PACED)
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend, max_attempts=3, recovery_timeout_s=PATIENCE_S) as client:
        stream = client.generate(MODEL, "x", max_tokens=10_000)
        for kills in range(3):  # a request that kills every worker that runs it
            while len([attempt for attempt in stream.attempts if attempt.worker]) == kills:
                next(stream)  # may be a token that the one before had sent
            cluster.workers[0].kill()
            cluster.workers[0].restart()
            cluster.wait_ready(MODEL)
        with pytest.raises(WorkerLostError, match="that was the last of 3 attempts"):
            stream.text()


def test_being_without_a_worker_or_a_broker_is_bounded(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.start_worker(*PACED)
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend, recovery_timeout_s=1.0, connect_timeout_s=1.0) as client:
        stream = client.generate(MODEL, "x", max_tokens=10_000)
        next(stream)
        cluster.workers[0].kill()
        with pytest.raises(NoWorkerError, match="nobody has taken the request for"):
            stream.text()
        cluster.broker.kill()
        with pytest.raises(NoBrokerError):
            client.generate(MODEL, "x", max_tokens=1).text()
