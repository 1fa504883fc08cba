"""A model that makes vectors: padded forwards, pooling, what comes behind that; and a trial of it at load.

Rows are padded on the right for decoders, too: a token's state depends on what stands before it only, positions count
from the text's begin, and the last token is looked up by the text's length. So a text gets the same vector whatever
it is padded with, which padding on the left leaves to each model's way of counting positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ....protocol.limits import MAX_VECTOR_BYTES
from ..base import EngineLoadError
from .pooling import pool
from .sentence import Recipe

#: Greatest relative difference of a text's vector alone and among others. float32 keeps to about 1e-6 and half
#: precision to about a hundredth; padding that is seen shows as tenths.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.1


class Encoder:
    """A model with its pooling, on its device.

    Attributes:
        limit: most tokens that a text may have, by the model's positions; None where it has no bound.
        width: numbers in a vector; known from `check` on.
    """

    def __init__(self, model: Any, recipe: Recipe, *, pad_id: int, skip: int = 0) -> None:
        """Take a loaded model.

        Args:
            model: a transformers model without a head, in eval mode.
            recipe: how it makes vectors.
            pad_id: the token to pad with.
            skip: tokens at the begin of each text that are not pooled.
        """
        model.config.use_cache = False  # a decoder would keep keys and values for tokens that never come
        self._model = model
        self._modes = recipe.poolings or (("mean",) if _looks_ahead(model) else ("lasttoken",))
        self._then = nn.Sequential(*recipe.then).to(device=model.device, dtype=torch.float32).eval()
        self._pad_id = pad_id
        self._skip = skip
        self.limit = _positions(model)
        self.width = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self._model.device
        return device

    @property
    def modes(self) -> tuple[str, ...]:
        """How it pools."""
        return self._modes

    @torch.inference_mode()
    def vectors(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the vectors of some texts, each with a token or more: float32 on the CPU, [texts, width]."""
        longest = max(map(len, texts))
        ids = torch.tensor([[*text, *[self._pad_id] * (longest - len(text))] for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        states = self._model(input_ids=ids, attention_mask=mask)[0]
        vectors: torch.Tensor = self._then(pool(states, lengths, self._modes, self._skip)).cpu()
        return vectors

    def check(self) -> None:
        """Try the model on two texts of unlike lengths.

        Raises:
            EngineLoadError: their vectors are no numbers, depend on their company, or are too long for the wire.
        """
        vocabulary = self._model.get_input_embeddings().num_embeddings
        long = [(17 * step + 5) % vocabulary for step in range(self._skip + 7)]
        short = [(11 * step + 3) % vocabulary for step in range(self._skip + 3)]
        # A token that stands for padding may have no position, and no text has it inside.
        texts = [[token if token != self._pad_id else token ^ 1 for token in text] for text in (long, short)]
        together = self.vectors(texts)
        alone = torch.cat([self.vectors([text]) for text in texts])
        self.width = together.shape[1]
        kind = type(self._model).__name__
        if 4 * self.width > MAX_VECTOR_BYTES:
            raise EngineLoadError(
                f"{kind} makes vectors of {self.width} numbers; {MAX_VECTOR_BYTES // 4} are allowed"
            )
        difference = float(((together - alone).norm(dim=1) / alone.norm(dim=1)).max())
        tolerance = TOLERANCE if self._model.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
        if not difference <= tolerance:
            raise EngineLoadError(
                f"{kind} gives a text another vector among others than alone (difference {difference:.2g}, at most "
                f"{tolerance:.2g} is rounding): it cannot be served"
            )


def _looks_ahead(model: Any) -> bool:
    """Tell whether a token's state depends on those behind it, as in an encoder."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[5, 6, vocabulary // 2], [5, 6, vocabulary - 1]], device=model.device)
    with torch.inference_mode():
        one, other = model(input_ids=ids)[0][:, 0].float()
    return bool((one - other).norm() > TOLERANCE * one.norm())


def _positions(model: Any) -> int | None:
    """Return how many tokens a text may have by the model's positions."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and its kin count positions from behind the padding's on.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None
