"""The commands as a user types them: answers, exit codes, signals, one clear line for each mistake."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster, LocalProcess, free_port
from tokenmq.worker.engines.synthetic import text_of, token_at

from .conftest import PATIENCE_S, eventually

BIN = Path(sys.executable).parent
MODEL = "toy"


def run(command: str, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [BIN / command, *arguments], input=stdin, capture_output=True, text=True, timeout=PATIENCE_S,
        env={**os.environ, **variables}, check=False,
    )  # fmt: skip


def text(seed: int, tokens: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(tokens))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        made.start_worker("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", "200")
        made.wait_ready(MODEL)
        yield made


@pytest.mark.parametrize("command", ["zmq-broker", "zmq-worker", "zmq-client"])
def test_help_is_quick_and_loads_no_torch(command: str) -> None:
    # Shown by the modules that are there afterwards, not by a clock.
    module = f"tokenmq.cli.{command.removeprefix('zmq-')}"
    code = f"import sys, {module}; print(sorted(m for m in sys.modules if m in ('torch', 'transformers')))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert shown.stdout.strip() == "[]"
    assert run(command, "--help").returncode == 0
    assert run(command, "--version").stdout.startswith(command)


@pytest.mark.parametrize("command", ["zmq-broker", "zmq-worker"])
def test_help_tells_default_and_variable_of_every_option(command: str) -> None:
    shown = run(command, "--help").stdout
    options = shown.split("Options:")[1]
    entries = [entry for entry in options.split("\n  -") if entry.strip() and "--help" not in entry]
    for entry in entries:
        if "-version" in entry:
            continue
        words = " ".join(entry.split())
        assert "env var: TOKENMQ_" in words, words
        assert "default" in words or "required" in words or words.startswith("-insecure"), words


def test_generate_prints_the_text(cluster: LocalCluster) -> None:
    done = run("zmq-client", "generate", MODEL, "x", "--max-tokens", "9", "--seed", "4", "--broker", cluster.frontend)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text(4, 9) + "\n"


def test_generate_reads_the_prompt_from_standard_input(cluster: LocalCluster) -> None:
    done = run("zmq-client", "--broker", cluster.frontend, "generate", MODEL, "-", "--json", stdin="one two three")
    assert json.loads(done.stdout.splitlines()[-1])["prompt_tokens"] == 3


def test_json_is_one_object_a_line(cluster: LocalCluster) -> None:
    done = run(
        "zmq-client", "generate", MODEL, "x", "--max-tokens", "9", "--seed", "4", "--json",
        TOKENMQ_CLIENT_BROKER=cluster.frontend,
    )  # fmt: skip
    *chunks, summary = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(chunk["text"] for chunk in chunks) == text(4, 9)
    assert chunks[0]["offset"] == 0
    assert summary["finish_reason"] == "length"
    assert summary["completion_tokens"] == 9
    assert summary["worker"] == "worker-1"


def test_chat_is_one_answer_or_a_conversation(cluster: LocalCluster) -> None:
    options = ("--max-tokens", "5", "--seed", "4", "--broker", cluster.frontend)
    one = run("zmq-client", "chat", MODEL, "Hello", *options)
    assert one.stdout == text(4, 5) + "\n"
    many = run("zmq-client", "chat", MODEL, *options, stdin="Hello\n\nand again\n")
    assert many.stdout == 2 * (text(4, 5) + "\n")


def test_models_workers_and_status(cluster: LocalCluster) -> None:
    models = run("zmq-client", "models", "--broker", cluster.frontend).stdout.splitlines()
    assert models[0].split()[:3] == ["NAME", "WORKERS", "READY"]
    assert models[1].split()[:3] == [MODEL, "1", "1"]
    workers = run("zmq-client", "workers", "--json", "--broker", cluster.frontend).stdout
    assert json.loads(workers)["name"] == "worker-1"
    status = json.loads(run("zmq-client", "status", "--json", "--broker", cluster.frontend).stdout)
    assert status["models"] == [MODEL]
    assert "counters" in run("zmq-client", "status", "--broker", cluster.frontend).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("generate", "llama3", "x"), 1, ["no worker serves 'llama3'", MODEL, "model_not_found"]),
        (("generate", MODEL, "x", "--max-tokens", "0"), 1, ["max_tokens", "bad_request"]),
        (("generate", MODEL, "x", "--temperature", "nan"), 1, ["temperature", "bad_request"]),
        (("generate", MODEL, ""), 1, ["prompt", "bad_request"]),
        (("generate", MODEL, "x", "--max-tokens", "many"), 2, ["--max-tokens"]),
        (("generate", MODEL, "x", "--deadline", "0.05", "--max-tokens", "900"), 1, ["deadline"]),
        (("generate", MODEL), 2, ["PROMPT"]),
        (("serve",), 2, ["No such command"]),
    ],
)
def test_a_mistake_is_one_clear_line(
    cluster: LocalCluster, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    done = run("zmq-client", "--broker", cluster.frontend, *arguments)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_no_broker_is_an_error_within_the_connect_timeout() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    done = run("zmq-client", "--broker", endpoint, "--connect-timeout", "0.5", "models")
    assert done.returncode == 1
    assert endpoint in done.stderr
    assert "no_broker" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("zmq-broker", "--frontend", "localhost:5555"), ["localhost:5555", "tcp://HOST:PORT"]),
        (("zmq-broker", "--frontend", "tcp://0.0.0.0:5999"), ["0.0.0.0", "--insecure"]),
        (("zmq-broker", "--expiry", "1"), ["expiry", "heartbeat"]),
        (("zmq-worker", "--engine", "synthetic", "--model", "m", "--slots", "0"), ["slots"]),
        (("zmq-worker", "--engine", "nonesuch", "--model", "m"), ["nonesuch", "synthetic", "transformers"]),
        (("zmq-worker", "--engine", "synthetic", "--model", "m", "--broker", "foo"), ["foo", "tcp://HOST:PORT"]),
        (("zmq-worker", "--engine", "synthetic", "--model", "m", "--broker", "tcp://*:5556"), ["tcp://*:5556"]),
        (("zmq-worker", "--engine", "synthetic", "--model", "m", "--broker", f"ipc://{'x' * 200}"), ["too long"]),
    ],
)
def test_a_wrong_option_is_one_clear_line(command: tuple[str, ...], words: list[str]) -> None:
    done = run(*command)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_broker_takes_more_clients_than_the_shells_limit_of_files(
    make_cluster: Callable[..., LocalCluster],
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, limits[1]))
    try:
        cluster = make_cluster()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(cluster.frontend, connect_timeout_s=10)) for _ in range(40)]
        assert [client.models() for client in clients] == [[]] * 40


def test_a_port_in_use_is_one_clear_line(cluster: LocalCluster) -> None:
    done = run("zmq-broker", "--frontend", cluster.frontend, "--backend", "tcp://127.0.0.1:*")
    assert done.returncode == 1
    assert done.stderr == f"error: cannot listen on {cluster.frontend}: the address is already in use\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_let_running_requests_finish(make_cluster: Callable[..., LocalCluster], number: int) -> None:
    cluster = make_cluster()
    cluster.start_worker("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", "20")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        first = client.generate(MODEL, prompt="x", max_tokens=20, seed=1)
        begun = next(first).text
        cluster.workers[0].send_signal(number)
        assert begun + first.text() == text(1, 20)
        assert cluster.workers[0].wait() == 0
        cluster.workers[0].restart()
        eventually(lambda: [row["state"] for row in client.workers()] == ["ready"], "the worker is back")
        second = client.generate(MODEL, prompt="x", max_tokens=20, seed=2)
        begun = next(second).text
        cluster.broker.send_signal(number)
        assert begun + second.text() == text(2, 20)
        assert cluster.broker.wait() == 0


def test_the_grace_time_ends_what_does_not_finish(make_cluster: Callable[..., LocalCluster]) -> None:
    cluster = make_cluster()
    cluster.start_worker("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", "5", "--grace", "0.5")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=1000, seed=1, resume=False)
        next(stream)
        cluster.workers[0].send_signal(signal.SIGTERM)
        assert cluster.workers[0].wait() == 0
        with pytest.raises(Exception, match="worker stopped") as caught:
            stream.text()
        assert caught.value.code == "draining"


def test_a_cluster_that_closes_lets_running_requests_finish(make_cluster: Callable[..., LocalCluster]) -> None:
    cluster = make_cluster()
    cluster.start_worker("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", "20")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=20, seed=1)
        begun = next(stream).text
        cluster.close()
        assert begun + stream.text() == text(1, 20)
    assert [process.exit_code for process in (*cluster.workers, cluster.broker)] == [0, 0]


_STUCK = """
import atexit, sys, time
from tokenmq.worker.engines.synthetic import SyntheticEngine

class Stuck(SyntheticEngine):
    def __init__(self, model, name, slots):
        super().__init__(name=name, slots=slots)

    def load(self):
        atexit.register(print, "torn down", file=sys.stderr)
        time.sleep(600)
"""


def test_a_worker_leaves_an_engine_that_is_stuck_as_it_is(
    make_cluster: Callable[..., LocalCluster], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "stuck_engine.py").write_text(_STUCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cluster = make_cluster()
    worker = cluster.start_worker("--engine", "stuck_engine:Stuck", "--model", MODEL)
    with Client(cluster.frontend) as client:
        eventually(lambda: [row["state"] for row in client.workers()] == ["loading"], "the worker loads")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    log = worker.log.read_text()
    assert "engine_abandoned" in log
    assert "worker_stopped" in log
    assert "torn down" not in log  # torch would abort the process here


@pytest.mark.parametrize("which", ["broker", "worker"])
def test_a_second_signal_exits_at_once(make_cluster: Callable[..., LocalCluster], which: str) -> None:
    cluster = make_cluster("--grace", "600")
    cluster.start_worker("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", "5", "--grace", "600")
    cluster.wait_ready(MODEL)
    process: LocalProcess = cluster.broker if which == "broker" else cluster.workers[0]
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="x", max_tokens=10_000, seed=1)
        next(stream)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: "draining" in process.log.read_text(), "the first signal drains")
        time.sleep(0.2)
        assert process.exit_code is None
        process.send_signal(signal.SIGTERM)
        assert process.wait() != 0
        stream.cancel()


def test_json_logs_carry_the_request_id(make_cluster: Callable[..., LocalCluster]) -> None:
    cluster = make_cluster("--log-format", "json")
    cluster.start_worker("--engine", "synthetic", "--model", MODEL, "--log-format", "json")
    cluster.wait_ready(MODEL)
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="a secret prompt", max_tokens=3)
        stream.text()
    for process in (cluster.broker, cluster.workers[0]):
        # What is sent comes before what is logged of it.
        eventually(lambda log=process.log: "request_finished" in log.read_text(), "the end is in the log")
        lines = [json.loads(line) for line in process.log.read_text().splitlines()]
        assert all({"time", "level", "logger", "event"} <= line.keys() for line in lines)
        assert any(line["event"] == "request_finished" and line["request"] == stream.id for line in lines)
        assert "secret" not in process.log.read_text()


def test_every_option_is_an_environment_variable_too() -> None:
    port = free_port()
    done = run(
        "zmq-broker", TOKENMQ_BROKER_FRONTEND=f"tcp://0.0.0.0:{port}", TOKENMQ_BROKER_BACKEND="tcp://127.0.0.1:*"
    )
    assert done.returncode == 1
    assert f"0.0.0.0:{port}" in done.stderr
    done = run("zmq-worker", TOKENMQ_WORKER_MODEL="m", TOKENMQ_WORKER_ENGINE="nonesuch")
    assert "nonesuch" in done.stderr
