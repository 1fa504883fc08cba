"""Logprobs: the log-softmax of the model's own logits, before temperature, penalties, biases or masks touch them.

So they tell what the model thinks, whatever the request made of it, and they are the same for a greedy row and a hot
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .upload import upload

#: Rows of logits that are made float32 at a time: a long prompt's all at once can be larger than the model.
ROWS = 128


@dataclass(frozen=True, slots=True)
class RawLogprobs:
    """What the model thought of a token.

    Attributes:
        logprob: the token's own.
        top: the likeliest tokens with theirs, the likeliest first, of equals the lowest id.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def measure(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> torch.Tensor:
    """Compute the logprobs of tokens and of each row's k likeliest, without waiting for the device.

    Args:
        logits: [rows, vocabulary].
        token_ids: int64 [rows], on the same device; one below 0 gives anything.
        k: 0 or more.

    Returns:
        float64 [rows, 1 + 2 * k] for `read`: one tensor, so that one copy brings all of it.
    """
    logits = logits.float()
    mass = logits.logsumexp(-1, keepdim=True)
    columns = [(logits.gather(1, token_ids.clamp(min=0)[:, None]) - mass).double()]
    if k:
        values, ids = logits.topk(min(k, logits.shape[1]))
        columns += [ids.double(), (values - mass).double()]
    return torch.cat(columns, -1)


def read(row: Sequence[float], k: int) -> RawLogprobs:
    """Return what a row of `measure` says, of its likeliest only the first k."""
    width = len(row) // 2
    top = sorted(zip(map(int, row[1 : 1 + width]), row[1 + width :], strict=True), key=lambda one: (-one[1], one[0]))
    return RawLogprobs(row[0], tuple(top[:k]))


@torch.inference_mode()
def logprobs_of(logits: torch.Tensor, next_ids: Sequence[int], k: int) -> list[RawLogprobs]:
    """Return what the model thought of the tokens that follow in a prompt; waits for the device.

    Args:
        logits: [tokens, vocabulary].
        next_ids: the token behind each of them.
        k: tell of so many likeliest, 0 or more.
    """
    if not next_ids:
        return []
    if logits.device.type == "mps":  # no float64 there, and the memory is the same
        logits = logits.cpu()
    ids = upload(np.array(next_ids, np.int64), logits.device)
    starts = range(0, len(next_ids), ROWS)
    parts = [measure(logits[start : start + ROWS], ids[start : start + ROWS], k) for start in starts]
    return [read(row, k) for row in torch.cat(parts).tolist()]
