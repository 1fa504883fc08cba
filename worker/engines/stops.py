"""Stop strings in a stream of text: hold back what may become one, cut at the first that is complete.

The result does not depend on where the stream's chunks end.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a stream.

    The stop that is complete first wins; of those that end at the same character, the one that begins first.

    Attributes:
        stopped: a stop string has been found; nothing more comes out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Look for `stops`, none of them empty."""
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> str:
        """Take more of the stream.

        Returns:
            The text that is certainly in front of every stop string. After it look at `stopped`.
        """
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = len(text) - self._possible_tail(text)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """End the stream; return the text that was held back."""
        held, self._held = self._held, ""
        return held

    def _possible_tail(self, text: str) -> int:
        """Return the length of the longest tail that is a proper prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
