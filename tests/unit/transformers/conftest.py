"""Tiny models with random weights and a tokenizer that is trained on the spot: no network, no files."""

from __future__ import annotations

# First of all, since it sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tokenmq.protocol.payload import Generation, Prior, Sampling
from tokenmq.worker.engines.base import Done, Failed, Job, Output, Tokens
from tokenmq.worker.engines.transformers.batch import Batch
from tokenmq.worker.engines.transformers.engine import TransformersEngine

VOCABULARY = 320
CONTEXT = 96
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}<|bot|>{% endif %}"
TEXT = ["the sea is wide and the sky is blue", "wir gehen ans Meer 🌊", "你好世界", "naïve café 🙂🙃"]


def make_tokenizer(chat: bool = True) -> Any:
    """Return a byte-level BPE tokenizer: every byte is a token, so random ids give broken characters too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


def byte_chars() -> list[tuple[int, str]]:
    """Return each byte with the character that stands for it in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [(byte, chr(byte)) for byte in plain] + [(byte, chr(256 + n)) for n, byte in enumerate(others)]


def _sizes(**more: Any) -> dict[str, Any]:
    ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    return {"vocab_size": VOCABULARY, **ids, **more}


def make_model(kind: str) -> Any:
    """Return a small model in float32 whose next token depends on all tokens before it."""
    torch.manual_seed(7)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,  # far from uniform attention, so that a wrong mask or position shows
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**_sizes(**shape))).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_sizes(**shape))).eval()
    if kind == "gpt2":
        config = GPT2Config(**_sizes(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.4))
        return GPT2LMHeadModel(config).eval()
    raise ValueError(kind)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Return the tiny tokenizer, with a chat template."""
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
def make_engine(tiny: Callable[[str], Any], tokenizer: Any) -> Callable[..., TransformersEngine]:
    """Return a maker of loaded engines around a tiny model."""

    def make(kind: str = "llama", **settings: Any) -> TransformersEngine:
        settings = {"slots": 3, "prefill_tokens": 16, **settings}
        engine = TransformersEngine.from_loaded(tiny(kind), tokenizer, name="tiny", **settings)
        engine.load()
        return engine

    return make


def job(ticket: int, prompt: Sequence[int] | str, **sampling: Any) -> Job:
    """Return a job; greedy unless told otherwise."""
    wishes = Sampling(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    if isinstance(prompt, str):
        return Job(ticket, "tiny", Generation(prompt=prompt, sampling=wishes))
    return Job(ticket, "tiny", Generation(token_ids=tuple(prompt), sampling=wishes))


def resumed(ticket: int, whole: Job, token_ids: Sequence[int], text_chars: int = 0) -> Job:
    """Return the same job, to be continued behind these tokens."""
    prior = Prior(tuple(token_ids), text_chars)
    return replace(whole, ticket=ticket, generation=replace(whole.generation, prior=prior))


def batch_of(engine: TransformersEngine) -> Batch:
    """Return the engine's batch, to look into or to break."""
    assert engine._serving is not None
    return engine._serving.batch


class Record:
    """What came out for each ticket; checks on the way that nothing follows an end."""

    def __init__(self) -> None:
        """Start empty."""
        self.ids: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.ends: dict[int, Done | Failed] = {}

    def take(self, outputs: Sequence[Output]) -> None:
        """Add the outputs of a call."""
        for output in outputs:
            assert output.ticket not in self.ends, "an output after the end"
            if isinstance(output, Tokens):
                self.ids.setdefault(output.ticket, []).extend(output.token_ids)
                self.text[output.ticket] = self.text.get(output.ticket, "") + output.text
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


def run(engine: TransformersEngine, record: Record | None = None) -> Record:
    """Step until there are no jobs; check the invariants after each."""
    record = Record() if record is None else record
    while engine.next_step_in() is not None:
        record.take(engine.step())
        engine.validate()
    return record


def reference(model: Any, prompt: Sequence[int], tokens: int, ends: Sequence[int] = ()) -> list[int]:
    """Return what `model.generate` gives greedily, the end token included."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
