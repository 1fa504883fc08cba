"""Strings that must not come, as token sequences whose last token is banned when the others are there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ....protocol.errors import BadRequestError


class BadWords:
    """The token sequences of some words.

    A word is tokenised as the begin of a text, behind a space and behind a line's end: these are different tokens in
    most vocabularies. Another way of writing it in tokens remains possible, such as letter by letter.
    """

    def __init__(
        self,
        words: Sequence[str],
        tokenise: Callable[[str], Sequence[int]],
        vocabulary: int,
        end_ids: frozenset[int],
    ) -> None:
        """Tokenise the words.

        Args:
            words: not empty ones.
            tokenise: gives a text's tokens, without special ones.
            vocabulary: token ids are below it.
            end_ids: the model's end tokens; a word that is nothing but one of them, as written, is not banned.

        Raises:
            BadRequestError: a word has no tokens, or one that the model does not have.
        """
        self._alone: set[int] = set()
        self._behind: dict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
        newline = tuple(tokenise("\n")) if words else ()
        for word in words:
            ways = {tuple(tokenise(word)), tuple(tokenise(f" {word}"))}
            after = tuple(tokenise(f"\n{word}"))
            if after[: len(newline)] == newline:
                ways.add(after[len(newline) :])
            for sequence in sorted(ways):
                if len(sequence) != 1 or sequence[0] not in end_ids:
                    self._add(word, sequence, vocabulary)

    def _add(self, word: str, sequence: tuple[int, ...], vocabulary: int) -> None:
        if not sequence:
            raise BadRequestError(f"bad_words: {word!r} has no tokens")
        unknown = next((token for token in sequence if token >= vocabulary), None)
        if unknown is not None:
            raise BadRequestError(
                f"bad_words: {word!r} has the token {unknown}; the model's ids end at {vocabulary - 1}"
            )
        *prefix, last = sequence
        if prefix:
            self._behind[prefix[-1]].append((tuple(prefix), last))
        else:
            self._alone.add(last)

    def completed_by(self, prompt: Sequence[int], generated: Sequence[int]) -> list[int]:
        """Return the tokens that would complete a word behind these, some perhaps twice."""
        tokens = list(self._alone)
        newest = generated[-1] if generated else prompt[-1] if prompt else None
        for prefix, last in self._behind.get(newest, ()) if newest is not None else ():
            if _tail(prompt, generated, len(prefix)) == prefix:
                tokens.append(last)
        return tokens


def _tail(prompt: Sequence[int], generated: Sequence[int], count: int) -> tuple[int, ...]:
    missing = count - len(generated)
    if missing <= 0:
        return tuple(generated[-count:])
    return (*prompt[max(0, len(prompt) - missing) :], *generated)
