"""Messages of one length in what a socket has brought, without a look at each: a few slices tell that nothing else
is among them. Where something is, a heartbeat once a second, the slow way finds it."""

from __future__ import annotations

import struct
from collections.abc import Callable

MAGIC = b"TMQ"
#: Where the command stands in a TMQ/1 header.
_COMMAND_AT = 4
#: Eight characters of a token's text; the moment of sending is written over them.
STAMP = "STAMPED!"
_STAMP = struct.Struct(">Q")
STAMP_BYTES = _STAMP.size


class Strides:
    """What one client gets: messages that look like a sample, and others.

    Attributes:
        size: the length of a message as it arrives.
    """

    def __init__(
        self, sample: bytes, units: Callable[[bytes], tuple[list[bytes], int]], take: Callable[[bytes], None]
    ) -> None:
        """Know what to look for.

        Args:
            sample: a message as it arrives; its length, its first octet, the one before its body and its command tell
                the others of its kind.
            units: returns what has arrived one by one, and the length of it together.
            take: gets what is of another kind.
        """
        self.size = len(sample)
        body_at = sample.index(MAGIC)
        self._marks = [(at, sample[at : at + 1]) for at in (0, body_at - 1, body_at + _COMMAND_AT)]
        self._units = units
        self._take = take
        stamp_at = sample.find(STAMP.encode())
        behind = self.size - stamp_at - STAMP_BYTES
        self._moments = None if stamp_at < 0 else struct.Struct(f">{stamp_at}xQ{behind}x")

    def split(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the whole messages of the kind, joined, and what is not whole yet."""
        count = len(data) // self.size
        whole = data[: count * self.size]
        if all(whole[at :: self.size] == mark * count for at, mark in self._marks):
            return whole, data[len(whole) :]
        units, end = self._units(data)
        alike = []
        for unit in units:
            if self._is_alike(unit):
                alike.append(unit)
            else:
                self._take(unit)
        return b"".join(alike), data[end:]

    def moments(self, whole: bytes) -> list[int]:
        """Return the moments of sending of whole messages, as `stamp` has written them."""
        assert self._moments is not None, "the sample has no stamp"
        return [moment for (moment,) in self._moments.iter_unpack(whole)]

    def _is_alike(self, unit: bytes) -> bool:
        return len(unit) == self.size and all(unit[at : at + 1] == mark for at, mark in self._marks)


def stamp(block: bytearray, first: int, size: int, moment: int) -> None:
    """Write a moment into each message of a block.

    Args:
        block: messages of one length.
        first: where the stamp stands in the first of them.
        size: their length.
        moment: an integer of 64 bits.
    """
    count = (len(block) - first + size - 1) // size
    for at, octet in enumerate(_STAMP.pack(moment), start=first):
        block[at::size] = bytes([octet]) * count
