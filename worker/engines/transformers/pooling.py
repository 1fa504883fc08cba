"""One vector of the states of a text's tokens. Rows are padded on the right; padding is never looked at."""

from __future__ import annotations

import torch


def pool(states: torch.Tensor, lengths: torch.Tensor, modes: tuple[str, ...], skip: int = 0) -> torch.Tensor:
    """Return one vector a row.

    Args:
        states: the last layer's, [rows, tokens, width].
        lengths: how many of a row's tokens are no padding, [rows].
        modes: some of sentence.POOLINGS; of several the vectors are put side by side.
        skip: tokens at the begin (of a prompt) that are not pooled, fewer than any row has.

    Returns:
        float32, [rows, width times the number of modes].
    """
    states = states.float()
    place = torch.arange(states.shape[1], device=states.device)
    inside = ((place < lengths[:, None]) & (place >= skip))[:, :, None]
    rows = torch.arange(states.shape[0], device=states.device)
    vectors = []
    for mode in modes:
        if mode == "cls":
            vectors.append(states[:, skip])
        elif mode == "lasttoken":
            vectors.append(states[rows, lengths - 1])
        elif mode == "max":
            vectors.append(states.masked_fill(~inside, float("-inf")).amax(1))
        else:
            weight = inside * (place[:, None] + 1.0) if mode == "weightedmean" else inside.float()
            # What a model makes of padding may be no number, and that times 0 is none either.
            total = (states.masked_fill(~inside, 0.0) * weight).sum(1)
            weights = weight.sum(1)
            vectors.append(total / (weights.sqrt() if mode == "mean_sqrt_len_tokens" else weights))
    return torch.cat(vectors, dim=-1)
