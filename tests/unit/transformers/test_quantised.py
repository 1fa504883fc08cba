"""Quantised checkpoints, as transformers loads them; what is said where their library is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import quantizer_bnb_4bit

from tokenmq.worker.engines.base import EngineLoadError
from tokenmq.worker.engines.transformers.engine import TransformersEngine

from .conftest import CONTEXT, VOCABULARY, job, make_tokenizer, reference, run

LENGTHS = [1, 5, 17, 30, 50]
MOST = 12


def prompt_of(number: int) -> list[int]:
    return [1 + (31 * number + 7 * step + step * step) % 300 for step in range(LENGTHS[number])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small Llama whose layers have room for a block of 64 weights."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
    )
    folder = tmp_path_factory.mktemp("quantised") / "plain"
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **more)


@pytest.fixture(scope="module")
def quantised(plain: Path) -> Path:
    """Return the folder of a checkpoint in bitsandbytes' 4 bits."""
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    folder = plain.parent / "nf4"
    loaded(plain, quantization_config=how).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, which would like to fetch a quicker kernel from a hub
def test_four_bits_equal_their_own_generate(plain: Path, quantised: Path) -> None:
    engine = TransformersEngine(model=quantised, name="tiny", device="cpu", slots=3, prefill_tokens=16)
    engine.load()
    assert engine._loaded is not None
    layer = engine._loaded.model.model.layers[0].self_attn.q_proj
    assert type(layer).__name__ == "Linear4bit", "packing leaves what is quantised alone"
    for number in range(len(LENGTHS)):
        engine.submit(job(number, prompt_of(number), max_tokens=MOST, ignore_eos=True))
    record, model = run(engine), loaded(quantised)
    wanted = [reference(model, prompt_of(number), MOST) for number in range(len(LENGTHS))]
    assert [record.ids[number] for number in range(len(LENGTHS))] == wanted
    assert wanted != [reference(loaded(plain), prompt_of(number), MOST) for number in range(len(LENGTHS))]


@pytest.mark.filterwarnings("ignore")
def test_a_missing_library_is_named_in_one_line(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(EngineLoadError) as refused:
        TransformersEngine(model=quantised, device="cpu").load()
    message = str(refused.value)
    assert message.startswith(f"cannot load {quantised}: ")
    assert "pip install" in message
    assert "bitsandbytes" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("how", "library"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
    ],
)
def test_what_cannot_be_tried_here_names_its_library(
    how: dict[str, Any], library: str, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    with pytest.raises(EngineLoadError) as refused:
        TransformersEngine(model=folder, device="cpu").load()
    assert f"pip install {library}" in str(refused.value)
    assert "\n" not in str(refused.value)
