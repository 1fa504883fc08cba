"""Choosing the next token of every row in one vectorised pass.

A row is greedy (temperature 0), free (nothing cut off) or restricted (top-k, top-p or both). Cutting off comes in
the order of transformers' warpers: temperature, top-k, then top-p over what top-k left. The draw is a Gumbel-max:
the token with the greatest logit + noise, which has the softmax as its distribution. Of equals the lowest id counts
as the likelier, so that nothing depends on the order in which a device's sort leaves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....protocol.payload import Sampling
from .noise import gumbel, row_key, split_keys

#: What `choose` returns for a row whose logits are not numbers.
NOT_A_NUMBER = -1
#: Candidates that a restricted row is looked at with first; nearly every nucleus is smaller.
FIRST_WIDTH = 64
#: Factor by which the candidates of the rows that need more are widened.
WIDENING = 16


@dataclass(frozen=True, slots=True)
class Draw:
    """One row's wish: how to choose, and the absolute index of the token to be chosen, prompt included."""

    sampling: Sampling
    position: int

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature <= 0

    def restricted(self, vocabulary: int) -> bool:
        """Whether unlikely tokens of so many are cut off."""
        return 0 < self.sampling.top_k < vocabulary or self.sampling.top_p < 1


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: float [rows, vocabulary], on any device.
        draws: one a row.

    Returns:
        Token ids, or NOT_A_NUMBER for a row that has a NaN.
    """
    if logits.device.type == "mps":  # no float64 there, and the memory is the same
        logits = logits.cpu()
    logits = logits.float()
    chosen = logits.argmax(-1)  # the first of equals, as torch promises; and a NaN before any number
    broken = logits.gather(1, chosen[:, None])[:, 0].isnan()
    vocabulary = logits.shape[1]
    drawn = [row for row, draw in enumerate(draws) if not draw.greedy]
    restricted = [row for row in drawn if draws[row].restricted(vocabulary)]
    free = [row for row in drawn if not draws[row].restricted(vocabulary)]
    if free:
        chosen[_index(free, logits)] = _free(_tempered(logits, free, draws), [draws[row] for row in free])
    if restricted:
        tempered = _tempered(logits, restricted, draws)
        chosen[_index(restricted, logits)] = _restricted(tempered, [draws[row] for row in restricted])
    ids: list[int] = chosen.masked_fill(broken, NOT_A_NUMBER).tolist()
    return ids


def _index(rows: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, device=like.device)


def _tempered(logits: torch.Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> torch.Tensor:
    """Return (logits - their greatest) / temperature of some rows; a tiny temperature cannot overflow it."""
    some = logits if len(rows) == len(logits) else logits[_index(rows, logits)]
    temperature = torch.tensor([[draws[row].sampling.temperature] for row in rows], dtype=torch.float32)
    return (some - some.amax(-1, keepdim=True)) / temperature.to(logits.device)


def _free(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    token_ids = torch.arange(logits.shape[1], device=logits.device)[None]
    return (logits + gumbel(*_keys(draws, logits), token_ids)).argmax(-1)


def _keys(draws: Sequence[Draw], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return split_keys([row_key(draw.sampling.seed, draw.position) for draw in draws], like.device)


def _restricted(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Draw among the likeliest candidates, and widen them for the rows whose cut they do not show."""
    vocabulary = logits.shape[1]
    chosen = torch.empty(len(draws), dtype=torch.long, device=logits.device)
    todo = list(range(len(draws)))
    width = FIRST_WIDTH
    while todo:
        at = _index(todo, logits)
        some = [draws[row] for row in todo]
        ids, kept, settled = nucleus(logits[at], some, min(width, vocabulary))
        noise = gumbel(*_keys(some, logits), ids)
        scores = (logits[at].gather(1, ids) + noise).masked_fill(~kept, -torch.inf)
        chosen[at] = ids.gather(1, scores.argmax(-1, keepdim=True))[:, 0]
        todo = [row for row, done in zip(todo, settled.tolist(), strict=True) if not done]
        width *= WIDENING
    return chosen


def nucleus(
    logits: torch.Tensor, draws: Sequence[Draw], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find what top-k and top-p leave of each row, looking at its `width` likeliest tokens.

    Args:
        logits: float32 [rows, vocabulary], divided by the temperature.
        draws: one a row.
        width: at most the vocabulary.

    Returns:
        Candidate ids, long [rows, width], likeliest first, of equals the lowest id first; which of them are kept,
        bool [rows, width]; and whether the row is settled, bool [rows]: what is kept cannot change with more width.
    """
    device, vocabulary = logits.device, logits.shape[1]
    values, ids = logits.topk(width)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(stable=True, dim=-1, descending=True)
    ids = ids.gather(1, order)

    top_k = torch.tensor([[draw.sampling.top_k or vocabulary] for draw in draws], device=device)
    top_p = torch.tensor([[draw.sampling.top_p] for draw in draws], dtype=torch.float64, device=device)
    kept = torch.arange(width, device=device) < top_k
    # Top-p is about the mass that top-k left. Where top-k leaves more than the candidates, that is the mass of all
    # (then the row is either settled by a small nucleus of an unlimited top-k, or widened).
    unlimited = top_k[:, 0] >= vocabulary
    mass_kept = torch.logsumexp(values.double().masked_fill(~kept, -torch.inf), -1)
    mass = torch.where(unlimited, torch.logsumexp(logits.double(), -1), mass_kept)
    probability = (values.double() - mass[:, None]).exp()
    before = probability.cumsum(-1) - probability
    # Without the first condition a p of 1 could lose its last tokens to rounding.
    kept &= (top_p >= 1) | (before < top_p)
    kept[:, 0] = True
    if width == vocabulary:
        return ids, kept, torch.ones(len(draws), dtype=torch.bool, device=device)
    # Equals of the last candidate may be missing, so the cut must lie above its value.
    known = unlimited | (top_k[:, 0] <= width)
    last = values.masked_fill(~kept, torch.inf).amin(-1)
    return ids, kept, known & (last > values[:, -1])
