"""The text of one completion: detokenised, and cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from ..stops import StopMatcher
from .detokenize import Detokenizer


class TextStream:
    """Tokens in, text out that will not have to be taken back."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        """Decode with `tokenizer`; stop at the first of `stops`."""
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stops.stopped

    def feed(self, token_id: int, *, may_stop: bool = True) -> str:
        """Take a token; return the text that is certain now. Where it may not stop, stop strings are plain text."""
        text = self._detokenizer.feed(token_id)
        return self._stops.feed(text) if may_stop else text

    def flush(self) -> str:
        """End the stream; return what was held back. It may complete a stop string after all."""
        return self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
