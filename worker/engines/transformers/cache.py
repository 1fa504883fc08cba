"""The slot KV cache: where the keys and values of all running rows live, allocated once.

Each attention layer has one K and one V of [slots, kv_heads, context, head_dim]. A row is left-aligned in its slot:
its token number i stands in column i, whatever the other rows do. So nothing is shifted or padded when a row joins or
leaves, and no shared write column grows for ever, as it does with left padding. What a slot holds behind its row's
length is left over from other rows; it is finite, and the mask hides it.

It plugs into an unmodified transformers model as its `past_key_values`: the layers here receive the new keys and
values, store them where the present `Access` says, and hand the model views of the slots. No copy is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores for each token: heads and head dimensions of K and V (they may differ), and the dtype."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes that a token takes in this layer."""
        return (self.key_heads * self.key_dim + self.value_heads * self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Prefill:
    """A forward over new columns of neighbouring slots: `first_slot` onward, columns from `start`."""

    first_slot: int
    start: int


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
        slot: the slot.
        start: the column of the first token; the others follow.
        width: columns that the model shall see, the last token's column + 1 or more.
    """

    slot: int
    start: int
    width: int


Access: TypeAlias = Prefill | Decode | Replay


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values; transformers calls `update` from within the attention."""

    is_compileable = False
    is_sliding = False

    def __init__(self, shape: LayerShape, slots: int, context: int) -> None:
        """Allocate; raises what torch raises when there is no memory."""
        super().__init__()  # type: ignore[no-untyped-call]
        place: dict[str, Any] = {"dtype": shape.dtype, "device": shape.device}
        # Zeros, not empty: the mask adds to what stands in unused columns, and NaN survives any addition.
        self.keys: torch.Tensor = torch.zeros(slots, shape.key_heads, context, shape.key_dim, **place)
        self.values: torch.Tensor = torch.zeros(slots, shape.value_heads, context, shape.value_dim, **place)
        self.is_initialized = True
        self.access: Access = Prefill(0, 0)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: all is allocated."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values, [rows, heads, tokens, dim]; return views of all that the rows have."""
        access = self.access
        if isinstance(access, Prefill):
            rows = slice(access.first_slot, access.first_slot + key_states.shape[0])
            end = access.start + key_states.shape[2]
            self.keys[rows, :, access.start : end] = key_states
            self.values[rows, :, access.start : end] = value_states
            return self.keys[rows, :, :end], self.values[rows, :, :end]
        if isinstance(access, Replay):
            count, slot = key_states.shape[0], access.slot
            columns = slice(access.start, access.start + count)
            self.keys[slot, :, columns] = key_states[:, :, 0].transpose(0, 1)
            self.values[slot, :, columns] = value_states[:, :, 0].transpose(0, 1)
            keys, values = self.keys[slot, :, : access.width], self.values[slot, :, : access.width]
            return keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1)
        self.keys[access.rows, :, access.columns] = key_states[:, :, 0]
        self.values[access.rows, :, access.columns] = value_states[:, :, 0]
        count = key_states.shape[0]
        return self.keys[:count, :, : access.width], self.values[:count, :, : access.width]

    def get_seq_length(self) -> int:
        """Return the columns in front of this forward's; the model may number positions or build masks from it."""
        return self.access.start if isinstance(self.access, Prefill) else self.access.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns that the model sees, and the first one."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return the columns of a slot."""
        return int(self.keys.shape[2])


class SlotCache(Cache):
    """All layers of the cache.

    Attributes:
        slots: rows that it holds.
        context: tokens that each row may have.
    """

    def __init__(self, shapes: Sequence[LayerShape], slots: int, context: int) -> None:
        """Allocate for `slots` rows of `context` tokens; raises what torch raises when there is no memory."""
        self.slots = slots
        self.context = context
        self._slot_layers = [SlotLayer(shape, slots, context) for shape in shapes]
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

    def clear(self, slot: int | None = None) -> None:
        """Zero a slot, or all: after a row of NaN, which no mask would hide from the slot's next row."""
        rows = slice(None) if slot is None else slot
        for layer in self._slot_layers:
            layer.keys[rows] = 0
            layer.values[rows] = 0
