"""Does this model compute the same over the slot cache as without a cache? Asked once, at load.

Architectures differ in what they make of positions, masks and caches, and new ones come every month. Some read
positions out of a 2-D mask (ALiBi), some keep states that are no keys and values. A list of names would always be
out of date; so each model is tried on what the engine does with it: ragged groups, chunks, decode, replay.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..base import EngineLoadError
from .cache import LayerShape
from .runner import Runner
from .vision import Vision

#: Greatest relative difference of logits, their mean taken off. float32 keeps to about 1e-5 and half precision to a
#: few hundredths, as do quantised models, some of which round by the largest number of a forward; a wrong position or
#: mask shows as tenths in a trained model, and far above 1e-3 in any.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.2
#: Tokens that the check puts into one slot, besides those of a window.
TOKENS = 8
#: Most of them: a window that is longer than that is not filled, since it would take minutes on a slow device.
MOST_TOKENS = 1024
#: Lengths of prompts that are computed alone and together, in forwards of no more than `PROMPT_ROWS`.
COMPANIES = ((5, 16, 19, 30), (40, 60))
#: Tokens that are generated behind an image.
IMAGE_TOKENS = 4
#: The picture for that: wider than high, since a mistake in two-dimensional positions would not show in a square.
PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
#: Where configs say how far layers see that hide tokens in their own way, of which no cache is told: in chunks, or by
#: a mask that they make themselves.
OWN_WINDOWS = ("attention_chunk_size", "window_size", "keep_window_size")


@torch.inference_mode()
def layer_shapes(model: Any, context: int) -> list[LayerShape]:
    """Return what each layer stores for a token, found out by a forward over one.

    Args:
        model: a causal language model.
        context: tokens that a row may have. A sliding window that is no shorter never slides.

    Raises:
        EngineLoadError: the model keeps something else than keys and values of all tokens.
    """
    kind = type(model).__name__
    _refuse_own_windows(model.config.get_text_config(decoder=True), kind, context)
    cache = DynamicCache(config=model.config)
    windows = [_window(layer, kind, context) for layer in cache.layers]
    if len({window for window in windows if window is not None}) > 1:
        raise EngineLoadError(f"{kind} has layers with sliding windows of different lengths; they cannot be served")
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    shapes = []
    # A model that names no layers in its config has them made by its forward: of the one kind that needs no name.
    windows += [None] * (len(cache.layers) - len(windows))
    for layer, window in zip(cache.layers, windows, strict=True):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4 or keys.shape[2] != 1:
            raise EngineLoadError(f"{kind} has layers without keys and values of their own; they cannot be served")
        shape = LayerShape(
            keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, keys.device, window
        )
        shapes.append(shape)
    if not shapes:
        raise EngineLoadError(f"{kind} keeps no keys and values; this engine cannot serve it")
    return shapes


def _refuse_own_windows(config: Any, kind: str, context: int) -> None:
    for name in OWN_WINDOWS:
        tokens = getattr(config, name, None)
        if isinstance(tokens, int) and tokens < context:
            raise EngineLoadError(
                f"{kind} has attention of its own kind ({name}={tokens}), which this engine can serve only with a "
                f"max_context of at most {tokens}"
            )


def _window(layer: Any, kind: str, context: int) -> int | None:
    """Return the sliding window of a layer, as transformers' own cache has it; one that never slides is none.

    Raises:
        EngineLoadError: the layer keeps something else than keys and values.
    """
    if type(layer) is DynamicSlidingWindowLayer:
        window: int = layer.sliding_window
        return window if window < context else None
    if type(layer) is not DynamicLayer:
        raise EngineLoadError(f"{kind} has layers of kind {type(layer).__name__}, which this engine cannot serve")
    return None


@torch.inference_mode()
def check(model: Any, runner: Runner) -> None:
    """Compare logits over the slot cache with those without any; leaves the cache's first slots used.

    Raises:
        EngineLoadError: they differ.
    """
    # A short window must slide; a long one is left to the tests, which try every kind of mask with short ones.
    window = min((window for window in runner.cache.windows if window is not None), default=0)
    length = TOKENS + (window if window + TOKENS <= min(MOST_TOKENS, runner.cache.space.context) else 0)
    ids = [(17 * step + 5) % runner.vocabulary for step in range(length)]
    other = [(11 * step + 3) % runner.vocabulary for step in range(length - 3)]
    plain = [_plain(model, row)[-2:] for row in (ids, other)]
    if length > runner.cache.space.stride:
        runner.restride(runner.cache.space.stride_for(length), 0, 0)
    pairs = []
    if runner.cache.space.rows_at(runner.cache.space.stride) > 1:  # a ragged group, then two rows in one decode
        pairs.append((runner.extend(0, [0, 0], [ids[:-1], other[:-1]]), torch.stack([plain[0][0], plain[1][0]])))
        pairs.append(
            (runner.decode([ids[-1], other[-1]], _before([ids, other])), torch.stack([plain[0][1], plain[1][1]]))
        )
        # Again, the second half with rows that begin at places of their own.
        runner.extend(0, [0], [ids[:3]])
        runner.extend(1, [0], [other[:2]])
        ragged = runner.extend(0, [3, 2], [ids[3:-1], other[2:-1]])
        pairs.append((ragged, torch.stack([plain[0][0], plain[1][0]])))
    runner.extend(0, [0], [ids[:3]])  # the same in chunks, then alone in a decode
    pairs.append((runner.extend(0, [3], [ids[3:-1]]), plain[0][:1]))
    pairs.append((runner.decode(ids[-1:], _before([ids])), plain[0][1:]))
    runner.extend(0, [0], [ids[:2]])  # and with some of it replayed
    runner.replay(0, 2, ids[2:-1])
    pairs.append((runner.decode(ids[-1:], _before([ids])), plain[0][1:]))
    _compare(model, pairs, "")


@torch.inference_mode()
def is_steady(runner: Runner) -> bool:
    """Tell whether few prompts get the same keys, values and logits alone and in company; uses the first slots."""
    space = runner.cache.space
    for company in COMPANIES:
        lengths = [length for length in company if length <= space.context]
        runner.restride(space.stride_for(max(lengths, default=1)), 0, 0)
        rows = [[(step * step + 7 * length) % runner.vocabulary for step in range(length)] for length in lengths]
        rows = rows[: space.rows_at(space.stride)]
        if len(rows) < 2 or not _agree(runner, rows):
            return False
    return True


def _agree(runner: Runner, rows: list[list[int]]) -> bool:
    alone = []
    for row in rows:
        logits = runner.extend(0, [0], [row])
        alone.append([logits[0], *_stored(runner, 0, len(row))])
    logits = runner.extend(0, [0] * len(rows), rows)
    return all(
        torch.equal(one, other)
        for slot, row in enumerate(rows)
        for one, other in zip(alone[slot], [logits[slot], *_stored(runner, slot, len(row))], strict=True)
    )


def _stored(runner: Runner, slot: int, tokens: int) -> list[torch.Tensor]:
    """Return copies of the keys and values of a row, by layer."""
    return [tensor.clone() for tensor in runner.cache.row(slot, tokens)]


@torch.inference_mode()
def check_images(model: Any, runner: Runner, vision: Vision) -> None:
    """Compare logits behind an image over the slot cache with those of `generate`; uses the first slot.

    Raises:
        EngineLoadError: they differ, or the image takes more tokens than a row may have.
    """
    prompt = vision.look(f"{vision.mark} is", [PICTURE], special=True)
    ids, space = prompt.token_ids, runner.cache.space
    length = len(ids) + IMAGE_TOKENS
    if length > space.context:
        raise EngineLoadError(
            f"{type(model).__name__} makes {len(ids)} tokens of one small image, and the context is {space.context}"
        )
    own = {name: _on(value, model.device) for name, value in prompt.inputs.items() if name != "position_ids"}
    all_ids = torch.tensor([ids], device=model.device)
    how: Any = GenerationConfig  # it has no types
    generated = model.generate(
        **own,
        input_ids=all_ids,
        attention_mask=torch.ones_like(all_ids),
        generation_config=how(
            max_new_tokens=IMAGE_TOKENS,
            min_new_tokens=IMAGE_TOKENS,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    theirs = torch.cat(generated.logits)
    known = generated.sequences[0, len(ids) :].tolist()
    if length > space.stride:
        runner.restride(space.stride_for(length), 0, 0)
    pairs = [(runner.extend(0, [0], [ids], inputs=prompt.inputs), theirs[:1])]
    places = range(len(ids), length - 1)
    for number, place in enumerate(places):
        logits = runner.decode([known[number]], [place], [prompt.shift])
        pairs.append((logits, theirs[number + 1 : number + 2]))
    runner.extend(0, [0], [ids], inputs=prompt.inputs)  # again, with what follows it replayed
    runner.replay(0, len(ids), known[:-2], prompt.shift)
    pairs.append((runner.decode(known[-2:-1], [length - 2], [prompt.shift]), theirs[-1:]))
    _compare(model, pairs, " behind an image")


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _compare(model: Any, pairs: list[tuple[torch.Tensor, torch.Tensor]], where: str) -> None:
    """Compare logits of the slot cache with others.

    Raises:
        EngineLoadError: they differ.
    """
    exact = model.dtype in (torch.float32, torch.float64) and not hasattr(model.config, "quantization_config")
    tolerance = TOLERANCE if exact else TOLERANCE_HALF
    worst = max(_difference(ours, theirs) for ours, theirs in pairs)
    if not worst <= tolerance:
        raise EngineLoadError(
            f"{type(model).__name__} gives other results{where} over this engine's KV cache than without it "
            f"(difference {worst:.2g}, at most {tolerance:.2g} is rounding): it cannot be served"
        )


def _before(rows: list[list[int]]) -> list[int]:
    """Return the tokens that each row has in front of its last one."""
    return [len(row) - 1 for row in rows]


def _plain(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference of centred logits; NaN where they are not numbers."""
    ours, theirs = ours.float(), theirs.float()
    ours, theirs = ours - ours.mean(-1, keepdim=True), theirs - theirs.mean(-1, keepdim=True)
    return float((ours - theirs).norm() / theirs.norm())
