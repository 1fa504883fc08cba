"""`zmq-broker --shards`: several brokers of one command, as workers, clients and operators see them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokenmq.cli.devices import cores
from tokenmq.client import Client, Stream
from tokenmq.client.local import LocalProcess
from tokenmq.protocol.messages import Chunk
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import PATIENCE_S, eventually, worker_names

BROKER, CLIENT = (str(Path(sys.executable).parent / command) for command in ("zmq-broker", "zmq-client"))
ANY = "tcp://127.0.0.1:*"
MODEL = "toy"
TOKENS = 100


class Shards:
    """The command, and two workers at all of its brokers."""

    def __init__(self, folder: Path, count: int) -> None:
        listen = ("--frontend", ANY, "--backend", ANY, "--grace", "30")
        self.processes: list[LocalProcess] = []
        self.supervisor = self._start(folder, "broker", "--shards", str(count), *listen)
        line = eventually(lambda: re.search(r" addresses .*", self.log), "it tells its addresses").group()
        said = dict(word.split("=", 1) for word in shlex.split(line) if "=" in word)
        self.frontends, self.backends = (said[whose].split()[1::2] for whose in ("clients", "workers"))
        assert len(self.frontends) == len(self.backends) == count
        brokers = said["workers"].split()
        for name in ("one", "two"):
            options = ("--engine", "synthetic", "--model", MODEL, "--slots", "64", "--tokens-per-second", "50")
            self._start(folder, "worker", *options, "--worker-name", name, *brokers)
        self.wait_ready()

    def _start(self, folder: Path, part: str, *options: str) -> LocalProcess:
        name = f"{part}-{len(self.processes)}"
        command = [sys.executable, "-m", f"tokenmq.cli.{part}", *options]
        self.processes.append(LocalProcess(name, command, folder / f"{name}.log"))
        return self.processes[-1]

    @property
    def log(self) -> str:
        return self.supervisor.log.read_text()

    @property
    def pids(self) -> list[int]:
        """The newest process of each broker."""
        found = dict(re.findall(r"shard_started shard=broker\.(\d+) .*pid=(\d+)", self.log))
        return [int(found[number]) for number in sorted(found)]

    def wait_ready(self) -> None:
        for frontend in self.frontends:
            with Client(frontend) as client:
                wait_for_both(client)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            process.finish()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Shards]:
    made = Shards(tmp_path, 2)
    yield made
    made.close()


def wait_for_both(client: Client) -> None:
    eventually(lambda: worker_names(client) == {"one", "two"}, "both workers are there")


def text(seed: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(TOKENS))


def begin(clients: list[Client]) -> tuple[list[Stream], list[Iterator[Chunk]], list[str]]:
    """Begin a stream at each client, and read its first tokens."""
    streams = [
        client.generate(MODEL, prompt="x", seed=seed, max_tokens=TOKENS) for seed, client in enumerate(clients)
    ]
    readers = [iter(stream) for stream in streams]
    texts = [next(reader).text for reader in readers]
    eventually(lambda: all(stream.attempts[-1].broker for stream in streams), "each knows where it runs")
    return streams, readers, texts


def rest(reader: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in reader)


def homes(streams: list[Stream]) -> Counter[str]:
    return Counter(stream.attempts[-1].broker for stream in streams)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_clients_spread_and_one_that_is_killed_costs_no_token_and_comes_back(pair: Shards) -> None:
    with contextlib.ExitStack() as stack:
        # Each submits as soon as it is made, before it can know which brokers are there. All at one: once in 2**23.
        clients = [stack.enter_context(Client(pair.frontends)) for _ in range(24)]
        streams, readers, texts = begin(clients)
        assert set(homes(streams)) == set(pair.frontends)
        dead, left = pair.frontends
        there = [stream.attempts[-1].broker == dead for stream in streams]
        before = pair.pids
        os.kill(before[0], signal.SIGKILL)
        texts = [first + rest(reader) for first, reader in zip(texts, readers, strict=True)]
        assert texts == [text(seed) for seed in range(len(clients))]
        assert [len(stream.attempts) for stream in streams] == [2 if was_there else 1 for was_there in there]
        assert set(homes(streams)) == {left}
        eventually(lambda: pair.pids[0] != before[0], "it is started again")
        assert pair.pids[1] == before[1]
        pair.wait_ready()

        def all_know_it_again() -> bool:
            again, readers, texts = begin(clients)
            texts = [first + rest(reader) for first, reader in zip(texts, readers, strict=True)]
            assert texts == [text(seed) for seed in range(len(clients))]
            return [stream.attempts[0].broker == dead for stream in again] == there

        eventually(all_know_it_again, "each is at the broker again that it has drawn")
        new = [stack.enter_context(Client(pair.frontends)) for _ in range(24)]
        streams, readers, _ = begin(new)
        assert set(homes(streams)) == set(pair.frontends)
        for stream in streams:
            stream.cancel()


def test_all_streams_of_a_client_are_at_one_broker(pair: Shards) -> None:
    with Client(pair.frontends) as client:
        streams, _, _ = begin([client] * 16)
        assert list(homes(streams).values()) == [16]
        for stream in streams:
            stream.cancel()


def test_each_broker_answers_for_itself(pair: Shards) -> None:
    brokers = [f"--broker={frontend}" for frontend in pair.frontends]
    done = subprocess.run(
        [CLIENT, *brokers, "status", "--each", "--json"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["broker"] for line in told if "broker" in line] == ["broker.0", "broker.1"]
    assert [list(line) == ["endpoint"] for line in told] == [True, False] * 2


def test_one_signal_drains_them_all(pair: Shards) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(pair.frontends)) for _ in range(12)]
        streams, readers, texts = begin(clients)
        pair.supervisor.send_signal(signal.SIGTERM)
        texts = [first + rest(reader) for first, reader in zip(texts, readers, strict=True)]
        assert texts == [text(seed) for seed in range(len(clients))]
        assert {len(stream.attempts) for stream in streams} == {1}
    assert pair.supervisor.wait(PATIENCE_S) == 0
    assert len(re.findall(r"broker_stopped unfinished=0 shard=broker\.[01]", pair.log)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_broker_outlives_its_supervisor(pair: Shards) -> None:
    pids = pair.pids
    assert len(pids) == 2
    assert all(map(alive, pids))
    pair.supervisor.kill()
    eventually(lambda: not any(map(alive, pids)), "they end with it")


@pytest.mark.skipif(sys.platform != "linux" or cores() < 2, reason="holds processes to two cores")
def test_the_benchmark_of_shards_runs(tmp_path: Path) -> None:
    script, path = Path(__file__).parents[2] / "benchmarks" / "shards.py", tmp_path / "rows.json"
    what = ("--relays", "1", "2", "--cases", "flat-16", "requests")
    done = subprocess.run(
        [sys.executable, script, "--quick", *what, "--json", path],
        capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(path.read_text())["rounds"]
    assert [(row["case"], row["relay"]) for row in rows] == [
        ("flat-16", "1"), ("flat-16", "2"), ("requests", "1"), ("requests", "2"),
    ]  # fmt: skip
    assert all(figure > 0 for row in rows for figure in row["figures"].values())


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        done = subprocess.run(
            [BROKER, "--shards", "2", "--frontend", ANY, "--backend", taken],
            capture_output=True, text=True, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == f"error: cannot listen on {taken}: the address is already in use\n"
