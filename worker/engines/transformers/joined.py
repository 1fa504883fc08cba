"""Linear layers that are called with the very same tensor, multiplied as one packed matrix: see `packed`.

A product with few rows reads its matrix and does little else, so that one over the rows of three costs less than
three, and torch.compile's custom operation has a price for each call besides. Which layers these are is seen in a
forward of the plain model: nothing here knows one by its name, either.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from .packed import Blocks, PackedLinear


class Joint:
    """The product that some layers have in common: the first one called computes it, each next one takes its part.

    Whoever is called out of turn, or with another tensor, computes anew. So a tensor that was changed in place since
    is not taken for the same, unless that happened between two members' calls in their usual order.

    Attributes:
        whole: the layer over all members' rows.
        sizes: each member's out_features.
        kept: a tensor, the parts of its product, and the place of the member that is called next; else None.
    """

    # No dataclass with slots: torch.compile has to follow what is set here.
    def __init__(self, whole: PackedLinear, sizes: Sequence[int]) -> None:
        """Join.

        Args:
            whole: the layer over all members' rows.
            sizes: each member's out_features, in the order in which they are called.
        """
        self.whole = whole
        self.sizes = list(sizes)
        self.kept: tuple[torch.Tensor, Sequence[torch.Tensor], int] | None = None

    def part(self, place: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return what the member at a place gives for the inputs: a view of the whole product."""
        kept, self.kept = self.kept, None
        if kept is not None and kept[0] is inputs and kept[2] == place:
            parts = kept[1]
        else:
            parts = self.whole(inputs).split_with_sizes(self.sizes, -1)
        if place + 1 < len(self.sizes):
            self.kept = (inputs, parts, place + 1)
        return parts[place]


class JoinedLinear(nn.Module):
    """Stands in the place of one plain layer, and gives its part of the joint's product.

    Attributes:
        joint: shared with the other members.
        place: where it stands among them.
        in_features: the last dimension of what it takes.
        out_features: the last dimension of what it gives.
    """

    def __init__(self, joint: Joint, place: int) -> None:
        """Become a member.

        Args:
            joint: shared with the other members.
            place: where it stands among them.
        """
        super().__init__()
        self.joint, self.place = joint, place
        self.in_features, self.out_features = joint.whole.in_features, joint.sizes[place]

    @property
    def blocks(self) -> Blocks:
        """How it goes through many rows."""
        return self.joint.whole.blocks

    @property
    def weight(self) -> torch.Tensor:
        """The joint's packed matrix; opaque, but its dtype and device may be asked."""
        return self.joint.whole.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[out_features], or None."""
        bias = self.joint.whole.bias
        return None if bias is None else bias.split_with_sizes(self.joint.sizes)[self.place]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs @ weight.T + bias, [..., out_features]; a view."""
        return self.joint.part(self.place, inputs)

    def plain(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return its own weight, as it was before it was packed, and its bias."""
        weight, bias = self.weight.to_dense().split_with_sizes(self.joint.sizes)[self.place], self.bias
        return weight.clone(), None if bias is None else bias.clone()  # a view would keep the others' rows

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        biased = self.joint.whole.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={biased}"


@contextmanager
def recorded(layers: Iterable[nn.Module]) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Note each call of the layers: which one, and the tuple of what it was called with."""
    calls: list[tuple[nn.Module, Any]] = []
    hooks = [layer.register_forward_pre_hook(lambda *call: calls.append(call)) for layer in layers]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def siblings(calls: Sequence[tuple[nn.Module, Any]], parents: Mapping[nn.Module, nn.Module]) -> list[list[nn.Module]]:
    """Return the layers to join, in the order of their calls.

    Args:
        calls: what was `recorded`; it keeps the tensors, so that no two of them have the same id.
        parents: the module that each layer is a child of.

    Returns:
        Groups of two and more. Those of one group have the same parent, were called once each, directly after one
        another and with the same tensor, and have the same dtype and all a bias, or none.
    """
    times = Counter(layer for layer, _ in calls)

    def kind(call: tuple[nn.Module, Any]) -> tuple[Any, ...]:
        layer, args = call
        alone = layer if times[layer] > 1 else None
        return parents[layer], tuple(map(id, args)), layer.weight.dtype, layer.bias is None, alone

    groups = [[layer for layer, _ in group] for _, group in itertools.groupby(calls, kind)]
    return [group for group in groups if len(group) > 1 and times[group[0]] == 1]
