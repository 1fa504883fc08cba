"""Forwards of the model over the slot cache: plain token ids and lengths in, logits out.

It knows tensors and nothing of requests. All methods run in inference mode and leave their results on the device.
What changes the cache goes through it too: whatever runs the model elsewhere at the same time repeats these calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .adapters import Adapters
from .cache import Access, Decode, Extend, Prefill, Replay, SlotCache
from .compiled import Compiled
from .packed import STEADY_ROWS, blocks_of
from .space import whole_vectors

#: Most tokens of one row in a forward of `replay`. In bfloat16 on a CPU (tried with AMX) up to 32 rows get the bits
#: of one row alone; 64 are multiplied in another order.
REPLAY_ROWS = STEADY_ROWS
#: A steady runner pads prompts to whole vectors, and multiplies so many rows in every forward over prompts that are
#: no more tokens together, padding included: they may share it. Whatever has more goes alone.
PROMPT_ROWS = 128


def compile_all(runner: Runner) -> None:
    """Have all graphs compiled that serving may need, if it shall be compiled; uses the first slots."""
    if runner.compiles:
        space = runner.cache.space
        runner.decode([0, 0], [0, 0])
        runner.replay(0, 0, [0, 0])
        runner.replay(0, min(space.context, space.stride) - 1, [0])  # as wide as the slot, it is one run of memory


class Runner:
    """A model and its slot cache.

    Attributes:
        cache: the cache.
        vocabulary: token ids that the model knows are below it.
        steady: prompts are padded and multiplied so that they may share a forward.
    """

    def __init__(
        self,
        model: Any,
        cache: SlotCache,
        *,
        compile_decode: bool = False,
        adapters: Adapters | None = None,
        steady: bool = False,
    ) -> None:
        """Run `model`, a transformers causal language model in eval mode, over `cache`, and its `adapters`.

        With `compile_decode`, decodes and replays go through torch.compile; each begins with its first one.
        `steady`: do what can be done, in packed layers and in attention, to give a row the same bits in any company.
        """
        self.cache = cache
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._model = model
        self._adapters = adapters
        self.steady = steady
        self._blocks = blocks_of(model) if steady else None
        if self._blocks is not None:
            self._blocks.rows = STEADY_ROWS
        self._compiled = Compiled(model) if compile_decode else None
        self._device: torch.device = model.device
        self._dtype: torch.dtype = model.dtype
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters

    # --- forwards ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def extend(
        self,
        first_slot: int,
        starts: Sequence[int],
        tokens: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        inputs: Mapping[str, Any] | None = None,
        adapters: Sequence[str] = (),
    ) -> torch.Tensor:
        """Compute tokens of prompts into the slots from `first_slot`, in one forward.

        Rows are padded on the right: causal order alone hides the padding from the prompts.

        Args:
            first_slot: the first of neighbouring slots.
            starts: tokens that each row has in its slot before these.
            tokens: those to compute, one list a row.
            all_logits: of one row, return those behind every token.
            inputs: what the model is handed besides, such as pixels; tensors may be on the host.
            adapters: of each row, "" for none; nothing where no row has one.

        Returns:
            Logits behind each row's last token, [rows, vocabulary]; with `all_logits` [tokens, vocabulary].
        """
        lengths = [len(row) for row in tokens]
        longest = max(lengths)
        if self.steady and not inputs:
            space = self.cache.space
            longest = min(whole_vectors(longest), min(space.context, space.stride) - max(starts))
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens])
        positions = torch.tensor(starts)[:, None] + torch.arange(longest)
        access: Access
        if len(tokens) == 1 or not any(starts):
            # The model makes the mask itself: the cache tells it how many columns there are in front.
            access, mask = Prefill(first_slot, starts[0]), None
        else:
            access, mask = self._ragged(first_slot, starts, lengths, positions)
        self._select(adapters)
        ends = list(range(lengths[0])) if all_logits else sorted({length - 1 for length in lengths})
        with self._prompt_blocks(0 if inputs else len(tokens) * longest):
            logits = self._forward(access, ids, positions, mask, ends, inputs or {})
        if all_logits:
            return logits[0]
        return logits[torch.arange(len(tokens)), [ends.index(length - 1) for length in lengths]]

    @torch.inference_mode()
    def decode(
        self,
        token_ids: Sequence[int],
        lengths: Sequence[int],
        shifts: Sequence[int] | None = None,
        adapters: Sequence[str] = (),
    ) -> torch.Tensor:
        """Feed one token to each of the slots from 0.

        Args:
            token_ids: each row's newest token.
            lengths: tokens that each row has in its slot before it.
            shifts: what each token's position differs by from its column; None for nothing.
            adapters: as of `extend`.

        Returns:
            Logits behind the token, [rows, vocabulary].
        """
        rows = self._pair(range(len(lengths)))
        columns = torch.tensor([lengths[row] for row in rows])[:, None]
        width, mask = self._view(columns)
        kind = Decode if len(rows) == len(lengths) else Replay
        access = kind(self._there(torch.tensor(rows)), self._there(columns[:, 0]), width)
        self._select([adapters[row] for row in rows] if adapters else ())
        ids = torch.tensor([token_ids[row] for row in rows])[:, None]
        positions = columns if shifts is None else columns + torch.tensor([shifts[row] for row in rows])[:, None]
        logits = self._forward(access, ids, positions, mask, [0], forward=self._decoder())
        return logits[: len(lengths), 0]

    @torch.inference_mode()
    def replay(self, slot: int, start: int, token_ids: Sequence[int], shift: int = 0, adapter: str = "") -> None:
        """Compute known tokens of one row as `decode` would one after the other, several rows to a forward.

        They go through the kernels of a decode of so many rows. Where those give a row the same bits whatever the
        number of rows, the cache then holds what decoding each token alone would have left.

        Args:
            slot: the row's.
            start: tokens that it has there.
            token_ids: the tokens behind them.
            shift: what their positions differ by from their columns.
            adapter: the row's.
        """
        for first in range(0, len(token_ids), REPLAY_ROWS):
            places = self._pair(range(first, min(first + REPLAY_ROWS, len(token_ids))))
            columns = torch.tensor(places)[:, None] + start
            width, mask = self._view(columns)
            access = Replay(self._there(torch.full((len(places),), slot)), self._there(columns[:, 0]), width)
            self._select([adapter] * len(places))
            ids = torch.tensor([token_ids[place] for place in places])[:, None]
            # Without logits a compiled forward would be one more graph.
            keep = [0] if self.compiles else []
            self._forward(access, ids, columns + shift, mask, keep, forward=self._decoder())

    # --- the cache --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy a row; see SlotCache."""
        self.cache.move(source, target, tokens)

    @torch.inference_mode()
    def restride(self, stride: int, rows: int, tokens: int) -> None:
        """Change the stride; see SlotCache."""
        self.cache.restride(stride, rows, tokens)

    @torch.inference_mode()
    def store(self, slot: int, parts: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy parts of a row to the prefix store; see SlotCache."""
        self.cache.store(slot, parts, blocks)

    @torch.inference_mode()
    def recall(self, slot: int, blocks: Sequence[int]) -> None:
        """Copy blocks of the prefix store to the begin of a row; see SlotCache."""
        self.cache.recall(slot, blocks)

    @torch.inference_mode()
    def clear(self, slot: int | None = None) -> None:
        """Zero a slot, or all; see SlotCache."""
        self.cache.clear(slot)

    # --- parts ------------------------------------------------------------------------------------------------------

    def _ragged(
        self, first_slot: int, starts: Sequence[int], lengths: Sequence[int], positions: torch.Tensor
    ) -> tuple[Extend, Any]:
        """Return the access and the mask for rows that begin at columns of their own."""
        valid = torch.arange(positions.shape[1]) < torch.tensor(lengths)[:, None]
        rows, places = valid.nonzero(as_tuple=True)
        last = [start + length - 1 for start, length in zip(starts, lengths, strict=True)]
        # Padding sees what the row's last token sees: its values are dropped, but they must be numbers.
        columns = torch.minimum(positions, torch.tensor(last)[:, None])
        width, mask = self._view(columns)
        access = Extend(
            first_slot,
            self._there(rows + first_slot),
            self._there(positions[valid]),
            self._there(rows),
            self._there(places),
            width,
        )
        return access, mask

    def _prompt_blocks(self, rows: int) -> AbstractContextManager[None]:
        """Multiply in the blocks for a forward over so many rows of prompts; 0 where not all are rows of text."""
        if self._blocks is None:
            return nullcontext()
        if self.steady and 0 < rows <= PROMPT_ROWS:
            return self._blocks.of(PROMPT_ROWS, filled=True)
        return self._blocks.of(None)

    def _select(self, rows: Sequence[str]) -> None:
        if self._adapters is not None:
            self._adapters.select(rows)

    def _view(self, columns: torch.Tensor) -> tuple[int, Any]:
        """Return the visible width for tokens in these columns, [rows, tokens], and what the model takes as mask.

        The width grows by whole vectors, so that shapes, and the kernels that are picked for them, stay the same over
        some decode steps.
        """
        width = min(self.cache.space.stride, whole_vectors(int(columns.max()) + 1))
        windows = set(self.cache.windows)
        masks = {window: self._mask(columns, width, window) for window in windows}
        if len(masks) == 1:
            return width, masks[windows.pop()]
        # As models take it whose layers differ: by the kind of the layer.
        [window] = windows - {None}
        return width, {"full_attention": masks[None], "sliding_attention": masks[window]}

    def _mask(self, columns: torch.Tensor, width: int, window: int | None) -> torch.Tensor:
        seen = torch.arange(width)
        hidden = seen > columns[..., None]
        if window is not None:
            hidden |= seen <= columns[..., None] - window
        # Additive, since every attention implementation of transformers takes that.
        mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, torch.finfo(self._dtype).min)
        return self._there(mask[:, None])

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        """Bring what was made on the host to the device, on CUDA without waiting for what runs there."""
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)

    @property
    def compiles(self) -> bool:
        """Whether decodes and replays are compiled now: not where only one row has room, another graph, and rare."""
        works = self._compiled is not None and self._compiled.works
        return works and self.cache.space.rows_at(self.cache.space.stride) > 1

    def _decoder(self) -> Callable[..., Any]:
        return self._compiled if self._compiled is not None and self.compiles else self._model

    def _pair(self, rows: range) -> list[int]:
        """Return the rows of a decode; one alone twice, where it is compiled: it would be a graph of its own."""
        return [*rows, *rows] if len(rows) == 1 and self.compiles else [*rows]

    def _forward(
        self,
        access: Access,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: Any,
        keep: Sequence[int],
        inputs: Mapping[str, Any] | None = None,
        forward: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """Run the model; return the logits at the columns `keep`, [rows, kept, vocabulary]."""
        self.cache.point(access)
        more: dict[str, Any] = {
            name: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for name, value in (inputs or {}).items()
        }
        if self._takes_positions and "position_ids" not in more:
            more["position_ids"] = self._there(positions)
        # One kept column is the rule; for more of them a tensor is what `logits_to_keep` takes.
        if self._keeps_logits:
            more["logits_to_keep"] = self._there(torch.tensor(keep, dtype=torch.long))
        logits: torch.Tensor = (forward or self._model)(
            input_ids=self._there(ids),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        ).logits
        return logits if self._keeps_logits else logits[:, list(keep)]
