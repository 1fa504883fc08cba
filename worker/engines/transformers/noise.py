"""Noise as a pure function of (seed, position, token id): the same bits on every device, in every batch.

A stream that is resumed on another worker draws the same noise at the same position, and because the noise belongs
to the token id, not to the rank, two tokens that swap rank by a rounding error keep theirs.

The hash is computed in int32, whose multiplication wraps alike everywhere; its last part, from bits to a Gumbel
variate, is in float32. `hash_on_host` gives the same bits without the part that takes long.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .upload import upload

_MASK64 = 2**64 - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
#: The multipliers of `lowbias32` (C. Wellons, "Prospecting for hash functions").
_MULTIPLIER_1 = 0x7FEB352D
_MULTIPLIER_2 = 0x846CA68B
_LOWEST32 = -(2**31)


def _splitmix64(value: int) -> int:
    """Return the finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits, each depends on every input bit."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def row_key(seed: int, position: int) -> int:
    """Return 64 bits that stand for one draw.

    Args:
        seed: the request's, 0 to 2**63 - 1.
        position: absolute index of the token to be drawn, prompt included.
    """
    return _splitmix64(_splitmix64((seed + _GOLDEN64) & _MASK64) ^ (position * _GOLDEN64 & _MASK64))


def signed32(value: int) -> int:
    """Return the int32 that has the low 32 bits of `value`."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def split_keys(keys: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low and the high halves of row keys, int32 [rows, 1] each."""
    halves = [(signed32(key), signed32(key >> 32)) for key in keys]
    both = upload(np.array(halves, np.int32), device)
    return both[:, :1], both[:, 1:]


def _fold(bits: torch.Tensor, shift: int) -> None:
    """Do `bits ^= bits >> shift` in place, with the logical shift that int32 lacks."""
    bits ^= (bits >> shift) & ((1 << (32 - shift)) - 1)


def hash_tokens(low: torch.Tensor, high: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return 32 hashed bits for each row and token.

    Args:
        low: int32 [rows, 1], see `split_keys`.
        high: int32 [rows, 1].
        token_ids: int [rows or 1, tokens].

    Returns:
        int32 [rows, tokens]. For one row it is a bijection of the ids: no two tokens share their bits.
    """
    # Ids are small and close together: a first multiplication spreads them over all 32 bits.
    bits = token_ids.to(torch.int32) * signed32(_GOLDEN64)
    bits = bits ^ low
    _fold(bits, 16)
    bits *= signed32(_MULTIPLIER_1)
    bits += high
    _fold(bits, 15)
    bits *= signed32(_MULTIPLIER_2)
    _fold(bits, 16)
    return bits


def hash_on_host(key: int, token_ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the bits of `hash_tokens` for one row, four times as fast on a CPU: numpy has logical shifts.

    Args:
        key: see `row_key`.
        token_ids: [tokens].
    """
    bits: NDArray[np.uint32] = token_ids * np.uint32(_GOLDEN64 & 0xFFFFFFFF)
    shifted = np.empty_like(bits)
    bits ^= np.uint32(key & 0xFFFFFFFF)
    bits ^= np.right_shift(bits, 16, out=shifted)
    bits *= np.uint32(_MULTIPLIER_1)
    bits += np.uint32(key >> 32)
    bits ^= np.right_shift(bits, 15, out=shifted)
    bits *= np.uint32(_MULTIPLIER_2)
    bits ^= np.right_shift(bits, 16, out=shifted)
    return bits


def gumbel(low: torch.Tensor, high: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise, float32 [rows, tokens]; arguments as for `hash_tokens`."""
    # u in (0, 1), and an exponential variate as -log(1 - u): a winner has a small one, hence a small u, which float32
    # holds to full precision. log(u) would round the winners' u to 1. The bits become a float where they are small,
    # not as negative numbers with 2**31 added to them after that: those near -2**31 are a multiple of 128, would give
    # u = 0, and infinite noise lets its token win whatever the logits say.
    bits = hash_tokens(low, high, token_ids) ^ _LOWEST32
    u = bits.float()
    u.add_((bits < 0).float(), alpha=2.0**32).add_(0.5).mul_(2.0**-32)
    u.clamp_(max=1 - 2.0**-24)  # the greatest float32 below 1
    return u.neg_().log1p_().neg_().log_().neg_()
