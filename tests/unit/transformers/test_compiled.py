"""The compiled forward: the same tokens whatever the rows and width; the plain forward where it fails."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.transformers.conftest import CONTEXT, make_model
from tokenmq.worker.engines.transformers import compiled as module
from tokenmq.worker.engines.transformers.cache import SlotCache
from tokenmq.worker.engines.transformers.compiled import Compiled
from tokenmq.worker.engines.transformers.packed import pack
from tokenmq.worker.engines.transformers.runner import Runner, compile_all
from tokenmq.worker.engines.transformers.selfcheck import check, layer_shapes
from tokenmq.worker.engines.transformers.space import Space


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own, while it compiles
@torch.inference_mode()
def test_packed_and_compiled_gives_the_same_logits_for_other_shapes_without_a_break() -> None:
    plain = make_model("llama")
    model = copy.deepcopy(plain)
    pack(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    quick = Compiled(model)
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
    quick = Compiled(model)
    ids = torch.tensor([[1, 2, 3]])
    with caplog.at_level(logging.WARNING, "tokenmq.worker"):
        for _ in range(2):
            assert torch.equal(quick(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM cannot be compiled, and runs as it is: no C++ compiler"
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_rows_that_go_twice_leave_what_they_leave_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.torch, "compile", lambda forward, **_: forward)
    model, left = make_model(kind), []
    for compiles in (False, True):
        shapes = layer_shapes(model, CONTEXT)
        runner = Runner(model, SlotCache(shapes, Space(3 * CONTEXT, 3, CONTEXT)), compile_decode=compiles)
        check(model, runner)
        compile_all(runner)
        runner.extend(0, [0], [[1, 2, 3, 4]])
        runner.extend(1, [0], [[9, 8, 7]])
        logits = [runner.decode([5], [4])]
        runner.replay(1, 3, [7])
        runner.replay(1, 4, list(range(10, 43)))
        logits.append(runner.decode([6, 6], [5, 37]))
        left.append([*logits, *runner.cache.row(0, 6), *runner.cache.row(1, 38)])
    for plain, paired in zip(*left, strict=True):
        torch.testing.assert_close(paired, plain, rtol=1e-4, atol=1e-4)


def test_where_the_compiler_fails_a_lone_row_goes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(module.torch, "compile", lambda forward, **_: fail)
    model = make_model("llama")
    runner = Runner(model, SlotCache(layer_shapes(model, 32), Space(96, 3, 32)), compile_decode=True)
    assert runner._pair(range(1)) == [0, 0]
    runner.decode([5], [0])
    assert runner._pair(range(1)) == [0]
    wide = Runner(model, SlotCache(layer_shapes(model, 32), Space(32, 1, 32)), compile_decode=True)
    assert wide._pair(range(1)) == [0], "with room for one row only it is not compiled"
