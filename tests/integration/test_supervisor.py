"""`zmq-worker --devices`: processes under a supervisor, as a user and as a broker see them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenmq.cli.devices import cores
from tokenmq.client import Client
from tokenmq.client.local import LocalCluster, LocalProcess
from tokenmq.protocol.messages import Chunk
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import PATIENCE_S, eventually, worker_names

WORKER = str(Path(sys.executable).parent / "zmq-worker")
MODEL = "toy"
SYNTHETIC = ("--engine", "synthetic", "--model", MODEL)


def alive(pid: int) -> bool:
    """Whether this process runs; one that has ended and that nobody has waited for does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def pids(process: LocalProcess) -> dict[str, int]:
    """The workers that the supervisor has started, by name: the newest process of each."""
    found = re.findall(r"worker_started worker=(\S+) .*pid=(\d+)", process.log.read_text())
    return {name: int(pid) for name, pid in found}


@pytest.fixture
def pair(make_cluster: Callable[..., LocalCluster]) -> LocalCluster:
    """A broker, and one command with two workers."""
    cluster = make_cluster()
    cluster.start_worker(*SYNTHETIC, "--tokens-per-second", "50", "--devices", "cpu,cpu", "--worker-name", "twin")
    cluster.wait_ready(MODEL, workers=2)
    return cluster


def text(seed: int, tokens: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(tokens))


def rest(reader: Iterator[Chunk]) -> str:
    return "".join(chunk.text for chunk in reader)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_that_is_killed_comes_back_and_no_stream_notices(pair: LocalCluster) -> None:
    with Client(pair.frontend) as client:
        assert worker_names(client) == {"twin-0", "twin-1"}
        before = {row["name"]: row["incarnation"] for row in client.workers()}
        streams = [client.generate(MODEL, prompt="x", seed=seed, max_tokens=150) for seed in range(4)]
        readers = [iter(stream) for stream in streams]
        texts = [next(reader).text for reader in readers]
        first = pids(pair.workers[0])
        os.kill(first["twin-0"], signal.SIGKILL)
        texts = [begin + rest(reader) for begin, reader in zip(texts, readers, strict=True)]
        assert texts == [text(seed, 150) for seed in range(4)]
        assert [len(stream.attempts) for stream in streams].count(2) == 2, "two of them were there"
        eventually(lambda: worker_names(client) == {"twin-0", "twin-1"}, "it is back")
        after = {row["name"]: row["incarnation"] for row in client.workers()}
    assert after["twin-0"] > before["twin-0"]
    assert after["twin-1"] == before["twin-1"]
    assert pids(pair.workers[0])["twin-1"] == first["twin-1"]


def test_sigterm_drains_them_all(pair: LocalCluster) -> None:
    with Client(pair.frontend) as client:
        streams = [client.generate(MODEL, prompt="x", seed=seed, max_tokens=60) for seed in range(4)]
        readers = [iter(stream) for stream in streams]
        texts = [next(reader).text for reader in readers]
        pair.workers[0].send_signal(signal.SIGTERM)
        assert [begin + rest(reader) for begin, reader in zip(texts, readers, strict=True)] == [
            text(seed, 60) for seed in range(4)
        ]
        assert [len(stream.attempts) for stream in streams] == [1] * 4
    assert pair.workers[0].wait(PATIENCE_S) == 0
    lines = pair.workers[0].log.read_text().splitlines()
    assert len([line for line in lines if "worker_stopped reason=drained" in line]) == 2
    assert lines[-1].endswith("supervisor supervisor_stopped exit_code=0")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_second_signal_ends_them_at_once(pair: LocalCluster) -> None:
    with Client(pair.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=10_000)
        reader = iter(stream)
        assert next(reader).text
        supervisor = pair.workers[0]
        supervisor.send_signal(signal.SIGINT)
        eventually(lambda: "supervisor_draining" in supervisor.log.read_text(), "it drains")
        supervisor.send_signal(signal.SIGINT)
        assert supervisor.wait(PATIENCE_S) == 128 + signal.SIGINT
        stream.cancel()
    assert not any(alive(pid) for pid in pids(supervisor).values())


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_supervisor_that_dies_leaves_nobody_behind(pair: LocalCluster, number: int) -> None:
    children = pids(pair.workers[0])
    assert len(children) == 2
    assert all(alive(pid) for pid in children.values())
    pair.workers[0].send_signal(number)
    eventually(lambda: not any(alive(pid) for pid in children.values()), "they end with it")


def test_ctrl_c_reaches_the_workers_once(pair: LocalCluster) -> None:
    """In a terminal it goes to the whole process group; a worker that got it twice would not drain."""
    with Client(pair.frontend) as client:
        stream = client.generate(MODEL, prompt="x", seed=9, max_tokens=60)
        reader = iter(stream)
        begin = next(reader).text
        os.killpg(os.getpgid(pair.workers[0].pid), signal.SIGINT)
        assert begin + rest(reader) == text(9, 60)
        assert len(stream.attempts) == 1
    assert pair.workers[0].wait(PATIENCE_S) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_sigterm_for_all_processes_of_a_service_drains_too(pair: LocalCluster) -> None:
    with Client(pair.frontend) as client:
        stream = client.generate(MODEL, prompt="x", seed=9, max_tokens=60)
        reader = iter(stream)
        begin = next(reader).text
        for pid in (*pids(pair.workers[0]).values(), pair.workers[0].pid):
            os.kill(pid, signal.SIGTERM)
        assert begin + rest(reader) == text(9, 60)
        assert len(stream.attempts) == 1
    assert pair.workers[0].wait(PATIENCE_S) == 0


def test_a_worker_that_a_broker_drains_is_not_started_again(pair: LocalCluster) -> None:
    with Client(pair.frontend) as client:
        client.drain("twin-1")
        supervisor = pair.workers[0]
        eventually(lambda: "worker_ended worker=twin-1 exit_code=0" in supervisor.log.read_text(), "it has left")
        client.drain("twin-0")
    assert supervisor.wait(PATIENCE_S) == 0
    assert supervisor.log.read_text().count("worker_started") == 2


def test_every_line_tells_whose_it_is(make_cluster: Callable[..., LocalCluster]) -> None:
    cluster = make_cluster()
    cluster.start_worker(*SYNTHETIC, "--devices", "cpu,cpu", "--worker-name", "twin")
    cluster.wait_ready(MODEL, workers=2)
    cluster.workers[0].stop()
    lines = cluster.workers[0].log.read_text().splitlines()
    assert all(re.search(r" (worker=twin-[01]|supervisor supervisor_)", line) for line in lines), lines
    registered = [line for line in lines if " registered " in line]
    assert sorted(line[-13:] for line in registered) == ["worker=twin-0", "worker=twin-1"]


@pytest.fixture
def own_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the engines of this folder."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.usefixtures("own_engines")
def test_a_worker_that_is_stuck_is_started_again(
    make_cluster: Callable[..., LocalCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUSY_S", "3600")
    cluster = make_cluster()
    cluster.start_worker(
        "--engine", "busy_engine:BusyEngine", "--model", MODEL, "--devices", "cpu", "--worker-name", "w",
        "--restart-after", "0.5",
    )  # fmt: skip
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        [before] = client.workers()
        stream = client.generate(MODEL, prompt="x", max_tokens=5)
        log = cluster.workers[0].log
        eventually(lambda: "engine_stuck" in log.read_text(), "it notices")
        stream.cancel()
        eventually(lambda: "worker_ended worker=w-0 exit_code=1" in log.read_text(), "it ends")
        eventually(lambda: worker_names(client) == {"w-0"}, "it is back")
        assert client.workers()[0]["incarnation"] > before["incarnation"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("--devices", "GPU"),
            "error: --devices: 'GPU' is no device; expected all, or a list such as 0,1 or cpu,cpu",
        ),
        (("--devices", "cpu,cpu", "--device", "cpu"), "error: --device and --devices: give one of them"),
        (("--devices", "cpu,cpu", "--slots", "0"), "error: slots: expected 1 to 65536, got 0"),
        (("--devices", "cpu,cpu", "--broker", "foo"), "foo"),
    ],
)
def test_a_wrong_option_is_one_line(options: tuple[str, ...], line: str) -> None:
    done = subprocess.run(
        [WORKER, *SYNTHETIC, *options], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert line in done.stderr


def test_what_no_worker_can_start_with_ends_the_command() -> None:
    done = subprocess.run(
        [WORKER, "--engine", "nonesuch", "--model", "m", "--devices", "cpu,cpu"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: no engine is named 'nonesuch'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("own_engines")
def test_cores_are_shared_unless_the_user_says_how_many_threads(make_cluster: Callable[..., LocalCluster]) -> None:
    cluster = make_cluster()
    probe = ("--engine", "threads_engine:ThreadsEngine", "--devices", "cpu,cpu")
    cluster.start_worker(*probe, "--model", "shared")
    cluster.start_worker(*probe, "--model", "told", "--threads", "7")
    cluster.wait_ready(f"shared-{max(1, cores() // 2)}", workers=2)
    cluster.wait_ready("told-7", workers=2)
