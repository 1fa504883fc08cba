"""msgpack in and out, with every limit set; the only module that imports msgpack."""

from __future__ import annotations

from typing import Any

import msgpack

from . import limits
from .errors import ProtocolError


def pack(value: Any) -> bytes:
    """Pack plain data.

    Raises:
        ProtocolError: the data holds something that msgpack cannot carry (an object, an integer over 64 bits,
            text with lone surrogates).
    """
    try:
        return msgpack.packb(value, use_bin_type=True)  # type: ignore[no-any-return]
    except UnicodeEncodeError as error:
        raise ProtocolError("cannot be packed: a text that is not valid Unicode (it has lone surrogates)") from error
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"cannot be packed: {str(error)[:200]}") from error


#: Bytes that bound by themselves all that is bounded in number: an element takes a byte at least, and no container
#: is allocated for more elements than there are bytes.
_SMALL = min(limits.MAX_CONTAINERS, limits.MAX_ARRAY_ITEMS, limits.MAX_MAP_ITEMS)


#: msgpack allocates a container for as many elements as it declares, before any has come: a thousand of them in one
#: another, each declared as long as all bytes together, take 25 MB for 4 KB. What is longer than this is gone through
#: once without building anything, a quarter of the price: then what is declared is there. Below it the worst is 2 MB.
_BELIEVED = 1024


def unpack(data: bytes, what: str, limit: int = limits.MAX_BODY_BYTES) -> Any:
    """Unpack one msgpack value that fills `data`.

    Args:
        data: the bytes.
        what: named in errors.
        limit: most bytes allowed.

    Returns:
        Plain data: maps as dicts with string keys only, arrays as lists.

    Raises:
        ProtocolError: the bytes are too many, cut short, not msgpack, followed by others, too deeply nested, hold
            too many containers, a map with a key twice or a key that is no string, or extension types.
    """
    size = len(data)
    if size > limit:
        raise ProtocolError(f"{what}: {size} bytes, at most {limit} are allowed")
    try:
        if size > _BELIEVED:
            _look_through(data)
        return _unpack_small(data) if size <= _SMALL else _unpack_large(data, limit)
    except (RecursionError, msgpack.StackError) as error:
        raise ProtocolError(f"{what}: nested too deeply") from error
    # FormatError and OutOfData are not always ValueErrors, depending on msgpack's version and implementation.
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"{what}: not valid msgpack: {_reason(error)}") from error


def _unique(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map has a key twice")
    try:
        "".join(found)  # a fifth of the time of looking at their types
    except TypeError:
        raise ValueError("a map has a key that is not a string") from None
    return found


def _look_through(data: bytes) -> None:
    """Raise what msgpack raises where the value is not there whole; of containers nothing is allocated."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(data))
    unpacker.feed(data)
    unpacker.skip()


def _unpack_small(data: bytes) -> Any:
    # Each keyword costs 50 ns, and a small body needs none but these. An ext length of 0 ends timestamps and all
    # extensions but empty ones, which the hook refuses.
    return msgpack.unpackb(data, object_pairs_hook=_unique, ext_hook=_refuse_extension, max_ext_len=0)


def _unpack_large(data: bytes, limit: int) -> Any:
    size = len(data)
    budget = _Budget() if size > limits.MAX_CONTAINERS else None
    return msgpack.unpackb(
        data,
        object_pairs_hook=budget.map if budget else _unique,
        list_hook=budget.array if budget else None,
        ext_hook=_refuse_extension,
        max_str_len=limit,
        max_bin_len=limit,
        max_array_len=min(limits.MAX_ARRAY_ITEMS, size),
        max_map_len=min(limits.MAX_MAP_ITEMS, size),
        max_ext_len=0,
    )


class _Budget:
    """Counts the containers of a body that has bytes enough for too many: for all others it would cost in vain."""

    def __init__(self) -> None:
        self.left = limits.MAX_CONTAINERS

    def array(self, found: list[Any]) -> list[Any]:
        self._take()
        return found

    def map(self, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        self._take()
        return _unique(pairs)

    def _take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {limits.MAX_CONTAINERS} arrays and maps")


def _refuse_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")


def _reason(error: Exception) -> str:
    if isinstance(error, msgpack.FormatError):
        return "a byte that begins no value"
    if isinstance(error, msgpack.ExtraData):
        return "bytes after its end"
    if "strict_map_key" in str(error):
        return "a map has a key that is not a string"
    return str(error)[:200] or type(error).__name__
