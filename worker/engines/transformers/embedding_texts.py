"""The texts of a request, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....protocol.errors import BadRequestError
from .devices import first_line
from .sentence import Recipe

#: Characters for each token that a text may have, above which only its head is tokenised at first: megabytes take
#: seconds, in which nobody's texts are embedded. Text has about four to a token.
HEAD_CHARS = 16
#: Characters for each token above which a text is not tokenised in whole, see `prompt`.
MOST_CHARS = 64


class TextReader:
    """Turns texts into token ids that the model can take.

    Attributes:
        limit: most tokens of a text, the prompt before it and the special ones included.
        skip: tokens of the prompt, where these are not pooled.
    """

    def __init__(self, tokenizer: Any, name: str, recipe: Recipe) -> None:
        """Read texts for one model.

        Args:
            tokenizer: a transformers tokenizer.
            name: the served name, for messages.
            recipe: what is put before a text, and whether it is lower-cased.
        """
        self._tokenizer = tokenizer
        self._name = name
        self._prompt = recipe.prompt
        self._lower = recipe.lower_case
        self.limit = 0
        # The first call takes truncation and padding off the tokenizer, which must not fall into another's call.
        self._tokenise([""])
        self.skip = 0 if recipe.pools_prompt or not recipe.prompt else self._prompt_tokens()

    def read(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each text's token ids, one or more.

        Raises:
            BadRequestError: a text has no tokens, or too many.
        """
        head = HEAD_CHARS * self.limit
        for number, text in enumerate(texts):
            if len(text) > head and len(self._tokenise([text[:head]])[0]) > 2 * self.limit:
                self._refuse(number, f"more than {2 * self.limit}")
            if len(text) > MOST_CHARS * self.limit:
                raise BadRequestError(
                    f"text {number} has {len(text)} characters; model {self._name!r} takes {self.limit} tokens, and "
                    f"reads at most {MOST_CHARS} characters for each: divide it"
                )
        read = self._tokenise(texts)
        for number, ids in enumerate(read):
            if len(ids) > self.limit:
                self._refuse(number, str(len(ids)))
            if len(ids) <= self.skip:
                raise BadRequestError(f"text {number} has no tokens for model {self._name!r}")
        return read

    def _refuse(self, number: int, tokens: str) -> None:
        raise BadRequestError(
            f"text {number} has {tokens} tokens; model {self._name!r} takes at most {self.limit} a text: divide it"
        )

    def _tokenise(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        given = [self._prompt + text for text in texts]
        if self._lower:
            given = [text.lower() for text in given]
        try:
            # `verbose` off: the tokenizer would log a warning for what is answered here with an error.
            ids = self._tokenizer(given, verbose=False, padding=False, truncation=False).input_ids
        except Exception as error:  # such as half a surrogate pair, which is in no encoding
            raise BadRequestError(
                f"the tokenizer of model {self._name!r} rejects a text: {first_line(error)}"
            ) from error
        return tuple(map(tuple, ids))

    def _prompt_tokens(self) -> int:
        """Return how many tokens the prompt has before a text."""
        ids = self._tokenizer(self._prompt, verbose=False).input_ids
        ends = {self._tokenizer.sep_token_id, self._tokenizer.eos_token_id}
        return len(ids) - (ids[-1] in ends)
