"""The slot KV cache: where the keys and values of all running rows live, allocated once.

Each attention layer has one K and one V, runs of memory that are seen as [rows, kv_heads, stride, head_dim]; see
`space` for the stride. A row is left-aligned in its slot: its token number i stands in column i, whatever the other
rows do. So nothing is shifted or padded when a row joins or leaves, and no shared write column grows for ever, as it
does with left padding. What a slot holds behind its row's length is left over from other rows; it is finite, and the
mask hides it.

It plugs into an unmodified transformers model as its `past_key_values`: the layers here receive the new keys and
values, store them where the present `Access` says, and hand the model views of the slots. No copy is made, but of the
one slot of a replay.

Beside it stands the prefix store: blocks of keys and values that are copied in and out, see `prefix`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .space import Space


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores for each token, and which of them it looks at.

    Attributes:
        key_heads: heads of K.
        key_dim: numbers of each.
        value_heads: heads of V; they may differ.
        value_dim: numbers of each.
        dtype: of both.
        device: where they are.
        window: a token sees so many, itself included; None for all.
    """

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in this layer."""
        return (self.key_heads * self.key_dim + self.value_heads * self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Prefill:
    """A forward over the same new columns of neighbouring slots: `first_slot` onward, columns from `start`."""

    first_slot: int
    start: int


@dataclass(frozen=True, slots=True)
class Extend:
    """A forward over new columns of neighbouring slots, of each row its own.

    Attributes:
        first_slot: the first of the slots.
        slots: long [tokens]: the slot of each token that is stored, padding left out.
        columns: long [tokens]: its column there.
        rows: long [tokens]: its row in the forward.
        places: long [tokens]: its place in that row.
        width: columns that the model shall see.
    """

    first_slot: int
    slots: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    width: int


@dataclass(frozen=True, slots=True)
class Decode:
    """A forward over one token of each of the slots from 0.

    Attributes:
        rows: long [n], 0 to n - 1.
        columns: long [n], where each row's token is stored.
        width: columns that the model shall see, the greatest of `columns` + 1 or more.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    width: int


@dataclass(frozen=True, slots=True)
class Replay:
    """A forward over several tokens of one slot, each as a row of its own, as if they were decoded.

    Each layer stores the keys and values of all these rows before it reads any, so that a row finds those in front
    of it.

    Attributes:
        rows: long [n], the slot, n times.
        columns: long [n], where each token is stored.
        width: columns that the model shall see, the greatest of `columns` + 1 or more.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    width: int


Access: TypeAlias = Prefill | Extend | Decode | Replay


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values; transformers calls `update` from within the attention."""

    is_compileable = False
    is_sliding = False

    def __init__(self, shape: LayerShape, space: Space, blocks: int, block_tokens: int) -> None:
        """Allocate; raises what torch raises when there is no memory."""
        super().__init__()  # type: ignore[no-untyped-call]
        place: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        # Zeros, not empty: the mask adds to what stands in unused columns, and NaN survives any addition.
        self._key_memory = torch.zeros(space.capacity * shape.key_heads * shape.key_dim, **place)
        self._value_memory = torch.zeros(space.capacity * shape.value_heads * shape.value_dim, **place)
        self.stored_keys = torch.zeros(blocks, shape.key_heads, block_tokens, shape.key_dim, **place)
        self.stored_values = torch.zeros(blocks, shape.value_heads, block_tokens, shape.value_dim, **place)
        self._shape = shape
        self.arrange(space)
        self.is_initialized = True
        self.access: Access = Prefill(0, 0)

    def arrange(self, space: Space) -> None:
        """See the memory with the space's present stride."""
        rows, stride, shape = space.rows_at(space.stride), space.stride, self._shape
        self.keys: torch.Tensor = _seen(self._key_memory, (rows, shape.key_heads, stride, shape.key_dim))
        self.values: torch.Tensor = _seen(self._value_memory, (rows, shape.value_heads, stride, shape.value_dim))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: all is allocated."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values, [rows, heads, tokens, dim]; return views of all that the rows have."""
        access = self.access
        if isinstance(access, Decode | Replay):
            self.keys[access.rows, :, access.columns] = key_states[:, :, 0]
            self.values[access.rows, :, access.columns] = value_states[:, :, 0]
            count = key_states.shape[0]
            keys, values = self.keys[:, :, : access.width], self.values[:, :, : access.width]
            if isinstance(access, Decode):
                return keys[:count], values[:count]
            slot = access.rows[:1]
            return keys[slot].expand(count, -1, -1, -1), values[slot].expand(count, -1, -1, -1)
        if isinstance(access, Prefill):
            rows = slice(access.first_slot, access.first_slot + key_states.shape[0])
            end = access.start + key_states.shape[2]
            self.keys[rows, :, access.start : end] = key_states
            self.values[rows, :, access.start : end] = value_states
            return self.keys[rows, :, :end], self.values[rows, :, :end]
        self.keys[access.slots, :, access.columns] = key_states[access.rows, :, access.places]
        self.values[access.slots, :, access.columns] = value_states[access.rows, :, access.places]
        rows = slice(access.first_slot, access.first_slot + key_states.shape[0])
        return self.keys[rows, :, : access.width], self.values[rows, :, : access.width]

    def get_seq_length(self) -> int:
        """Return the columns in front of this forward's; the model may number positions or build masks from it."""
        return self.access.start if isinstance(self.access, Prefill) else self.access.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that the model sees, and the first one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return the columns of a slot."""
        return int(self.keys.shape[2])


def _seen(memory: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    return memory[: math.prod(size)].view(size)


class SlotCache(Cache):
    """All layers of the cache, and of the prefix store.

    Attributes:
        space: its shape.
        windows: the sliding window of each layer, None for those without.
        block_tokens: tokens of a block of the prefix store.
    """

    def __init__(self, shapes: Sequence[LayerShape], space: Space, blocks: int = 0, block_tokens: int = 1) -> None:
        """Allocate rows and `blocks` of the prefix store; raises what torch raises when there is no memory."""
        self.space = space
        self.windows = [shape.window for shape in shapes]
        self.block_tokens = block_tokens
        self._slot_layers = [SlotLayer(shape, space, blocks, block_tokens) for shape in shapes]
        super().__init__(layers=list(self._slot_layers))

    def point(self, access: Access) -> None:
        """Say what the next forward reads and writes."""
        for layer in self._slot_layers:
            layer.access = access

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row of `tokens` from one slot to another."""
        for layer in self._slot_layers:
            layer.keys[target, :, :tokens] = layer.keys[source, :, :tokens]
            layer.values[target, :, :tokens] = layer.values[source, :, :tokens]

    def restride(self, stride: int, rows: int, tokens: int) -> None:
        """Change the stride; the first `rows` rows keep their first `tokens` tokens."""
        for layer in self._slot_layers:
            keys = layer.keys[:rows, :, :tokens].clone()
            values = layer.values[:rows, :, :tokens].clone()
            self.space.stride = stride
            layer.arrange(self.space)
            layer.keys[:rows, :, :tokens] = keys
            layer.values[:rows, :, :tokens] = values

    def store(self, slot: int, parts: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy parts of a row, each of a block's size and counted in blocks from its begin, to the prefix store."""
        for layer in self._slot_layers:
            at = torch.tensor(blocks, device=layer.keys.device)
            of = torch.tensor(parts, device=layer.keys.device)
            for memory, row in ((layer.stored_keys, layer.keys[slot]), (layer.stored_values, layer.values[slot])):
                whole = row.shape[1] // self.block_tokens
                heads, _, dim = row.shape
                seen = row[:, : whole * self.block_tokens].view(heads, whole, self.block_tokens, dim)
                memory[at] = seen[:, of].transpose(0, 1)

    def recall(self, slot: int, blocks: Sequence[int]) -> None:
        """Copy blocks of the prefix store to the begin of a row."""
        tokens = len(blocks) * self.block_tokens
        for layer in self._slot_layers:
            at = torch.tensor(blocks, device=layer.keys.device)
            layer.keys[slot, :, :tokens] = layer.stored_keys[at].transpose(0, 1).flatten(1, 2)
            layer.values[slot, :, :tokens] = layer.stored_values[at].transpose(0, 1).flatten(1, 2)

    def row(self, slot: int, tokens: int) -> list[torch.Tensor]:
        """Return views of the keys and values of a slot's first tokens, [heads, tokens, dim], layer by layer."""
        return [memory[slot, :, :tokens] for layer in self._slot_layers for memory in (layer.keys, layer.values)]

    def clear(self, slot: int | None = None) -> None:
        """Zero a slot, or all: after a row of NaN, which no mask would hide from the slot's next row.

        To clear all also mends what a change of the stride has left that failed halfway.
        """
        rows = slice(None) if slot is None else slot
        for layer in self._slot_layers:
            if slot is None:
                layer.arrange(self.space)
            layer.keys[rows] = 0
            layer.values[rows] = 0
