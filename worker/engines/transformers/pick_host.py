"""Picks each row's token on a CPU: rows one after the other, each in buffers that fit the core's own cache.

What is rare is kept small. A nucleus is found without a sort of the vocabulary: tokens that are too unlikely for it
are dropped by a bound first. And noise is computed for few tokens: where many are kept, the winner's score is known
beforehand to be near the logarithm of their mass, and the hashed bits of a token tell whether its noise can lift it
there. Both are exact, and `pick_device` picks the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .draw import NOT_A_NUMBER, NOTHING_LEFT, Draw
from .noise import gumbel, hash_on_host, split_keys

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

#: With more kept tokens than this, noise is computed for a shortlist.
SHORTLIST_FROM = 1024
#: A shortlist has the tokens whose score may come within this of the logarithm of the mass. The best score of all is
#: lower with a probability of exp(-e**3), 2 in 1,000,000,000 (then all are scored); e**3 tokens are on the list.
SHORTLIST_DEPTH = 3.0


class _Candidates(NamedTuple):
    row: int
    ids: Ids
    scores: Floats
    floor: float


def pick(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Return each row's token, or why there is none.

    Args:
        logits: float32 [rows, vocabulary], on the CPU.
        draws: one a row.

    Returns:
        int64 [rows].
    """
    return torch.from_numpy(_Picker(logits.shape[1]).pick(logits.numpy(), draws))


class _Picker:
    """Picks tokens of rows of one size, with the same buffers for each."""

    def __init__(self, vocabulary: int) -> None:
        self._all = np.arange(vocabulary)
        self._all32 = self._all.astype(np.uint32)
        self._values = np.empty(vocabulary, np.float32)
        self._parts = np.empty(vocabulary, np.float32)

    def pick(self, rows: Floats, draws: Sequence[Draw]) -> Ids:
        chosen = np.empty(len(draws), np.int64)
        drawn: list[_Candidates] = []
        for row, (values, draw) in enumerate(zip(rows, draws, strict=True)):
            best = int(values.argmax())  # the first of equals, and NaN before any number
            greatest = values[best]
            if not math.isfinite(greatest):
                chosen[row] = NOTHING_LEFT if greatest == -np.inf else NOT_A_NUMBER
            elif draw.greedy:
                chosen[row] = best
            else:
                drawn.append(self._candidates(row, values, greatest, draw))
        for candidates, token in zip(drawn, self._winners(drawn, draws), strict=True):
            if token is None:  # the shortlist does not have the winner
                token = self._from_all(rows[candidates.row], candidates, draws[candidates.row])
            chosen[candidates.row] = token
        return chosen

    def _temper(self, values: Floats, greatest: np.float32, draw: Draw) -> tuple[Floats, Floats]:
        """Return (logits - the greatest) / temperature, and their exponentials."""
        tempered = np.subtract(values, greatest, out=self._values)
        if draw.sampling.temperature != 1:
            np.divide(tempered, np.float32(draw.temperature), out=tempered)
        return tempered, np.exp(tempered, out=self._parts)

    def _candidates(self, row: int, values: Floats, greatest: np.float32, draw: Draw) -> _Candidates:
        tempered, parts = self._temper(values, greatest, draw)
        ids = self._kept(tempered, parts, draw)
        if (len(tempered) if ids is None else len(ids)) <= SHORTLIST_FROM:
            some = self._all if ids is None else ids
            return _Candidates(row, some, tempered[some], -math.inf)
        if ids is None:
            some, ids32 = self._all, self._all32
        else:
            some, ids32, parts = ids, self._all32[ids], parts[ids]
        mass = float(parts.sum())
        # A token scores above log(mass) - depth only if its u in (0, 1), see `gumbel`, is below
        # part / mass * e**depth. The bits are 2**32 u - 2**31; what they lose as float32 is far below 1024, and what
        # the mass loses far below a thousandth.
        bits = hash_on_host(draw.key, ids32).view(np.int32).astype(np.float32)
        bound = parts * np.float32(math.exp(SHORTLIST_DEPTH + 0.001) * 2.0**32 / mass)
        bound -= np.float32(2.0**31 - 1024)
        short = some[np.flatnonzero(bits <= bound)]
        return _Candidates(row, short, tempered[short], math.log(mass) - SHORTLIST_DEPTH)

    def _kept(self, tempered: Floats, parts: Floats, draw: Draw) -> Ids | None:
        """Return what top-k, top-p and min-p leave, lowest id first; None for all."""
        sampling, ids = draw.sampling, None
        top_k = draw.top_k(len(tempered))
        if top_k < len(tempered):
            border = np.partition(tempered, -top_k)[-top_k]
            ids = _lowest(np.flatnonzero(tempered >= border), tempered, border, top_k)
        if sampling.top_p < 1:
            ids = _nucleus(tempered, parts, ids, sampling.top_p)
        if sampling.min_p > 0:
            least = np.float32(draw.least)
            ids = np.flatnonzero(tempered >= least) if ids is None else ids[tempered[ids] >= least]
        return ids

    def _from_all(self, values: Floats, candidates: _Candidates, draw: Draw) -> int:
        tempered, parts = self._temper(values, values.max(), draw)
        ids = self._kept(tempered, parts, draw)
        some = self._all if ids is None else ids
        scores = tempered[some] + _noise([draw.key], [some])
        return int(some[scores.argmax()])

    def _winners(self, drawn: Sequence[_Candidates], draws: Sequence[Draw]) -> list[int | None]:
        """Return who has the best of logit and noise, of equals the lowest id; None where it is below the floor."""
        noise = _noise([draws[one.row].key for one in drawn], [one.ids for one in drawn])
        winners: list[int | None] = []
        start = 0
        for one in drawn:
            scores = one.scores + noise[start : start + len(one.ids)]
            start += len(one.ids)
            best = int(scores.argmax()) if len(scores) else 0
            winners.append(int(one.ids[best]) if len(scores) and scores[best] >= one.floor else None)
        return winners


def _noise(keys: Sequence[int], token_ids: Sequence[Ids]) -> Floats:
    """Return the noise of each key's tokens, one key behind the other."""
    if not keys:
        return np.empty(0, np.float32)
    low, high = split_keys(keys, torch.device("cpu"))
    owners = torch.repeat_interleave(torch.tensor([len(ids) for ids in token_ids]))
    noise: Floats = gumbel(low[owners, 0], high[owners, 0], torch.from_numpy(np.concatenate(token_ids))).numpy()
    return noise


def _lowest(ids: Ids, values: Floats, border: np.float32, count: int) -> Ids:
    """Return `count` of the ids: of those at the border, which may be too many, the lowest."""
    if len(ids) == count:
        return ids
    at_border = np.flatnonzero(values[ids] == border)
    return np.delete(ids, at_border[count - len(ids) :])


def _nucleus(tempered: Floats, parts: Floats, ids: Ids | None, top_p: float) -> Ids:
    """Return the likeliest of the ids (None: of all) that have a part `top_p` of their mass."""
    if ids is None:
        mass = float(parts.sum())
        # All that are below this have together less than 1 - p, and so lie behind the nucleus. The factor keeps
        # rounding out of it.
        ids = np.flatnonzero(parts >= mass * max(0.0, 1 - top_p) / len(parts) * 0.999)
    else:
        mass = float(parts[ids].sum(dtype=np.float64))
    values = tempered[ids]
    ordered = np.sort(values)[::-1]
    ordered_parts = np.exp(ordered)
    before = np.cumsum(ordered_parts, dtype=np.float64) - ordered_parts
    count = max(1, int(np.searchsorted(before, top_p * mass)))
    border = ordered[count - 1]
    return _lowest(ids[values >= border], tempered, border, count)
