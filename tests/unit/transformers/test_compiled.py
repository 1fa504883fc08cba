"""The compiled forward: the same tokens whatever the rows and width; the plain forward where it fails."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.transformers.conftest import make_model
from tokenmq.worker.engines.transformers import compiled as module
from tokenmq.worker.engines.transformers.compiled import compiled
from tokenmq.worker.engines.transformers.packed import pack


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it compiles
@torch.inference_mode()
def test_packed_and_compiled_gives_the_same_logits_for_other_shapes_without_a_break() -> None:
    plain = make_model("llama")
    model = copy.deepcopy(plain)
    pack(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quick = compiled(model)
    for rows, tokens in ((2, 5), (3, 9), (4, 6)):
        ids = torch.arange(rows * tokens).view(rows, tokens)
        ours = quick(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(ours, plain(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.inference_mode()
def test_where_the_compiler_fails_the_plain_forward_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny: Callable[[str], Any]
) -> None:
    calls = []

    def refuse(forward: Any, **_: Any) -> Any:
        def fail(**inputs: Any) -> Any:
            calls.append(inputs)
            raise RuntimeError("no C++ compiler\nand more")

        return fail

    monkeypatch.setattr(module.torch, "compile", refuse)
    model = tiny("llama")
    quick = compiled(model)
    ids = torch.tensor([[1, 2, 3]])
    with caplog.at_level(logging.WARNING, "tokenmq.worker"):
        for _ in range(2):
            assert torch.equal(quick(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM cannot be compiled, and runs as it is: no C++ compiler"
    ]
