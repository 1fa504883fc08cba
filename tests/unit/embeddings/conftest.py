"""Tiny embedding models with random weights, and vectors computed from them one text at a time, without padding."""

from __future__ import annotations

# First of all, since it sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    RobertaConfig,
    RobertaModel,
)

from tokenmq.protocol.payload import Generation
from tokenmq.worker.engines.base import Done, Failed, Job, Output, Tokens
from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine

VOCABULARY = 320
POSITIONS = 64
ENCODERS = ("bert", "roberta")
DECODERS = ("llama", "qwen3", "gpt2")
TEXTS = (
    "the sea is wide",
    "a",
    "wir gehen ans Meer 🌊 und schauen",
    "sky",
    "the sky is blue and the sea is blue",
    "naïve café",
    "x y z",
)


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer that puts every text between [CLS] and [SEP]."""
    special = ["[PAD]", "<pad>", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As many published tokenizers have it; neither may show in a vector.
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]")


def make_model(kind: str) -> Any:
    """Return a small model in float32 whose states depend on all that they may see."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "initializer_range": 0.3, "pad_token_id": 1,
    }  # fmt: skip
    if kind == "bert":
        return BertModel(BertConfig(**shape)).eval()
    if kind == "roberta":
        return RobertaModel(RobertaConfig(**shape)).eval()
    if kind == "llama":
        return LlamaModel(LlamaConfig(num_key_value_heads=2, **shape)).eval()
    if kind == "qwen3":
        return Qwen3Model(Qwen3Config(num_key_value_heads=2, head_dim=8, **shape)).eval()
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
    return GPT2Model(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **small)).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Return the tiny tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Any]:
    """Return a maker of tiny models that makes each once."""
    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind not in made:
            made[kind] = make_model(kind)
        return made[kind]

    return make


@pytest.fixture
def make_engine(tiny: Callable[[str], Any], tokenizer: Any) -> Callable[..., EmbeddingEngine]:
    """Return a maker of loaded engines around a tiny model."""

    def make(kind: str = "bert", **settings: Any) -> EmbeddingEngine:
        settings = {"slots": 8, "step_tokens": 64, **settings}
        engine = EmbeddingEngine.from_loaded(tiny(kind), tokenizer, name="tiny", **settings)
        engine.load()
        return engine

    return make


@pytest.fixture
def make_folder(tiny: Callable[[str], Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of folders as sentence-transformers writes them."""

    def make(kind: str = "bert", modules: Sequence[str] = ("Transformer", "Pooling"), **files: Any) -> Path:
        folder = tmp_path / f"tiny-{kind}"
        tiny(kind).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        listed = [
            {
                "idx": number,
                "path": f"{number}_{name}" if number else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for number, name in enumerate(modules)
        ]
        for module in listed[1:]:
            (folder / str(module["path"])).mkdir()
        contents = {"modules": listed, **files}
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return make


def job(ticket: int, *texts: str, priority: int = 5) -> Job:
    """Return a request for the vectors of these texts."""
    return Job(ticket, "tiny", Generation(texts=texts), priority=priority)


def states_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the last layer's states of one text alone: [tokens, width]."""
    with torch.inference_mode():
        states: torch.Tensor = model(input_ids=torch.tensor([list(ids)]))[0][0]
    return states


class Record:
    """What came out for each ticket; checks on the way that nothing follows an end, and no vector comes twice."""

    def __init__(self) -> None:
        """Start empty."""
        self.vectors: dict[int, dict[int, numpy.ndarray]] = {}
        self.ends: dict[int, Done | Failed] = {}

    def take(self, outputs: Sequence[Output]) -> None:
        """Add the outputs of a call."""
        for output in outputs:
            assert output.ticket not in self.ends, "an output after the end"
            if isinstance(output, Tokens):
                assert (output.token_ids, output.text) == ((), "")
                assert output.details is not None
                mine = self.vectors.setdefault(output.ticket, {})
                assert output.index not in mine
                mine[output.index] = numpy.frombuffer(output.details.vector, "<f4")
            else:
                self.ends[output.ticket] = output

    def done(self, ticket: int) -> Done:
        """Return a ticket's Done."""
        end = self.ends[ticket]
        assert isinstance(end, Done), end
        return end

    def failed(self, ticket: int) -> Failed:
        """Return a ticket's Failed."""
        end = self.ends[ticket]
        assert isinstance(end, Failed), end
        return end

    def matrix(self, ticket: int) -> numpy.ndarray:
        """Return a ticket's vectors in the order of its texts."""
        mine = self.vectors[ticket]
        assert sorted(mine) == list(range(len(mine)))
        return numpy.stack([mine[number] for number in range(len(mine))])


def run(engine: EmbeddingEngine, *jobs: Job, record: Record | None = None) -> Record:
    """Submit the jobs, and step until there are none; check the invariants after each step."""
    record = Record() if record is None else record
    for each in jobs:
        record.take(engine.submit(each))
    while engine.next_step_in() is not None:
        record.take(engine.step())
        engine.validate()
    return record
