"""Forwards of the model over the slot cache: plain token ids and lengths in, logits out.

It knows tensors and nothing of requests. All methods run in inference mode and leave their results on the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .cache import Access, Decode, Prefill, Replay, SlotCache

#: The cache's visible width grows in steps of this many columns, so that shapes, and the kernels that are picked
#: for them, stay the same over some decode steps.
WIDTH_STEP = 16
#: Most tokens of one row in a forward of `replay`. In bfloat16 on a CPU (tried with AMX) up to 32 rows get the bits
#: of one row alone; 64 are multiplied in another order.
REPLAY_ROWS = 32


class Runner:
    """A model and its slot cache.

    Attributes:
        vocabulary: token ids that the model knows are below it.
    """

    def __init__(self, model: Any, cache: SlotCache) -> None:
        """Run `model`, a transformers causal language model in eval mode, over `cache`."""
        self.cache = cache
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._model = model
        self._device: torch.device = model.device
        self._dtype: torch.dtype = model.dtype
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        self._takes_positions = "position_ids" in parameters

    def prefill(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute whole prompts into the slots from `first_slot`, in one forward.

        They are padded on the right: causal order alone hides the padding from the prompts, and what it leaves in
        the slots lies behind the rows' lengths.

        Returns:
            Logits behind each prompt's last token, [prompts, vocabulary].
        """
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        positions = torch.arange(longest)[None].expand(len(prompts), -1)
        ends = sorted({length - 1 for length in lengths})
        logits = self._forward(Prefill(first_slot, 0), ids, positions, None, ends)
        return logits[torch.arange(len(prompts)), [ends.index(length - 1) for length in lengths]]

    def prefill_chunk(self, slot: int, start: int, token_ids: Sequence[int]) -> torch.Tensor:
        """Compute some tokens of one prompt, whose `start` tokens before them are in the slot.

        The model makes the mask itself: the cache tells it how many columns there are in front.

        Returns:
            Logits behind the last of them, [1, vocabulary].
        """
        end = start + len(token_ids)
        positions = torch.arange(start, end)
        ids = torch.tensor([list(token_ids)])
        return self._forward(Prefill(slot, start), ids, positions[None], None, [len(token_ids) - 1])[:, 0]

    def decode(self, token_ids: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Feed one token to each of the slots from 0.

        Args:
            token_ids: each row's newest token.
            lengths: tokens that each row has in its slot before it.

        Returns:
            Logits behind the token, [rows, vocabulary].
        """
        columns = torch.tensor(lengths)
        width, mask = self._view(columns)
        columns = columns.to(self._device)
        access = Decode(torch.arange(len(lengths), device=self._device), columns, width)
        return self._forward(access, torch.tensor(token_ids)[:, None], columns[:, None], mask, [0])[:, 0]

    def replay(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        """Compute known tokens of one row as `decode` would one after the other, several rows to a forward.

        They go through the kernels of a decode of so many rows. Where those give a row the same bits whatever the
        number of rows, the cache then holds what decoding each token alone would have left. No logits are computed.

        Args:
            slot: the row's.
            start: tokens that it has there.
            token_ids: the tokens behind them.
        """
        for first in range(0, len(token_ids), REPLAY_ROWS):
            some = token_ids[first : first + REPLAY_ROWS]
            columns = torch.arange(start + first, start + first + len(some))
            width, mask = self._view(columns)
            self._forward(Replay(slot, start + first, width), torch.tensor(some)[:, None], columns[:, None], mask, [])

    def _view(self, columns: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the visible width for rows of one token each in these columns, and their additive mask."""
        width = min(self.cache.context, -(-(int(columns.max()) + 1) // WIDTH_STEP) * WIDTH_STEP)
        hidden = (torch.arange(width) > columns[:, None])[:, None, None]
        # Additive, since every attention implementation of transformers takes that.
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return width, mask.masked_fill_(hidden.to(self._device), torch.finfo(self._dtype).min)

    @torch.inference_mode()
    def _forward(
        self,
        access: Access,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        keep: Sequence[int],
    ) -> torch.Tensor:
        """Run the model; return the logits at the columns `keep`, [rows, kept, vocabulary]."""
        self.cache.point(access)
        more: dict[str, Any] = {}
        if self._takes_positions:
            more["position_ids"] = positions.to(self._device)
        # One kept column is the rule; for more of them a tensor is what `logits_to_keep` takes.
        if self._keeps_logits:
            more["logits_to_keep"] = torch.tensor(keep, dtype=torch.long, device=self._device)
        logits: torch.Tensor = self._model(
            input_ids=ids.to(self._device),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            **more,
        ).logits
        return logits if self._keeps_logits else logits[:, list(keep)]
