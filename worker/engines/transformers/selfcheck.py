"""Does this model compute the same over the slot cache as without a cache? Asked once, at load.

Architectures differ in what they make of positions, masks and caches, and new ones come every month. Some read
positions out of a 2-D mask (ALiBi), some keep states that are no keys and values. A list of names would always be
out of date; so each model is tried on what the engine does with it: ragged groups, chunks, decode, replay.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..base import EngineLoadError
from .cache import LayerShape
from .runner import Runner

#: Greatest relative difference of logits, their mean taken off. float32 keeps to about 1e-5 and half precision to a
#: few hundredths; a wrong position or mask shows as tenths in a trained model, and far above 1e-3 in any.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.2
#: Most tokens that the check puts into one slot.
TOKENS = 8


@torch.inference_mode()
def layer_shapes(model: Any, context: int) -> list[LayerShape]:
    """Return what each layer stores for a token, found out by a forward over one.

    Args:
        model: a causal language model.
        context: tokens that a row may have. A sliding window that is no shorter never slides, so that its layers are
            like any other.

    Raises:
        EngineLoadError: the model keeps something else than keys and values of all tokens.
    """
    kind = type(model).__name__
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        _refuse_layer(layer, kind, context)
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != 1:
            raise EngineLoadError(f"{kind} has layers without keys and values of their own; they cannot be served")
        shape = LayerShape(
            keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], dtype=keys.dtype, device=keys.device
        )
        shapes.append(shape)
    if not shapes:
        raise EngineLoadError(f"{kind} keeps no keys and values; this engine cannot serve it")
    return shapes


def _refuse_layer(layer: Any, kind: str, context: int) -> None:
    """Raise where a layer, as transformers' own cache has it, keeps something else than all keys and values."""
    if type(layer) is DynamicSlidingWindowLayer:
        if layer.sliding_window < context:
            raise EngineLoadError(
                f"{kind} has layers with a sliding window of {layer.sliding_window} tokens, which this engine "
                f"can serve only up to that context: give max_context={layer.sliding_window} or less"
            )
    elif type(layer) is not DynamicLayer:
        raise EngineLoadError(f"{kind} has layers of kind {type(layer).__name__}, which this engine cannot serve")


@torch.inference_mode()
def check(model: Any, runner: Runner) -> None:
    """Compare logits over the slot cache with those without any; leaves the cache's first slots used.

    Raises:
        EngineLoadError: they differ.
    """
    ids = [(17 * step + 5) % runner.vocabulary for step in range(TOKENS)]
    other = [(11 * step + 3) % runner.vocabulary for step in range(TOKENS - 3)]
    plain = [_plain(model, row)[-2:] for row in (ids, other)]
    pairs = []
    if runner.cache.slots > 1:  # a ragged group, then two rows in one decode
        pairs.append((runner.prefill(0, [ids[:-1], other[:-1]]), torch.stack([plain[0][0], plain[1][0]])))
        decoded = runner.decode([ids[-1], other[-1]], [len(ids) - 1, len(other) - 1])
        pairs.append((decoded, torch.stack([plain[0][1], plain[1][1]])))
    runner.prefill_chunk(0, 0, ids[:3])  # the same in chunks, then alone in a decode
    pairs.append((runner.prefill_chunk(0, 3, ids[3:-1]), plain[0][:1]))
    pairs.append((runner.decode(ids[-1:], [len(ids) - 1]), plain[0][1:]))
    runner.prefill(0, [ids[:2]])  # and with some of it replayed
    runner.replay(0, 2, ids[2:-1])
    pairs.append((runner.decode(ids[-1:], [len(ids) - 1]), plain[0][1:]))
    tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    worst = max(_difference(ours, theirs) for ours, theirs in pairs)
    if not worst <= tolerance:
        raise EngineLoadError(
            f"{type(model).__name__} gives other results over this engine's KV cache than without it "
            f"(difference {worst:.2g}, at most {tolerance:.2g} is rounding): it cannot be served"
        )


def _plain(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference of centred logits; NaN where they are not numbers."""
    ours, theirs = ours.float(), theirs.float()
    ours, theirs = ours - ours.mean(-1, keepdim=True), theirs - theirs.mean(-1, keepdim=True)
    return float((ours - theirs).norm() / theirs.norm())
