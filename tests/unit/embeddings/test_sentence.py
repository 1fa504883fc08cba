"""What a model's files say of its vectors, through the engine that loads them from a folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

from tokenmq.protocol.messages import ModelInfo
from tokenmq.worker.engines.base import EngineLoadError
from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine
from tokenmq.worker.engines.transformers.sentence import read_recipe

from .conftest import POSITIONS, TEXTS, job, run, states_of

MakeFolder = Callable[..., Path]
Tiny = Callable[[str], Any]
NORMALIZED = ("Transformer", "Pooling", "Normalize")
CLS = {"1_Pooling/config": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}


def loaded(folder: Path, **settings: Any) -> EmbeddingEngine:
    engine = EmbeddingEngine(model=folder, device="cpu", **settings)
    engine.load()
    return engine


def embedded(folder: Path, *texts: str, **settings: Any) -> numpy.ndarray:
    return run(loaded(folder, **settings), job(1, *texts)).matrix(1)


def states(tiny: Tiny, tokenizer: Any, text: str, kind: str = "bert") -> torch.Tensor:
    return states_of(tiny(kind), tokenizer(text, padding=False, truncation=False).input_ids)


def test_the_switches_of_older_files(make_folder: MakeFolder, tiny: Tiny, tokenizer: Any) -> None:
    found = embedded(make_folder(**CLS), *TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        assert numpy.abs(vector - states(tiny, tokenizer, text)[0].numpy()).max() < 1e-5


def test_the_mode_of_newer_files_and_vectors_side_by_side(
    make_folder: MakeFolder, tiny: Tiny, tokenizer: Any
) -> None:
    folder = make_folder("qwen3", **{"1_Pooling/config": {"pooling_mode": ["lasttoken", "mean"]}})
    for text, vector in zip(TEXTS, embedded(folder, *TEXTS), strict=True):
        alone = states(tiny, tokenizer, text, "qwen3")
        assert numpy.abs(vector - torch.cat([alone[-1], alone.mean(0)]).numpy()).max() < 1e-5


def test_normalisation(make_folder: MakeFolder, tiny: Tiny, tokenizer: Any) -> None:
    folder = make_folder(modules=NORMALIZED, **{"1_Pooling/config": {"pooling_mode": "mean"}})
    found = embedded(folder, *TEXTS)
    assert numpy.abs(numpy.linalg.norm(found, axis=1) - 1).max() < 1e-6
    mean = states(tiny, tokenizer, TEXTS[2]).mean(0)
    assert numpy.abs(found[2] - (mean / mean.norm()).numpy()).max() < 1e-5


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_dense_layer(file: str, adds: bool, make_folder: MakeFolder, tiny: Tiny, tokenizer: Any) -> None:
    dense = {
        "in_features": 32, "out_features": 8, "bias": True, "use_residual": adds,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }  # fmt: skip
    folder = make_folder(modules=("Transformer", "Pooling", "Dense"), **CLS, **{"2_Dense/config": dense})
    torch.manual_seed(1)
    weights = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
    if adds:
        weights["residual.weight"] = torch.randn(8, 32)
    if file.endswith("bin"):
        torch.save(weights, folder / "2_Dense" / file)
    else:
        save_file(weights, folder / "2_Dense" / file)
    found = embedded(folder, "the sea")
    first = states(tiny, tokenizer, "the sea")[0]
    expected = torch.tanh(weights["linear.weight"] @ first + weights["linear.bias"])
    if adds:
        expected = expected + weights["residual.weight"] @ first
    assert numpy.abs(found[0] - expected.numpy()).max() < 1e-5


def test_the_limit_of_the_files_and_one_that_the_user_sets(make_folder: MakeFolder) -> None:
    folder = make_folder(sentence_bert_config={"max_seq_length": 12}, **CLS)
    engine = EmbeddingEngine(model=folder, device="cpu", name="mine")
    assert engine.load() == [ModelInfo("mine", context_tokens=12, generates=False, embeds=True)]
    assert "at most 12 a text" in run(engine, job(1, "~" * 11)).failed(1).message
    assert EmbeddingEngine(model=folder, device="cpu", max_context=40).load()[0].context_tokens == 40
    (folder / "sentence_bert_config.json").unlink()
    assert EmbeddingEngine(model=folder, device="cpu").load()[0].context_tokens == POSITIONS


def test_the_default_prompt_stands_before_every_text(
    make_folder: MakeFolder, tiny: Tiny, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tokenmq.worker")
    prompts = {"prompts": {"query": "ask: ", "document": ""}, "default_prompt_name": "query"}
    folder = make_folder(config_sentence_transformers=prompts, **CLS)
    found = embedded(folder, "sea")
    assert numpy.abs(found[0] - states(tiny, tokenizer, "ask: sea")[0].numpy()).max() < 1e-5
    assert "put before each text: 'ask: '; prompts that it knows: {'query': 'ask: '}" in caplog.text


def test_a_prompt_that_is_not_pooled(make_folder: MakeFolder, tiny: Tiny, tokenizer: Any) -> None:
    prompts = {"prompts": {"query": "the sea"}, "default_prompt_name": "query"}
    pooling = {"1_Pooling/config": {"pooling_mode": "mean", "include_prompt": False}}
    found = embedded(make_folder(config_sentence_transformers=prompts, **pooling), " is wide")
    prompt_tokens = len(tokenizer("the sea", padding=False, truncation=False).input_ids) - 1  # without [SEP]
    expected = states(tiny, tokenizer, "the sea is wide")[prompt_tokens:].mean(0)
    assert numpy.abs(found[0] - expected.numpy()).max() < 1e-5


def test_lower_case(make_folder: MakeFolder) -> None:
    folder = make_folder(sentence_bert_config={"do_lower_case": True}, **CLS)
    upper, lower = embedded(folder, "The SEA", "the sea")
    assert (upper == lower).all()


def test_a_transformer_in_a_folder_of_its_own(make_folder: MakeFolder, tiny: Tiny, tokenizer: Any) -> None:
    folder = make_folder(**CLS)
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [*folder.glob("config.json"), *folder.glob("model*"), *folder.glob("tokenizer*")]:
        shutil.move(str(file), inner)
    modules = (folder / "modules.json").read_text().replace('"path": ""', '"path": "0_Transformer"')
    (folder / "modules.json").write_text(modules)
    found = embedded(folder, "sea")
    assert numpy.abs(found[0] - states(tiny, tokenizer, "sea")[0].numpy()).max() < 1e-5


def test_a_model_without_a_pooler_and_one_of_a_masked_language_model(make_folder: MakeFolder, tiny: Tiny) -> None:
    from transformers import BertForMaskedLM

    folder = make_folder(**CLS)
    before = embedded(folder, *TEXTS)
    masked = BertForMaskedLM(tiny("bert").config)
    masked.bert.load_state_dict(tiny("bert").state_dict(), strict=False)
    masked.save_pretrained(folder)  # has no pooler, and a head
    assert numpy.abs(embedded(folder, *TEXTS) - before).max() < 1e-6


def refusal(folder: Path) -> str:
    with pytest.raises(EngineLoadError) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_there_is_refused_with_one_line(make_folder: MakeFolder) -> None:
    folder = make_folder(modules=("Transformer", "Pooling", "CNN"), **CLS)
    assert "modules.json asks for CNN behind the pooling; this engine has Dense, Normalize, Dropout" in refusal(
        folder
    )


def test_other_refusals(make_folder: MakeFolder) -> None:
    dense = {"in_features": 32, "out_features": 8, "activation_function": "os.system"}
    folder = make_folder(modules=("Transformer", "Pooling", "Dense"), **CLS, **{"2_Dense/config": dense})
    assert "activation function 'os.system' is none of torch.nn" in refusal(folder)
    (folder / "2_Dense" / "config.json").write_text('{"in_features": 31, "out_features": 8}')
    assert "2_Dense has no weights" in refusal(folder)
    save_file(
        {"linear.weight": torch.zeros(8, 31), "linear.bias": torch.zeros(8)}, folder / "2_Dense/model.safetensors"
    )
    assert "BertModel does not embed: " in refusal(folder)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "median"}')
    assert "pooling 'median' is unknown; there are cls, max, mean" in refusal(folder)
    (folder / "modules.json").write_text("[")
    assert "what it says of its embeddings is damaged" in refusal(folder)
    (folder / "modules.json").write_text('[{"type": "a.Router", "path": ""}, {"type": "a.Normalize", "path": ""}]')
    assert "begins with Router and Normalize" in refusal(folder)
    with pytest.raises(EngineLoadError, match="not by GGUF files"):
        EmbeddingEngine(model="some.gguf").load()


def test_an_encoder_without_a_word_on_embeddings(make_folder: MakeFolder) -> None:
    folder = make_folder(**CLS)
    (folder / "modules.json").unlink()
    assert read_recipe(str(folder)).poolings is None
    assert loaded(folder)._ready()[0].modes == ("mean",)
