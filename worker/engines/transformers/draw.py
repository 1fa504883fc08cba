"""One row's wish: what both pickers must read alike out of a request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....protocol.payload import Sampling
from .noise import row_key

if TYPE_CHECKING:
    from .rules import Rules

#: In place of a token, for a row whose logits are not numbers (NaN), or infinite.
NOT_A_NUMBER = -1
#: In place of a token, for a row of which the rules leave none.
NOTHING_LEFT = -2
#: The lowest temperature that is divided by: float32 would lose lower ones, and greater ones are greedy already.
LEAST_TEMPERATURE = 1e-30


@dataclass(frozen=True, slots=True)
class Draw:
    """How to choose a row's next token.

    Attributes:
        sampling: the request's.
        position: absolute index of the token to be chosen, prompt included; the noise belongs to it.
        prompt: tokens of the prompt.
        generated: tokens of the completion so far; read while `choose` runs, not later.
        end_ids: tokens that end the completion.
        rules: what RuleBook.make returned for the request; what is not in it (penalties, biases, ...) is not applied.
    """

    sampling: Sampling
    position: int
    prompt: Sequence[int] = ()
    generated: Sequence[int] = ()
    end_ids: frozenset[int] = frozenset()
    rules: Rules | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature <= 0

    @property
    def temperature(self) -> float:
        """What logits are divided by."""
        return max(self.sampling.temperature, LEAST_TEMPERATURE)

    @property
    def least(self) -> float:
        """The least tempered logit, the greatest being 0, that min-p leaves."""
        return math.log(self.sampling.min_p) if self.sampling.min_p > 0 else -math.inf

    @property
    def key(self) -> int:
        """What the noise is made of."""
        return row_key(self.sampling.seed, self.position)

    def top_k(self, vocabulary: int) -> int:
        """Return how many of so many tokens top-k leaves."""
        return min(self.sampling.top_k or vocabulary, vocabulary)

    def restricted(self, vocabulary: int) -> bool:
        """Whether unlikely tokens of so many are cut off."""
        return self.top_k(vocabulary) < vocabulary or self.sampling.top_p < 1 or self.sampling.min_p > 0
