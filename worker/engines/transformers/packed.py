"""Weights of linear layers in the blocked layout of oneDNN's kernels, laid out once at load: CPU only.

torch's own linear layer keeps rows in order, so that each call lays the whole matrix out anew before it multiplies;
with few rows, as in a decode, that costs about as much as the product. The bits of the results are those of the
plain layer in bfloat16; in float32 they differ by rounding, and are, unlike the plain layer's, the same for any
number of rows from two on.

oneDNN picks its kernel by the number of rows and of threads. In bfloat16 up to STEADY_ROWS rows get the bits of one
row alone, with any number of threads that was tried (1 to 8). More do not, but where a row stands among them makes no
difference. Whoever wants a row's result to depend on that row only has it multiplied in blocks, see `Blocks`.

Nothing here knows a model by its name: every layer that is known to be called, and not read, by its parent is
replaced by one that computes the same, the whole is tried against the plain model, and put back if it differs.
Layers that are called with the same tensor are multiplied as one, see `joined`.
"""

from __future__ import annotations

import itertools
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .devices import first_line
from .joined import JoinedLinear, Joint, recorded, siblings

_log = logging.getLogger("tokenmq.worker")

#: Rows that the layout is chosen for: a batch of the size for which the engine is built. Others take it as it is.
ROWS = 16
#: Greatest relative difference between the packed and the plain model's outputs. float32 keeps to about 1e-5.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.05
#: Tokens that both are tried on.
TRIAL = 8
#: Most rows of one product whose bits are those of one row alone.
STEADY_ROWS = 32


# One opaque operation for torch.compile, which cannot look into a packed tensor: it would break the graph at each
# layer, and compile hundreds of pieces.
_library = torch.library.Library("tokenmq", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "packed_linear(Tensor inputs, int handle, int out_features) -> Tensor"
)
_layers: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()
_handles = itertools.count()


@dataclass(slots=True)
class Blocks:
    """How the packed layers of one model go through many rows.

    A block costs nearly the same whatever its size up to 128 rows, since the matrix is read anew for each: in
    SmolLM2, but for the output layer, 16 rows take 21 ms, 128 rows 29 ms at once and 74 ms in blocks of 32.

    Attributes:
        rows: so many at a time; None for all at once.
        filled: blocks that are not full are filled with zeros, so that all are of one size.
    """

    rows: int | None = None
    filled: bool = False

    @contextmanager
    def of(self, rows: int | None, *, filled: bool = False) -> Iterator[None]:
        """Let other blocks be multiplied."""
        before = self.rows, self.filled
        self.rows, self.filled = rows, filled
        try:
            yield
        finally:
            self.rows, self.filled = before


class PackedLinear(nn.Module):
    """What `nn.Linear` computes, from a packed weight.

    Attributes:
        blocks: how it goes through many rows.
        in_features: the last dimension of what it takes.
        out_features: the last dimension of what it gives.
        bias: [out_features], or None.
        weight: the packed matrix; opaque, but its dtype and device may be asked.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, blocks: Blocks | None = None) -> None:
        """Pack.

        Args:
            weight: [out_features, in_features]; it is copied.
            bias: [out_features], or None.
            blocks: shared with the model's other layers.
        """
        super().__init__()
        self.blocks = blocks or Blocks()
        self.out_features, self.in_features = weight.shape
        # Plain attributes: as parameters they would be taken for trainable, and moved by `Module.to`.
        self.weight: torch.Tensor
        self.bias: torch.Tensor | None
        object.__setattr__(self, "weight", _reorder(weight.detach()))
        object.__setattr__(self, "bias", None if bias is None else bias.detach())
        self._handle = next(_handles)
        _layers[self._handle] = self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs @ weight.T + bias, [..., out_features]."""
        if torch.compiler.is_compiling():
            result: torch.Tensor = torch.ops.tokenmq.packed_linear.default(inputs, self._handle, self.out_features)
            return result
        return self.multiply(inputs)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """Do what `forward` does, where nothing is compiled."""
        size = self.blocks.rows
        rows = inputs.numel() // self.in_features
        if not rows or size is None or rows == size or (rows < size and not self.blocks.filled):
            return self._product(inputs)
        flat = inputs.reshape(rows, self.in_features)
        if self.blocks.filled:
            flat = nn.functional.pad(flat, (0, 0, 0, -rows % size))
        parts = [self._product(flat[at : at + size]) for at in range(0, len(flat), size)]
        product = parts[0] if len(parts) == 1 else torch.cat(parts)
        return product[:rows].view(*inputs.shape[:-1], self.out_features)

    def _product(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
        return result

    def plain(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight, as it was before it was packed, and the bias."""
        return self.weight.to_dense(), self.bias

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _call(inputs: torch.Tensor, handle: int, out_features: int) -> torch.Tensor:
    return _layers[handle].multiply(inputs)


def _shape(inputs: torch.Tensor, handle: int, out_features: int) -> torch.Tensor:
    return inputs.new_empty((*inputs.shape[:-1], out_features))


_library.impl("packed_linear", _call, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("tokenmq::packed_linear", _shape, lib=_library)


def pack(model: Any) -> int:
    """Replace the linear layers of a model on a CPU by packed ones; call it when nothing else changes the model.

    Their plain weights are freed, but for one that is also the embedding's table: that is there twice afterwards. A
    model that does not give the same results packed is left as it was, and the log says so.

    Args:
        model: a transformers model in eval mode, whose first output tells what it computes.

    Returns:
        The number of replaced layers; 0 on other devices, other processors than x86, and in other dtypes.
    """
    if model.device.type != "cpu" or not _supported(model.dtype):
        return 0
    expected, groups = _observed(model)
    name = type(model).__name__
    while True:
        joined = sum(map(len, groups))
        count = _pack_all(model, groups)
        groups = []  # or the plain weights would stay
        problem = _problem(model, expected) if count else ""
        if not problem:
            break
        unpack(model)
        if not joined:
            _log.warning("%s keeps its plain weights: packed, it gave %s", name, problem)
            return 0
        _log.warning("%s: no layers are joined: so packed, it gave %s", name, problem)
    if count:
        _log.info("%s: %d linear layers packed for this processor, %d of them joined", name, count, joined)
    return count


def blocks_of(model: nn.Module) -> Blocks | None:
    """Return how the packed layers of a model go through many rows; None where it has none."""
    kinds = (PackedLinear, JoinedLinear)
    return next((module.blocks for module in model.modules() if isinstance(module, kinds)), None)


def unpack(model: nn.Module) -> int:
    """Undo `pack`, bit for bit; return the number of layers that were packed."""
    return _swap(model, _plain)


def _observed(model: Any) -> tuple[torch.Tensor, list[list[nn.Module]]]:
    """Return what the plain model gives in the trial, and the groups of layers to join."""
    parents = {child: parent for parent, _, child in _places(model) if _packable(child)}
    with recorded(parents) as calls:
        expected = _trial(model)
    return expected, siblings(calls, parents)


def _pack_all(model: nn.Module, groups: Sequence[Sequence[nn.Module]]) -> int:
    """Pack what can be packed, groups as one; return the number of layers."""
    blocks = Blocks()
    members = {layer: member for group in groups for layer, member in zip(group, _join(group, blocks), strict=True)}
    return _swap(model, lambda module: members.get(module) or _packed(module, blocks))


def _problem(model: Any, expected: torch.Tensor) -> str:
    """Return what is wrong with the model's results, if anything."""
    try:
        difference = _difference(_trial(model), expected)
    except Exception as error:  # noqa: BLE001 (whatever a model does with a layer that is not its own)
        return first_line(error)
    return "" if difference <= _tolerance(model.dtype) else f"a relative difference of {difference:.2g}"


def _swap(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put the modules that `other` gives in the place of those that it takes; return how many it gave."""
    made: dict[nn.Module, nn.Module | None] = {}
    for parent, name, child in _places(model):
        if child not in made:  # the same module may stand at two places
            made[child] = other(child)
        instead = made[child]
        if instead is not None:
            setattr(parent, name, instead)
    return sum(instead is not None for instead in made.values())


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return each module that is called, and not read, by its parent: the parent, its name there, and itself."""
    parents = [parent for parent in model.modules() if not _reads_children(parent)]
    return [(parent, name, child) for parent in parents for name, child in parent.named_children()]


def _reads_children(parent: nn.Module) -> bool:
    """Whether it may use its children's weights without calling them, as torch's own attention and encoders do."""
    own = type(parent).__module__.startswith("torch.")
    return own and not isinstance(parent, nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _packable(module: Any) -> bool:
    """Whether it is a plain layer that nothing is hooked into."""
    weight = getattr(module, "weight", None)
    # Exact types: a subclass, a quantised or a distributed weight computes something else.
    if type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
        return False
    if weight.device.type != "cpu" or weight.layout is not torch.strided or not _supported(weight.dtype):
        return False
    return bool(weight.numel()) and not module._forward_hooks and not module._forward_pre_hooks


def _packed(module: Any, blocks: Blocks) -> PackedLinear | None:
    """Return the packed layer of a plain one; None for any other module."""
    return PackedLinear(_rows(module), module.bias, blocks) if _packable(module) else None


def _join(layers: Sequence[Any], blocks: Blocks) -> list[JoinedLinear]:
    """Return the members of one joint that stand for plain layers, all of them with a bias or none."""
    rows = [_rows(layer) for layer in layers]
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
    joint = Joint(PackedLinear(torch.cat(rows), bias, blocks), [len(part) for part in rows])
    return [JoinedLinear(joint, place) for place in range(len(layers))]


def _rows(layer: Any) -> torch.Tensor:
    """Return a plain layer's weight, [out_features, in_features]."""
    weight: torch.Tensor = layer.weight.detach()
    return weight if type(layer) is nn.Linear else weight.t()


def _plain(module: nn.Module) -> nn.Linear | None:
    """Return the plain layer of a packed one; None for any other module."""
    if not isinstance(module, PackedLinear | JoinedLinear):
        return None
    weight, bias = module.plain()
    plain = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain.eval()


def _supported(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies in this dtype, and quicker from a packed weight: tried on x86 only."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)
    return packed


@torch.inference_mode()
def _trial(model: Any) -> torch.Tensor:
    """Return the model's first output for a few tokens, as float32."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[(17 * step + 5) % vocabulary for step in range(TRIAL)]])
    first: torch.Tensor = model(input_ids=ids)[0]
    return first.float()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference; NaN where they are not numbers."""
    return float((ours - theirs).norm() / theirs.norm())


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype is torch.float32 else TOLERANCE_HALF
