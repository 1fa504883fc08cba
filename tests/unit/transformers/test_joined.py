"""Joined linear layers: who is joined, the same results whoever is called when, and nothing kept behind a forward."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.transformers.conftest import VOCABULARY, make_model
from tokenmq.worker.engines.transformers.joined import JoinedLinear
from tokenmq.worker.engines.transformers.packed import (
    Blocks,
    PackedLinear,
    _join,
    _layers,
    _supported,
    blocks_of,
    pack,
    unpack,
)

pytestmark = pytest.mark.skipif(not _supported(torch.float32), reason="packs on x86 with oneDNN only")

IDS = torch.tensor([[5, 9, 200, 31, 7], [1, 1, 2, 3, 5]])
NAMES = ("first", "second", "third")


class Siblings(nn.Module):
    """Stands for a model: three layers of one parent, and what is done with them."""

    device = torch.device("cpu")

    def __init__(self, way: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.way = way
        self.table = nn.Embedding(VOCABULARY, 32)
        for name, size in zip(NAMES, (24, 8, 8), strict=True):
            setattr(self, name, nn.Linear(32, size, bias=way != "bias" or name == "first"))
        self.requires_grad_(False).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        given = self.table(input_ids)
        first = self.first(given)
        if self.way == "between":
            first = first + self.first(given)
        second = self.second(given + 1 if self.way == "tensors" else given)
        if self.way == "changes":
            given.add_(1)
        if self.way == "flat":
            second = second.view(-1).view(second.shape)
        return (torch.cat([first, second, self.third(given.clone() if self.way == "tensors" else given)], -1),)


def joined_in(model: nn.Module) -> list[str]:
    return [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, JoinedLinear)]


def joint_of(*sizes: int, wide: int = 32, biased: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """Return plain layers, and the members that stand for them."""
    plain = [nn.Linear(wide, size, bias=biased).requires_grad_(False).to(dtype) for size in sizes]
    return plain, _join(plain, Blocks())


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS)[0]
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "names"), [
    ("llama", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] * 2),
    ("qwen2", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"] * 2),
    ("gpt2", []),
])  # fmt: skip
def test_layers_that_take_the_same_tensor_are_joined(kind: str, names: list[str]) -> None:
    model = make_model(kind)
    for name, parameter in model.named_parameters():  # zero in a new model
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    plain = logits(model)

    pack(model)

    assert joined_in(model) == names
    close(logits(model), plain)


def test_a_joint_is_one_product() -> None:
    model = make_model("llama")
    before = len(_layers)
    pack(model)
    assert len(_layers) - before == 2 * 4 + 1, "a layer's q/k/v, o, gate/up and down, and the head"


@pytest.mark.parametrize(("way", "names"), [
    ("usual", ["first", "second", "third"]),
    ("bias", ["second", "third"]),
    ("between", ["second", "third"]),
    ("tensors", []),
])  # fmt: skip
def test_only_layers_alike_that_are_called_once_with_one_tensor_are_joined(way: str, names: list[str]) -> None:
    model = Siblings(way).eval()
    plain = logits(model)

    assert pack(model) == 3

    assert joined_in(model) == names
    close(logits(model), plain)


@pytest.mark.parametrize(("way", "told"), [("changes", "relative difference"), ("flat", "view")])
def test_where_a_model_minds_its_layers_are_packed_apart(
    way: str, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Siblings(way).eval()
    plain = logits(model)

    with caplog.at_level(logging.WARNING, "tokenmq.worker"):
        assert pack(model) == 3

    assert joined_in(model) == []
    assert type(model.first) is type(model.second) is type(model.third) is PackedLinear
    assert [told in record.getMessage() for record in caplog.records] == [True]
    close(logits(model), plain)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1), (0, 0, 1), (2,), (0, 1, 0, 2, 1, 2)])
@torch.inference_mode()
def test_members_give_their_own_in_any_order_and_for_any_tensor(order: tuple[int, ...]) -> None:
    plain, members = joint_of(24, 8, 8)
    given = [torch.randn(2, 3, 32), torch.randn(2, 3, 32)]
    for turn in (0, 1, 0):
        for step, place in enumerate(order):
            for tensor in (given[turn], given[(turn + step) % 2]):
                close(members[place](tensor), plain[place](tensor))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (2, 0)])
@torch.inference_mode()
def test_a_tensor_that_is_changed_between_the_turns_is_multiplied_anew(order: tuple[int, ...]) -> None:
    plain, members = joint_of(24, 8, 8)
    given = torch.randn(4, 32)
    for _ in range(3):
        for place in order:
            close(members[place](given), plain[place](given))
        given.add_(1)


@torch.inference_mode()
def test_another_tensor_between_the_calls_disturbs_nothing() -> None:
    plain, (first, second, third) = joint_of(24, 8, 8, biased=False)
    one, other = torch.randn(4, 32), torch.randn(5, 32)
    first(one)
    close(second(other), plain[1](other))
    close(third(one), plain[2](one))
    close(second(one), plain[1](one))
    close(first(other), plain[0](other))
    close(third(other), plain[2](other))


@torch.inference_mode()
def test_nothing_is_kept_after_the_last_member() -> None:
    _, members = joint_of(24, 8, 8)
    given = torch.randn(4, 32)
    results = [member(given) for member in members]
    assert members[0].joint.kept is None
    assert results[0].untyped_storage().data_ptr() == results[2].untyped_storage().data_ptr(), "one product"
    gone = weakref.ref(given)
    del given
    assert gone() is None


def test_a_joint_goes_with_its_model() -> None:
    model = make_model("llama")
    pack(model)
    logits(model)
    members = [module for module in model.modules() if isinstance(module, JoinedLinear)]
    assert all(member.joint.kept is None for member in members)
    handles = {member.joint.whole._handle for member in members}
    assert len(handles) == 4
    del model, members
    gc.collect()
    assert not handles & set(_layers)


def test_a_member_tells_what_a_plain_layer_does() -> None:
    plain, members = joint_of(24, 8)
    for one, member in zip(plain, members, strict=True):
        assert (member.in_features, member.out_features) == (one.in_features, one.out_features)
        assert (member.weight.dtype, member.weight.device) == (one.weight.dtype, one.weight.device)
        assert torch.equal(member.bias, one.bias)
        assert repr(member) == repr(one).replace("Linear", "JoinedLinear")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_unpack_gives_each_its_own_weight_and_bias(kind: str) -> None:
    model = make_model(kind)
    if kind == "qwen2":
        nn.init.normal_(model.model.layers[1].self_attn.k_proj.bias)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    count = pack(model)
    assert joined_in(model)

    assert unpack(model) == count

    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, before[name]), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, "it does not keep the others' rows"


def test_joined_layers_go_through_the_models_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Siblings("usual").eval()
    plain = logits(model)
    assert blocks_of(model) is None
    pack(model)
    blocks, rows, product = blocks_of(model), [], PackedLinear._product
    assert blocks is not None
    assert blocks is model.first.blocks is model.third.blocks

    def counted(layer: PackedLinear, inputs: torch.Tensor) -> torch.Tensor:
        rows.append(inputs.numel() // 32)
        return product(layer, inputs)

    monkeypatch.setattr(PackedLinear, "_product", counted)
    for filled in (False, True):
        with blocks.of(4, filled=filled):
            close(logits(model), plain)
    assert rows == [4, 4, 2, 4, 4, 4]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
@torch.inference_mode()
def test_a_joint_is_one_operation_of_one_graph() -> None:
    model = make_model("llama")
    pack(model)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain = logits(model)
    torch._dynamo.reset()
    quick = torch.compile(model.forward, backend=keep, dynamic=True, fullgraph=True)
    for _ in range(2):
        close(quick(input_ids=IDS, use_cache=False).logits, plain)

    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes]
    assert targets.count(torch.ops.tokenmq.packed_linear.default) == 2 * 4 + 1
    assert all(module.joint.kept is None for module in model.modules() if isinstance(module, JoinedLinear))


@pytest.mark.skipif(not _supported(torch.bfloat16), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("sizes", [(576, 192, 192), (1536, 1536)])
@torch.inference_mode()
def test_in_bfloat16_the_bits_are_those_of_the_plain_layers(sizes: tuple[int, ...]) -> None:
    plain, members = joint_of(*sizes, wide=576, biased=False, dtype=torch.bfloat16)
    for rows in (1, 2, 5, 16, 31, 32):
        given = torch.randn(rows, 576).bfloat16()
        for one, member in zip(plain, members, strict=True):
            assert torch.equal(member(given), one(given)), rows
