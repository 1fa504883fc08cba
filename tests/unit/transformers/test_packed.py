"""Packed linear layers: the same results, nothing replaced that should not be, put back where a model minds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.transformers.conftest import VOCABULARY, job, make_model, reference, run
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.joined import JoinedLinear
from tokenmq.worker.engines.transformers.packed import Blocks, PackedLinear, _supported, pack, unpack

pytestmark = pytest.mark.skipif(not _supported(torch.float32), reason="packs on x86 with oneDNN only")

IDS = torch.tensor([[5, 9, 200, 31, 7], [1, 1, 2, 3, 5]])


def packed_in(model: nn.Module) -> int:
    return sum(isinstance(module, PackedLinear | JoinedLinear) for module in model.modules())


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (0, 32)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_layer_computes_what_the_plain_one_does(shape: tuple[int, ...], biased: bool) -> None:
    plain = nn.Linear(32, 48, bias=biased).eval()
    given = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain.weight, plain.bias)(given), plain(given), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not _supported(torch.bfloat16), reason="this processor does not multiply bfloat16")
def test_in_bfloat16_the_bits_are_those_of_the_plain_layer() -> None:
    plain = nn.Linear(64, 96, bias=False).bfloat16()
    packed = PackedLinear(plain.weight, None)
    with torch.inference_mode():
        for rows in (1, 2, 16, 31):
            given = torch.randn(rows, 64).bfloat16()
            assert torch.equal(packed(given), plain(given))


@pytest.mark.parametrize("rows", [1, 5, 32, 33, 80])
def test_blocks_change_nothing_but_the_order(rows: int) -> None:
    plain, blocks = nn.Linear(32, 48).eval(), Blocks()
    packed = PackedLinear(plain.weight, plain.bias, blocks)
    given = torch.randn(rows, 1, 32)
    with torch.inference_mode():
        for size, filled in ((32, False), (32, True), (128, True)):
            with blocks.of(size, filled=filled):
                torch.testing.assert_close(packed(given), plain(given), rtol=1e-5, atol=1e-5)
    assert (blocks.rows, blocks.filled) == (None, False)


@pytest.mark.skipif(not _supported(torch.bfloat16), reason="this processor does not multiply bfloat16")
def test_in_filled_blocks_a_row_has_the_same_bits_in_any_company() -> None:
    blocks = Blocks(128, filled=True)
    packed = PackedLinear(torch.randn(192, 576).bfloat16(), None, blocks)
    given = torch.randn(300, 576).bfloat16()
    with torch.inference_mode():
        all_of_them = packed(given)
        for first, last in ((0, 1), (3, 20), (100, 180), (290, 300)):
            assert torch.equal(packed(given[first:last]), all_of_them[first:last])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_packed_model_gives_the_same_logits(kind: str) -> None:
    model = make_model(kind)
    plain = logits(model)
    layers = sum(type(module).__name__ in ("Linear", "Conv1D") for module in model.modules())

    assert pack(model) == layers == packed_in(model)

    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


def test_packing_again_finds_nothing_to_do() -> None:
    model = make_model("llama")
    assert pack(model) > 0
    assert pack(model) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_unpack_gives_the_weights_back_bit_for_bit(kind: str) -> None:
    model = make_model(kind)
    plain = logits(model)
    count = pack(model)

    assert unpack(model) == count
    assert packed_in(model) == 0
    if kind == "llama":  # gpt2's own layers multiply by another function, which may round otherwise
        assert torch.equal(logits(model), plain)
    torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)


def test_a_layer_that_stands_at_two_places_is_packed_once() -> None:
    model = make_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    plain = logits(model)

    pack(model)

    assert first.mlp.up_proj is second.mlp.up_proj
    assert type(first.mlp.up_proj) is PackedLinear, "it is called twice, so it is not joined with any"
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


def test_the_table_of_a_tied_embedding_stays() -> None:
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    plain = logits(model)

    pack(model)

    assert isinstance(model.lm_head, PackedLinear)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


def test_hooked_and_derived_layers_and_those_that_torch_reads_itself_stay_plain() -> None:
    class Derived(nn.Linear):
        pass

    model = make_model("llama")
    layer, other = model.model.layers
    layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    layer.mlp.down_proj = Derived(48, 32, bias=False)
    other.encoder = nn.TransformerEncoderLayer(32, 4)
    plain = logits(model)

    pack(model)

    assert type(layer.mlp.up_proj) is nn.Linear
    assert type(layer.mlp.down_proj) is Derived
    assert type(other.encoder.linear1) is nn.Linear
    assert packed_in(model) > 0
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


class Reader(nn.Linear):
    """Uses a child's weight without calling the child."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.inner.weight)


def test_a_model_that_reads_a_weight_itself_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    inner = model.model.layers[0].mlp.up_proj
    reader = Reader(32, 48, bias=False)
    reader.inner = inner
    model.model.layers[0].mlp.up_proj = reader
    plain = logits(model)

    with caplog.at_level(logging.WARNING, "tokenmq.worker"):
        assert pack(model) == 0

    assert packed_in(model) == 0
    assert torch.equal(logits(model), plain)
    assert "keeps its plain weights" in caplog.text


def test_a_model_that_computes_something_else_packed_is_left_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model("llama")
    inner = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: inner(ids) * (1 + packed_in(model))
    plain = logits(model)

    with caplog.at_level(logging.WARNING, "tokenmq.worker"):
        assert pack(model) == 0

    assert torch.equal(logits(model), plain)
    assert "relative difference" in caplog.text


def test_greedy_equals_generate_of_the_plain_model(tokenizer: Any, tiny: Callable[[str], Any]) -> None:
    prompts = [[7, 40, 3], [250, 11, 12, 13, 200, 7], [99]]
    for kind in ("llama", "qwen2", "gpt2"):
        model = copy.deepcopy(tiny(kind))
        assert pack(model) > 0
        engine = TransformersEngine.from_loaded(model, tokenizer, name="tiny", slots=3, prefill_tokens=16)
        engine.load()
        for ticket, prompt in enumerate(prompts):
            engine.submit(job(ticket, prompt, max_tokens=12))
        record = run(engine)
        for ticket, prompt in enumerate(prompts):
            assert record.ids[ticket] == reference(tiny(kind), prompt, 12, [0])


@pytest.mark.parametrize("dtype", [torch.float64])
def test_other_dtypes_stay_plain(dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    assert pack(model) == 0
    assert packed_in(model) == 0
