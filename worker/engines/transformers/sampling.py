"""Choosing the next token of every row in one vectorised pass.

First a request's rules change the logits (`processing`), then a token is picked: the likeliest one where the
temperature is 0, else the winner of a Gumbel-max among what top-k, top-p and min-p leave. These come in the order of
transformers' warpers: temperature, top-k, top-p over what top-k left, min-p. Of equals the lowest id counts as the
likelier, so that nothing depends on the order in which a device's sort leaves them. On a CPU rows are picked one by
one (`pick_host`), elsewhere together (`pick_device`); both pick the same.

`choose` hands a GPU its work and returns; `Picked.fetch` waits for what it brought, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import pick_device, pick_host
from .draw import NOT_A_NUMBER, NOTHING_LEFT, Draw
from .logprobs import RawLogprobs, logprobs_of, measure, read
from .processing import process
from .upload import upload

__all__ = ["NOTHING_LEFT", "NOT_A_NUMBER", "Choice", "Draw", "Picked", "RawLogprobs", "choose", "logprobs_of"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What came out for a row.

    Attributes:
        token_id: the token; NOT_A_NUMBER or NOTHING_LEFT where there is none.
        logprobs: what the request wants to know of it; None for nothing.
        problem: why there is no token, for a person; None where there is one.
    """

    token_id: int
    logprobs: RawLogprobs | None = None
    problem: str | None = None


class Picked:
    """The tokens of a step, perhaps still on their way.

    Attributes:
        token_ids: int64 [rows], on the device of the logits; below 0 where there is no token.
    """

    def __init__(self, token_ids: torch.Tensor, measured: torch.Tensor | None, draws: Sequence[Draw]) -> None:
        """Begin to bring the results to the host.

        Args:
            token_ids: see above.
            measured: of the rows that want logprobs, in order, what `logprobs.measure` returned.
            draws: one a row.
        """
        self.token_ids = token_ids
        self._draws = tuple(draws)
        packed = token_ids if measured is None else torch.cat([token_ids.double(), measured.flatten()])
        self._width = 0 if measured is None else measured.shape[1]
        self._event: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            # With an event of its own, fetching does not wait for what is launched in the meantime.
            packed = packed.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        self._packed = packed

    def fetch(self) -> list[Choice]:
        """Return each row's choice; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        rows = len(self._draws)
        values = self._packed.tolist()
        choices = []
        start = rows
        for draw, value in zip(self._draws, values[:rows], strict=True):
            token_id, logprobs = int(value), None
            if draw.sampling.logprobs is not None:
                logprobs = read(values[start : start + self._width], draw.sampling.logprobs)
                start += self._width
            if token_id < 0:
                choices.append(Choice(token_id, None, _problem(token_id, draw)))
            else:
                choices.append(Choice(token_id, logprobs))
        return choices


def _problem(code: int, draw: Draw) -> str:
    if code == NOT_A_NUMBER:
        return "the model gave values that are not numbers (NaN or infinite) for this request"
    grammar = None if draw.rules is None else draw.rules.problem
    if grammar is not None:
        return f"the request's structured output cannot go on: {grammar}"
    return "no token is left to choose from: the request's rules exclude all of them"


@torch.inference_mode()
def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> Picked:
    """Choose the next token of each row.

    Args:
        logits: the model's, float [rows, vocabulary], on any device; they stay as they are.
        draws: one a row.
    """
    if logits.device.type == "mps":  # no float64 there, and the memory is the same
        logits = logits.cpu()
    logits = logits.float()
    processed = process(logits, draws)
    pick = pick_host.pick if logits.device.type == "cpu" else pick_device.pick
    token_ids = pick(processed, draws)
    told = [(row, draw.sampling.logprobs) for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    measured = None
    if told:
        index = upload(np.array([row for row, _ in told]), logits.device)
        measured = measure(logits[index], token_ids[index], max(k for _, k in told))
    return Picked(token_ids, measured, draws)
