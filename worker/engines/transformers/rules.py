"""What a request's sampling asks for beyond temperature and cuts: penalties, biases, bad words, min_tokens, grammars.

A `RuleBook` is made once for a model, `Rules` once for a request that needs any of it. Their state follows from the
request and its tokens alone, so that a resumed request goes on under the rules that it would have come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ....protocol.errors import BadRequestError
from ....protocol.payload import Sampling
from .badwords import BadWords
from .devices import first_line
from .grammar import Grammar, GrammarBook
from .history import History


class Rules:
    """What restricts one request's tokens.

    Attributes:
        history: its tokens, where there are penalties.
        bias_ids: tokens whose logits are changed, each once.
        biases: what is added to theirs.
        bad_words: what must not come.
        grammar: what the completion must be; None for anything.
    """

    def __init__(
        self, sampling: Sampling, bad_words: BadWords, grammar: Grammar | None, end_ids: frozenset[int]
    ) -> None:
        """Begin a request; see `RuleBook.make`."""
        repeats = sampling.repetition_penalty != 1
        counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        self.history = History(with_prompt=repeats) if repeats or counts else None
        biases = dict(sampling.logit_bias)  # of one that is given twice, the last
        self.bias_ids = np.fromiter(biases, np.int64, len(biases))
        self.biases = np.fromiter(biases.values(), np.float32, len(biases))
        self.bad_words = bad_words
        self.grammar = grammar
        self._end_ids = end_ids

    def accept(self, token_id: int) -> None:
        """Take the completion's next token, also those of a prior.

        Raises:
            BadRequestError: the grammar does not allow it here.
        """
        if self.grammar is not None:
            self.grammar.accept(token_id, ends=token_id in self._end_ids)

    @property
    def finished(self) -> bool:
        """Whether the grammar is complete and nothing may follow."""
        return self.grammar is not None and self.grammar.finished

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot go on, for a person; None while it can."""
        return None if self.grammar is None else self.grammar.problem


class RuleBook:
    """Makes the rules of requests to one model."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: frozenset[int]) -> None:
        """Make rules for a model; what takes time waits for the first request that needs it.

        Args:
            tokenizer: a transformers tokenizer, a fast one.
            vocabulary: token ids are below it.
            end_ids: the model's own end tokens.
        """
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._grammars = GrammarBook(tokenizer, vocabulary)

    def make(self, sampling: Sampling, end_ids: frozenset[int]) -> Rules | None:
        """Return a request's rules, None where it needs none.

        Args:
            sampling: the request's.
            end_ids: tokens that end its completion.

        Raises:
            BadRequestError: a bias or a bad word of a token that the model does not have; a grammar that is not
                valid, not supported, too large, or takes too long to compile.
        """
        grammar = self._grammars.make(sampling)
        restricts = sampling.logit_bias or sampling.bad_words or sampling.min_tokens
        penalises = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        if grammar is None and not restricts and not penalises:
            return None
        for token_id, _ in sampling.logit_bias:
            if token_id >= self._vocabulary:
                raise BadRequestError(
                    f"logit_bias: token {token_id} is unknown; the model's ids end at {self._vocabulary - 1}"
                )
        return Rules(sampling, self._bad_words(sampling.bad_words), grammar, end_ids)

    def close(self) -> None:
        """End the process that tries grammars."""
        self._grammars.close()

    def _bad_words(self, words: Sequence[str]) -> BadWords:
        return BadWords(words, self._tokenise, self._vocabulary, self._end_ids)

    def _tokenise(self, text: str) -> Sequence[int]:
        try:
            ids: Sequence[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        except Exception as error:
            raise BadRequestError(f"bad_words: the tokenizer rejects {text!r}: {first_line(error)}") from error
        return ids
