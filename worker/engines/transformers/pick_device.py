"""Picks each row's token on the device where the logits are: no result comes back to the host on the way.

The draw is a Gumbel-max: the token with the greatest logit + noise, which has the softmax as its distribution. Rows
of which tokens are cut off are sorted; a search for what a small nucleus needs would have to ask the host how far to
go.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .draw import NOT_A_NUMBER, NOTHING_LEFT, Draw
from .noise import gumbel, split_keys
from .upload import upload


def pick(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Return each row's token, or why there is none.

    Args:
        logits: float32 [rows, vocabulary].
        draws: one a row.

    Returns:
        int64 [rows], on the device of the logits.
    """
    chosen = logits.argmax(-1)  # the first of equals, as torch promises; and a NaN before any number
    greatest = logits.gather(1, chosen[:, None])
    vocabulary = logits.shape[1]
    drawn = [row for row, draw in enumerate(draws) if not draw.greedy]
    restricted = [row for row in drawn if draws[row].restricted(vocabulary)]
    free = [row for row in drawn if not draws[row].restricted(vocabulary)]
    for rows, draw_some in ((free, _free), (restricted, _restricted)):
        if rows:
            index = upload(np.array(rows), logits.device)
            some = [draws[row] for row in rows]
            temperature = np.array([[draw.temperature] for draw in some], np.float32)
            tempered = (logits[index] - greatest[index]) / upload(temperature, logits.device)
            chosen[index] = draw_some(tempered, some)
    chosen = torch.where(greatest[:, 0].isfinite(), chosen, NOT_A_NUMBER)
    return torch.where(greatest[:, 0] == -torch.inf, NOTHING_LEFT, chosen)


def _noise(draws: Sequence[Draw], token_ids: torch.Tensor) -> torch.Tensor:
    return gumbel(*split_keys([draw.key for draw in draws], token_ids.device), token_ids)


def _free(tempered: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    token_ids = torch.arange(tempered.shape[1], device=tempered.device)[None]
    return (tempered + _noise(draws, token_ids)).argmax(-1)


def _restricted(tempered: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    device, vocabulary = tempered.device, tempered.shape[1]
    values, ids = tempered.sort(dim=-1, descending=True, stable=True)  # stable: of equals the lowest id first
    table = [(draw.sampling.top_p, draw.top_k(vocabulary), draw.least) for draw in draws]
    top_p, top_k, least = upload(np.array(table).T[:, :, None], device)
    kept = torch.arange(vocabulary, device=device) < top_k
    parts = values.exp().double().masked_fill(~kept, 0)  # top-p is about the mass that top-k left
    before = parts.cumsum(-1) - parts
    # Without the first condition a p of 1 could lose its last tokens to rounding.
    kept &= (top_p >= 1) | (before < top_p * parts.sum(-1, keepdim=True))
    kept &= values >= least.float()
    kept[:, 0] = True
    best = (values + _noise(draws, ids)).masked_fill(~kept, -torch.inf).argmax(-1, keepdim=True)
    return ids.gather(1, best)[:, 0]
