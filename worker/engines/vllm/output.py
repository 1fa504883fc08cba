"""What vLLM brings, in our terms: logprobs, reasons, and its figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....protocol.limits import MIN_LOGPROB
from ....protocol.messages import Details, FinishReason, TokenLogprob, TokenLogprobs

#: vLLM's names; any other reason is an error or an end that nobody asked for.
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "repetition": FinishReason.STOP}


@dataclass(slots=True)
class Figures:
    """A stat logger of vLLM's, which keeps the newest figures. vLLM calls it in the loop's thread.

    Attributes:
        waiting: requests that are not in the batch.
        kv_use: part of the KV cache in use.
    """

    waiting: int = 0
    kv_use: float = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_others: Any, **_more: Any) -> None:
        """Take what one step of vLLM tells; its own steps without figures tell None."""
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_use = scheduler_stats.kv_cache_usage

    def log(self) -> None:
        """Be called now and then, and need it not."""

    def log_engine_initialized(self) -> None:
        """Be called once, likewise."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Be called when vLLM is put to sleep, which a worker never does."""


def details(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]] | None, most: int, prompt: Any = None
) -> Details | None:
    """Return the details of a chunk; None where there are none.

    Args:
        token_ids: the chunk's.
        logprobs: vLLM's, one for each of them: token id -> Logprob.
        most: likeliest tokens that were asked for.
        prompt: the prompt's token ids and vLLM's logprobs of these, None for the first.
    """
    found = tuple(_told(token, at, most) for token, at in zip(token_ids, logprobs or (), strict=False))
    before: tuple[TokenLogprobs | None, ...] = ()
    if prompt is not None:
        before = tuple(None if at is None else _told(token, at, most) for token, at in zip(*prompt, strict=True))
    return Details(found, before) if found or before else None


def _told(token: int, at: Mapping[int, Any], most: int) -> TokenLogprobs:
    ranked: Iterable[tuple[int, Any]] = sorted(at.items(), key=lambda item: item[1].rank)
    top = tuple(TokenLogprob(other, _text(one), _logprob(one)) for other, one in ranked if one.rank <= most)
    return TokenLogprobs(token, _text(at[token]), _logprob(at[token]), top)


def _text(found: Any) -> str:
    return found.decoded_token or ""


def _logprob(found: Any) -> float:
    return max(float(found.logprob), MIN_LOGPROB)
