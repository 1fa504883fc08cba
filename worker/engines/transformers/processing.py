"""What a request's rules make of the logits, for all rows in one pass, before anything is chosen.

The order: repetition penalty, presence and frequency penalty, biases (behind the penalties, so that none scales what
a user adds), bad words, end tokens before `min_tokens`, grammar. The host lists which entries are touched, and the
device is given these lists and nothing else; rows without rules cost nothing but the copy that keeps the model's own
logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .draw import Draw
from .grammar import allowed_tokens
from .rules import Rules
from .upload import upload


def process(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Apply the rules of all draws.

    Args:
        logits: float32 [rows, vocabulary]; stays as it is.
        draws: one a row.

    Returns:
        The same tensor where no draw has rules, else another one.
    """
    ruled = [(row, draw, draw.rules) for row, draw in enumerate(draws) if draw.rules is not None]
    if not ruled:
        return logits
    logits = logits.clone()
    _penalise(logits, ruled)
    _bias(logits, ruled)
    _ban(logits, ruled, _obey_grammars(logits, ruled))
    return logits


_Ruled = Sequence[tuple[int, Draw, Rules]]


class _Entries:
    """Entries of the logits, and values that belong to each."""

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int64]] = []
        self._columns: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(self, row: int, token_ids: NDArray[np.int64], *values: Any) -> None:
        """Add entries of a row; each of the values is one for all of them or one for each."""
        self._rows.append(np.full(len(token_ids), row))
        self._columns.append(token_ids)
        spread = np.empty((len(values), len(token_ids)), np.float32)
        for kind, value in enumerate(values):
            spread[kind] = value
        self._values.append(spread)

    def upload(self, logits: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor] | None:
        """Return the index of those entries that the logits have, and their values, [kinds, entries].

        None where none were added.
        """
        if not self._rows:
            return None
        index = np.stack([np.concatenate(self._rows), np.concatenate(self._columns)])
        there = index[1] < logits.shape[1]  # a model can have inputs that it cannot put out
        rows, columns = upload(index[:, there], logits.device)
        return (rows, columns), upload(np.concatenate(self._values, -1)[:, there], logits.device)


def _penalise(logits: torch.Tensor, ruled: _Ruled) -> None:
    entries = _Entries()
    for row, draw, rules in ruled:
        if rules.history is not None:
            ids, counts = rules.history.follow(draw.prompt, draw.generated)
            wishes = draw.sampling
            off = np.float32(wishes.frequency_penalty) * counts + np.float32(wishes.presence_penalty) * (counts > 0)
            entries.add(row, ids, wishes.repetition_penalty, off)
    found = entries.upload(logits)
    if found is not None:
        index, (factor, off) = found
        some = logits[index]
        logits[index] = torch.where(some < 0, some * factor, some / factor) - off


def _bias(logits: torch.Tensor, ruled: _Ruled) -> None:
    entries = _Entries()
    for row, _, rules in ruled:
        if len(rules.bias_ids):
            entries.add(row, rules.bias_ids, rules.biases)
    found = entries.upload(logits)
    if found is not None:
        index, (biases,) = found
        logits[index] += biases


def _obey_grammars(logits: torch.Tensor, ruled: _Ruled) -> set[int]:
    """Hide what the grammars do not allow; return the rows whose grammar allows nothing but an end."""
    bound = [(row, draw.end_ids, rules.grammar) for row, draw, rules in ruled if rules.grammar is not None]
    if not bound:
        return set()
    rows, ends, grammars = zip(*bound, strict=True)
    allowed, complete = allowed_tokens(grammars, ends, logits.shape[1])
    hidden = np.zeros(logits.shape, np.bool_)  # for all rows: in place is cheaper than to take some out and put back
    hidden[list(rows)] = ~allowed
    logits.masked_fill_(upload(hidden, logits.device), -torch.inf)
    return {row for row, done in zip(rows, complete, strict=True) if done}


def _ban(logits: torch.Tensor, ruled: _Ruled, complete: set[int]) -> None:
    entries = _Entries()
    for row, draw, rules in ruled:
        banned = rules.bad_words.completed_by(draw.prompt, draw.generated)
        if len(draw.generated) < draw.sampling.min_tokens and row not in complete:
            banned = [*banned, *draw.end_ids]
        if banned:
            entries.add(row, np.array(banned, np.int64))
    found = entries.upload(logits)
    if found is not None:
        logits[found[0]] = -torch.inf
