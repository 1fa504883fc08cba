"""How large the caches are, by what the user says, the model allows and the device has."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base import EngineLoadError
from .cache import LayerShape, SlotCache
from .devices import is_out_of_memory
from .selfcheck import TOKENS as MIN_CONTEXT
from .space import Space

_log = logging.getLogger("tokenmq.worker")

#: Tokens a row may have where the user does not say, at most.
MAX_CONTEXT = 32_768
MAX_CONTEXT_HOST = 8_192
#: Tokens of the cache for each slot where the user does not say; rows share them.
SLOT_TOKENS = 4096
SLOT_TOKENS_HOST = 2048
#: The part of the cache's size that the prefix store has besides, where the user does not say.
PREFIX_PART = 4
#: Tokens of a block of the prefix store: small, for a prompt's beginning is found in whole blocks only.
BLOCK_TOKENS = 32
#: The part of a GPU's free memory that caches may take; the rest is for what a step computes.
MEMORY_PART = 0.85


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user says; None leaves it to the engine.

    Attributes:
        slots: most rows.
        max_context: tokens that prompt and completion may have together.
        cache_tokens: tokens that all rows share.
        prefix_tokens: tokens of the prefix store; 0 for none.
    """

    slots: int
    max_context: int | None = None
    cache_tokens: int | None = None
    prefix_tokens: int | None = None

    def check(self) -> None:
        """Raise EngineLoadError where a wish makes no sense."""
        if self.slots < 1:
            raise EngineLoadError(f"slots must be 1 or more, not {self.slots}")
        if self.max_context is not None and self.max_context < MIN_CONTEXT:
            raise EngineLoadError(f"max_context must be {MIN_CONTEXT} or more, not {self.max_context}")
        if self.cache_tokens is not None and self.cache_tokens < MIN_CONTEXT:
            raise EngineLoadError(f"cache_tokens must be {MIN_CONTEXT} or more, not {self.cache_tokens}")
        if self.prefix_tokens is not None and self.prefix_tokens < 0:
            raise EngineLoadError(f"prefix_tokens must be 0 or more, not {self.prefix_tokens}")


def positions(config: Any) -> int | None:
    """Return how many positions a model tells apart, by its text config; None where it has no bound.

    With rotations of the kind longrope it depends on the longest row of a forward how all of its rows are rotated,
    those beside it and keys in the cache included. No row may be so long that they change.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *given.values()):  # one for all layers, or one for each kind of them
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            original: int | None = rope.get("original_max_position_embeddings")
            limit = min((bound for bound in (limit, original) if bound is not None), default=None)
    return limit


def choose_context(wishes: Wishes, limit: int | None, device: torch.device, name: str) -> int:
    """Return the tokens that a row may have.

    Args:
        wishes: the user's.
        limit: the model's positions; None where it has no bound.
        device: where it is.
        name: the model's, for errors.

    Raises:
        EngineLoadError: the wishes contradict the model or one another.
    """
    if wishes.max_context is not None:
        if limit is not None and wishes.max_context > limit:
            raise EngineLoadError(f"max_context={wishes.max_context}, but {name} has {limit} positions")
        if wishes.cache_tokens is not None and wishes.max_context > wishes.cache_tokens:
            raise EngineLoadError(
                f"max_context={wishes.max_context}, but the cache has {wishes.cache_tokens} tokens for all rows"
            )
        return wishes.max_context
    default = MAX_CONTEXT if device.type == "cuda" else MAX_CONTEXT_HOST
    return min(bound for bound in (limit, default, wishes.cache_tokens) if bound is not None)


def make_cache(
    wishes: Wishes,
    shapes: Sequence[LayerShape],
    context: int,
    block_tokens: int,
    name: str,
    *,
    agree: Callable[[int], int] = int,
) -> tuple[SlotCache, int]:
    """Allocate the cache and the prefix store.

    Args:
        wishes: the user's.
        shapes: what each layer stores.
        context: tokens that a row may have.
        block_tokens: tokens of a block of the prefix store.
        name: the model's, for errors.
        agree: makes of the bytes that there are room for those that every process of the worker has room for.

    Returns:
        The cache, and the blocks of its prefix store.

    Raises:
        EngineLoadError: there is no memory for it.
    """
    device = shapes[0].device
    token_bytes = sum(shape.token_bytes for shape in shapes)
    room_bytes = agree(_room(device))
    per_slot = SLOT_TOKENS if device.type == "cuda" else SLOT_TOKENS_HOST
    capacity = wishes.cache_tokens or max(context, wishes.slots * min(context, per_slot))
    prefixes = capacity // PREFIX_PART if wishes.prefix_tokens is None else wishes.prefix_tokens
    if wishes.cache_tokens is None:
        room = room_bytes // token_bytes
        if capacity + prefixes > room:  # what there is room for will do, as long as the longest row fits
            capacity = max(context, room * capacity // (capacity + prefixes))
            if wishes.prefix_tokens is None:
                prefixes = capacity // PREFIX_PART
    blocks = prefixes // block_tokens
    size = (capacity + blocks * block_tokens) * token_bytes
    what = f"a KV cache of {size:,} bytes ({capacity} tokens, and {blocks * block_tokens} of prefixes)"
    too_much = f"{name}: no memory for {what} on {device}; give less max_context, cache_tokens or prefix_tokens"
    if device.type == "cpu" and size > room_bytes:
        raise EngineLoadError(too_much)  # the system would promise it and kill us on the way
    try:
        cache = SlotCache(shapes, Space(capacity, wishes.slots, context), blocks, block_tokens)
    except Exception as error:
        if is_out_of_memory(error):
            raise EngineLoadError(too_much) from error
        raise
    _log.info("%s: %s, %d slots, on %s", name, what, wishes.slots, device)
    return cache, blocks


def _room(device: torch.device) -> int:
    """Return the bytes of memory that caches may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * MEMORY_PART)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
