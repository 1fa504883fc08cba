"""What a target of the fuzzer is, and what it raises when something breaks."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from random import Random
from typing import Protocol


class Broken(AssertionError):  # noqa: N818 - what is found is no error of the fuzzer
    """Something broke.

    Attributes:
        what: for a person.
        inputs: what was put in, the latest last: the frames of one message each.
    """

    def __init__(self, what: str, inputs: Sequence[Sequence[bytes]]) -> None:
        super().__init__(what)
        self.what = what
        self.inputs = [list(frames) for frames in inputs]

    @classmethod
    def by(cls, error: BaseException, inputs: Sequence[Sequence[bytes]]) -> Broken:
        """Return what an exception is that nobody should have seen."""
        return cls("".join(traceback.format_exception(type(error), error, error.__traceback__)), inputs)


class Target(Protocol):
    """Something that takes hostile input. Each case is made by a Random alone, so that its seed brings it back."""

    name: str

    def case(self, random: Random) -> int:
        """Try one input, or one story of many; return how many messages that were.

        Raises:
            Broken: what must hold did not.
        """

    def close(self) -> None:
        """Leave nothing behind."""
