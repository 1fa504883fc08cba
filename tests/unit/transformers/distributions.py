"""What transformers' own processors leave of logits, and whether draws have a distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tokenmq.protocol.payload import Sampling
from tokenmq.worker.engines.transformers.draw import Draw

Pick = Callable[[torch.Tensor, Sequence[Draw]], torch.Tensor]


def warped(logits: torch.Tensor, wishes: Sampling) -> torch.Tensor:
    """Return the probabilities that transformers' warpers leave, float64 [rows, vocabulary]."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(wishes.temperature)(ids, logits.double())
    if wishes.top_k:
        scores = TopKLogitsWarper(min(wishes.top_k, logits.shape[1]))(ids, scores)
    if wishes.top_p < 1:
        scores = TopPLogitsWarper(wishes.top_p)(ids, scores)
    if wishes.min_p > 0:
        scores = MinPLogitsWarper(wishes.min_p)(ids, scores)
    return scores.softmax(-1)


def ruled(
    logits: torch.Tensor,
    wishes: Sampling,
    prompt: Sequence[int],
    generated: Sequence[int],
    bad: Sequence[Sequence[int]],
    ends: Sequence[int],
) -> torch.Tensor:
    """Return the scores [1, vocabulary] that transformers' processors make, one behind the other.

    It has no presence and frequency penalty; these are written out as OpenAI's documentation defines them.
    """
    ids = torch.tensor([[*prompt, *generated]])
    scores = logits.clone()
    if wishes.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(wishes.repetition_penalty)(ids, scores)
    for token in set(generated):
        times = list(generated).count(token)
        scores[0, token] -= wishes.frequency_penalty * times + wishes.presence_penalty
    if wishes.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in wishes.logit_bias])(
            ids, scores
        )
    if bad:
        scores = NoBadWordsLogitsProcessor([list(word) for word in bad])(ids, scores)
    if wishes.min_tokens:
        processor = MinNewTokensLengthLogitsProcessor(len(prompt), wishes.min_tokens, torch.tensor(list(ends)))
        scores = processor(ids, scores)
    return scores


def assert_drawn_from(tokens: Sequence[int], probabilities: torch.Tensor) -> None:
    """Check draws against exact probabilities [vocabulary], with chi-square."""
    expected = probabilities * len(tokens)
    observed = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    assert not observed[expected == 0].any(), "a token was drawn that is cut off"
    usual = expected >= 5  # chi-square needs some in each class; the rare ones make one class
    classes = torch.cat([expected[usual], expected[~usual].sum()[None]])
    seen = torch.cat([observed[usual], observed[~usual].sum()[None]])
    present = classes > 0
    chi = float(((seen - classes)[present] ** 2 / classes[present]).sum())
    freedom = int(present.sum()) - 1
    # Mean + 4 standard deviations of chi-square; the seeds are fixed, so that this passes always or never.
    assert chi <= freedom + 4 * (2 * max(freedom, 1)) ** 0.5
