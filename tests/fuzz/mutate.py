"""Seeded mutations: of bytes, and of the msgpack in them. The same Random gives the same bytes on every Python."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgpack

#: Frames that grow beyond this are cut: what is larger has cases of its own (`bomb`).
_MOST_BYTES = 65_536


class Raw(bytes):
    """Bytes that stand in the place of a msgpack value, whatever they are."""


class Pairs(list[Any]):
    """A map as its pairs, in order: so it may have a key twice."""


def mutated(random: Random, frames: Sequence[bytes], others: Sequence[Sequence[bytes]], header: int) -> list[bytes]:
    """Return frames like these, and yet not.

    Args:
        random: decides.
        frames: a message, or a payload alone.
        others: what parts are taken from.
        header: bytes in front of the msgpack of the first frame.
    """
    found = list(frames)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        kind = random.random()
        if not found or kind < 0.05:
            _shuffle(random, found, others)
            continue
        at = random.choice((0, 0, 0, random.randrange(len(found))))
        frame = found[at]
        if kind < 0.55 and at == 0 and len(frame) > header:
            found[at] = frame[:header] + _rewritten(random, frame[header:], others, header)
        elif kind < 0.95:
            other = random.choice(others) if others else ()
            found[at] = _bent(random, frame, random.choice(other) if other else b"")
        else:
            found[at] = frame[:header] + bomb(random)
    return found


# Frames.


def _shuffle(random: Random, frames: list[bytes], others: Sequence[Sequence[bytes]]) -> None:
    """Add frames, drop, repeat or swap them."""
    kind = random.randrange(5)
    if kind == 0 and frames:
        del frames[random.randrange(len(frames))]
    elif kind == 1 and frames:
        frames.insert(random.randrange(len(frames) + 1), random.choice(frames))
    elif kind == 2 and others:
        frames.extend(random.choice(others))
    elif kind == 3:
        frames.extend([b""] * random.choice((1, 2, 64, 65, 300)))
    else:
        random.shuffle(frames)


# Bytes.


def _flip(random: Random, data: bytearray) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _overwrite(random: Random, data: bytearray) -> None:
    data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _marker(random: Random, data: bytearray) -> None:
    data[random.randrange(len(data))] = random.randrange(0xC0, 0xE0)


def _lie(random: Random, data: bytearray) -> None:
    form = random.choice((">B", ">H", ">I", ">Q"))
    value = random.choice((0, 1, len(data), len(data) + 1, 2**16 - 1, 2**31, 2**32 - 1, 2**63))
    written = struct.pack(form, value % (1 << 8 * struct.calcsize(form)))
    at = random.randrange(len(data))
    data[at : at + len(written)] = written


def _delete(random: Random, data: bytearray) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.choice((1, 1, 2, 8, 64))]


def _insert(random: Random, data: bytearray) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.randbytes(random.choice((1, 1, 2, 8, 64)))


def _repeat(random: Random, data: bytearray) -> None:
    at = random.randrange(len(data))
    piece = data[at : at + random.choice((1, 2, 5, 16))]
    data[at:at] = piece * random.choice((1, 2, 30, 400))


_BENDS: tuple[Callable[[Random, bytearray], None], ...] = (
    _flip, _flip, _overwrite, _marker, _lie, _delete, _insert, _repeat,
)  # fmt: skip


def _bent(random: Random, frame: bytes, other: bytes) -> bytes:
    """Return a frame with some bytes changed, cut, or joined with another one's."""
    data = bytearray(frame)
    kind = random.random()
    if kind < 0.1:
        del data[random.randrange(len(data) + 1) :]
    elif kind < 0.25 and other:
        data[random.randrange(len(data) + 1) :] = other[random.randrange(len(other)) :]
    else:
        for _ in range(random.choice((1, 1, 2, 5))):
            if not data:
                break
            random.choice(_BENDS)(random, data)
    return bytes(data[:_MOST_BYTES])


# msgpack.


def _rewritten(random: Random, body: bytes, others: Sequence[Sequence[bytes]], header: int) -> bytes:
    """Return a body whose values were changed, in all the ways in which they can be written."""
    tree = _tree(body)
    if tree is None:
        return _bent(random, body, b"")
    donor = None
    if others and random.random() < 0.3:
        other = random.choice(others)
        donor = _tree(other[0][header:]) if other else None
    for _ in range(random.choice((1, 1, 2, 3))):
        tree = _changed(random, tree, donor)
    return written(random, tree)[:_MOST_BYTES]


def _tree(body: bytes) -> Any:
    """Return what msgpack makes of a body; None where it makes nothing of it, or what is too deep to walk."""
    try:
        tree = msgpack.unpackb(body, object_pairs_hook=Pairs, strict_map_key=False)
    except Exception:
        return None  # then its bytes are changed
    level, depth = [tree], 0
    while level:
        level = [inner for each in level if isinstance(each, (list, tuple)) for inner in each]
        depth += 1
    return tree if depth < 100 else None


def _changed(random: Random, tree: Any, donor: Any) -> Any:
    """Return the tree with one of its nodes changed; any node may be it."""
    if isinstance(tree, list) and tree and random.random() < 0.8:
        at = random.randrange(len(tree))
        if isinstance(tree, Pairs):
            pairs = Pairs(tree)
            key, inner = pairs[at]
            kind = random.random()
            if kind < 0.1:
                pairs.append((key, wild(random)))  # twice
            elif kind < 0.2:
                pairs[at] = (wild(random), inner)
            elif kind < 0.3:
                del pairs[at]
            elif kind < 0.35:
                pairs.append(("unknown", wild(random)))
            else:
                pairs[at] = (key, _changed(random, inner, donor))
            return pairs
        found = list(tree)
        kind = random.random()
        if kind < 0.1:
            del found[at]
        elif kind < 0.25:
            found[at:at] = [found[at]] * random.choice((1, 2, 20, 300))
        else:
            found[at] = _changed(random, found[at], donor)
        return found
    if donor is not None and random.random() < 0.3:
        return donor
    if isinstance(tree, bool) or tree is None:
        return wild(random)
    if isinstance(tree, (int, float)) and random.random() < 0.6:
        return _number(random, tree)
    if isinstance(tree, (str, bytes)) and random.random() < 0.5:
        return tree * random.choice((0, 2, 16, 257, 4097)) if len(tree) < 1000 else tree[:0]
    return wild(random)


def _number(random: Random, value: float) -> Any:
    near = (value + 1, value - 1, -value, value * 2)
    far = (
        0, -1, 1, 0.0, -0.0, 0.5, math.nan, math.inf, -math.inf, 5e-324, 1.8e308, 1e9, 1e9 + 1, 2**31 - 1, 2**31,
        2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 255, 256, 65_535, 65_536, 2_097_152, 2_097_153,
    )  # fmt: skip
    return random.choice((*near, *far))


_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**64 - 1, -(2**63), math.nan, math.inf, -0.0, "", b"", [], Pairs(), "x" * 257, "\0",
    "\U0010ffff" * 3, "\n\x1b[2J", b"\0" * 16, b"\xff" * 16, [[]], Pairs([("", None)]), Pairs([(1, 2)]),
    Pairs([("a", 1), ("a", 2)]),
    # Surrogates, overlong and cut UTF-8.
    Raw(b"\xa3\xed\xa0\x80"), Raw(b"\xa2\xc0\x80"), Raw(b"\xa1\xff"), Raw(b"\xa1\xc3"),
    # Extension types: none, one that is empty, timestamps of all three sizes, one that is longer than it says.
    Raw(b"\xc1"), Raw(b"\xc7\x00\x05"), Raw(b"\xd6\xff" + bytes(4)), Raw(b"\xd7\xff" + b"\xff" * 8),
    Raw(b"\xc7\x0c\xff" + b"\xff" * 12), Raw(b"\xc9\xff\xff\xff\xff\x01"), Raw(b"\xd4\x01\x00"),
    # Lengths that are not there.
    Raw(b"\xdd\xff\xff\xff\xff"), Raw(b"\xdf\xff\xff\xff\xff"), Raw(b"\xdb\xff\xff\xff\xff"),
    Raw(b"\xc6\x7f\xff\xff\xff"), Raw(b"\xdc\xff\xff"), Raw(b"\xde\xff\xff"), Raw(b"\xd9\xff"), Raw(b"\x9f"),
)  # fmt: skip


def wild(random: Random) -> Any:
    """Return a value of any type: extreme, mistyped, or none at all."""
    kind = random.random()
    if kind < 0.7:
        return random.choice(_STRANGE)
    if kind < 0.8:
        return Raw(bomb(random, 40))
    if kind < 0.9:
        return random.randbytes(random.choice((1, 15, 16, 17, 40)))
    return [random.choice(_STRANGE) for _ in range(random.randrange(1, 6))]


def bomb(random: Random, most: int = 2000) -> bytes:
    """Return bytes that would take much memory, or a deep stack, if they were believed."""
    depth = random.choice((33, 34, 100, 511, 512, 1023, 1024, 1025, most))
    depth = min(depth, most)
    kind = random.randrange(6)
    if kind == 0:
        return random.choice((b"\x91", b"\x81\xa1a", b"\x92\xc0", b"\xdc\x00\x01")) * depth + b"\xc0"
    if kind == 1:
        declared = random.choice((depth, 5 * depth, 65_535, 2**20, 2**32 - 1))
        return (b"\xdd" + struct.pack(">I", declared)) * depth
    if kind == 2:
        declared = random.choice((depth, 65_535, 2**32 - 1))
        return (b"\xdf" + struct.pack(">I", declared) + b"\xa1a") * depth
    if kind == 3:
        return b"\xdd" + struct.pack(">I", 8 * depth) + b"\x90" * 8 * depth
    if kind == 4:
        return b"\xdd" + struct.pack(">I", 8 * depth) + b"\x81\xa0\xc0" * 8 * depth
    return b"\xdd" + struct.pack(">I", 8 * depth) + b"\xa2\xc4\x80" * 8 * depth


def written(random: Random, tree: Any) -> bytes:
    """Return a tree as msgpack: each value in one of its forms, and now and then with a false length."""
    if isinstance(tree, Raw):
        return bytes(tree)
    if isinstance(tree, Pairs):
        inner = b"".join(written(random, key) + written(random, value) for key, value in tree)
        return _length(random, len(tree), 0x80, 16, (None, 0xDE, 0xDF)) + inner
    if isinstance(tree, (list, tuple)):
        inner = b"".join(written(random, value) for value in tree)
        return _length(random, len(tree), 0x90, 16, (None, 0xDC, 0xDD)) + inner
    if isinstance(tree, str):
        data = tree.encode("utf-8", "surrogatepass")
        return _length(random, len(data), 0xA0, 32, (0xD9, 0xDA, 0xDB)) + data
    if isinstance(tree, bytes):
        return _length(random, len(tree), 0, 0, (0xC4, 0xC5, 0xC6)) + tree
    if type(tree) is int and tree >= 0 and random.random() < 0.2:
        return _long_integer(random, tree)
    try:
        packed: bytes = msgpack.packb(tree, use_single_float=random.random() < 0.05)
    except Exception:
        return b"\xcf" + b"\xff" * 8  # an integer of more than 64 bits, or a float that is too large for 32
    return packed


def _length(random: Random, length: int, fixed: int, below: int, codes: tuple[int | None, int, int]) -> bytes:
    """Return what stands in front of so many elements or bytes; often longer than it need be, seldom a lie."""
    if random.random() < 0.01:
        length = random.choice((0, length + 1, max(0, length - 1), 255, 65_535, 2**32 - 1))
    if length < below and random.random() < 0.85:
        return bytes([fixed | length])
    forms = [(code, form) for code, form in zip(codes, (">B", ">H", ">I"), strict=True) if code is not None]
    fitting = [each for each in forms if length < 1 << 8 * struct.calcsize(each[1])]
    code, form = fitting[0] if random.random() < 0.8 else random.choice(fitting)
    return bytes([code]) + struct.pack(form, length)


def _long_integer(random: Random, value: int) -> bytes:
    forms = [(0xCC, ">B"), (0xCD, ">H"), (0xCE, ">I"), (0xCF, ">Q"), (0xD2, ">i"), (0xD3, ">q")]
    bits = {">B": 8, ">H": 16, ">I": 32, ">Q": 64, ">i": 31, ">q": 63}
    fitting = [each for each in forms if value < 1 << bits[each[1]]]
    if not fitting:
        return b"\xcf" + b"\xff" * 8
    code, form = random.choice(fitting)
    return bytes([code]) + struct.pack(form, value)
