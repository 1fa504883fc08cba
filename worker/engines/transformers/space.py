"""How the cache's tokens are shared out: every row has the same stride, and the stride follows the longest row. Pure.

The cache is one run of tokens. A decode reads its rows as one view, so they must stand at equal distances: that
distance is the stride. While all rows are short, as many run as there are slots; one that grows beyond the stride
makes all of them wider, and where they then no longer fit, some must leave. So memory is shared by rows that are
short and rows that are long, without a copy in any step but those in which the stride changes.
"""

from __future__ import annotations

#: Strides are this, or this and a half, times a power of two: no row is given a third more than it needs.
SMALLEST = 64
#: All of them are multiples of this, as what a row sees of its slot is: attention computes whole vectors of so many
#: keys by another function than the rest behind them, so that the end of a slot would change a row's bits.
VECTOR = 16


def whole_vectors(tokens: int) -> int:
    """Return the tokens, rounded up to whole vectors."""
    return -(-tokens // VECTOR) * VECTOR


class Space:
    """The shape of a cache.

    Attributes:
        capacity: tokens that it has room for.
        rows: most rows.
        context: most tokens of a row.
        stride: tokens from one row to the next, at present.
    """

    def __init__(self, capacity: int, rows: int, context: int) -> None:
        """Share out `capacity` tokens, `context` or more."""
        self.capacity = capacity
        self.rows = rows
        self.context = context
        widest = whole_vectors(context)
        self._widest = widest if widest <= capacity else context
        #: Less than this saves nothing: with it all rows fit.
        least = min(self._widest, capacity // rows)
        self._least = least // VECTOR * VECTOR or least
        self.stride = self._least

    def stride_for(self, tokens: int) -> int:
        """Return the stride for a longest row of so many tokens."""
        stride = SMALLEST
        while stride < tokens:
            stride = stride * 3 // 2 if stride & (stride - 1) == 0 else stride * 4 // 3
        return max(self._least, min(stride, self._widest))

    def rows_at(self, stride: int) -> int:
        """Return how many rows there is room for."""
        return min(self.rows, self.capacity // stride)

    def room(self, rows: int, tokens: int) -> int | None:
        """Return the stride for so many rows with a longest one of `tokens`; None where they do not fit.

        The present stride stays as long as it will do.
        """
        if tokens <= self.stride and rows <= self.rows_at(self.stride):
            return self.stride
        stride = self.stride_for(tokens)
        return stride if rows <= self.rows_at(stride) else None
