"""What `embed` returns: vectors in one piece of memory."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Any, overload

from ..protocol.messages import Usage


class Embeddings(Sequence["memoryview[float]"]):
    """The vectors of a list of texts, in its order; each a memoryview of float32 that is not copied.

    `numpy.asarray(embeddings)` is a matrix over the same memory, a row for each text.

    Attributes:
        dimension: numbers of one vector; 0 where there is none.
        usage: tokens that they cost.
    """

    def __init__(self, numbers: bytearray, dimension: int, usage: Usage) -> None:
        """Wrap vectors that stand one behind the other, little endian."""
        self.dimension = dimension
        self.usage = usage
        native = array("f", bytes(numbers)) if sys.byteorder == "big" else numbers
        if isinstance(native, array):
            native.byteswap()
        self._numbers = memoryview(native).cast("B").cast("f")

    def __repr__(self) -> str:
        """Return how many they are, of which dimension."""
        return f"<{type(self).__name__}: {len(self)} vectors of {self.dimension}>"

    def __len__(self) -> int:
        """Return how many vectors there are."""
        return len(self._numbers) // self.dimension if self.dimension else 0

    @overload
    def __getitem__(self, place: int) -> memoryview[float]: ...
    @overload
    def __getitem__(self, place: slice) -> list[memoryview[float]]: ...
    def __getitem__(self, place: int | slice) -> memoryview[float] | list[memoryview[float]]:
        """Return the vector of a text, or a list of some."""
        places = range(len(self))[place]  # an IndexError where there is none
        if isinstance(places, range):
            return [self[each] for each in places]
        return self._numbers[places * self.dimension : (places + 1) * self.dimension]

    def tolist(self) -> list[list[float]]:
        """Return them as lists of numbers, as JSON takes them."""
        return [list(vector) for vector in self]

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Show numpy the memory; see numpy's documentation, The array interface protocol."""
        order = "<" if sys.byteorder == "little" else ">"
        shape = (len(self), self.dimension)
        return {"version": 3, "shape": shape, "typestr": f"{order}f4", "data": self._numbers.cast("B")}
