"""The texts of single tokens, and logprobs with them."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer

from ....protocol.limits import MIN_LOGPROB
from ....protocol.messages import TokenLogprob, TokenLogprobs
from .sampling import RawLogprobs

#: Texts that are remembered: those of the tokens that come most.
_REMEMBERED = 65_536


class TokenTexts:
    """Knows what each token is alone; half a character is a replacement character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode with `tokenizer`, the `backend_tokenizer` of a transformers one."""

        def decode(token_id: int) -> str:
            # Special tokens too: whoever asks for logprobs wants to see them.
            text: str = tokenizer.decode([token_id], skip_special_tokens=False)
            return text

        self._text = lru_cache(_REMEMBERED)(decode)

    def logprobs(self, token_id: int, raw: RawLogprobs) -> TokenLogprobs:
        """Return a token's logprobs as they are sent."""
        top = tuple(TokenLogprob(one, self._text(one), _told(logprob)) for one, logprob in raw.top)
        return TokenLogprobs(token_id, self._text(token_id), _told(raw.logprob), top)


def _told(logprob: float) -> float:
    """Return a logprob as the wire carries it: rounding may have put it above 0, and 0 has none."""
    return max(MIN_LOGPROB, min(0.0, logprob))
