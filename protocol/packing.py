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
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"cannot be packed: {error}") from error


def unpack(data: bytes, what: str, limit: int = limits.MAX_BODY_BYTES) -> Any:
    """Unpack one msgpack value that fills `data`.

    Args:
        data: the bytes.
        what: named in errors.
        limit: most bytes allowed.

    Raises:
        ProtocolError: the bytes are too many, cut short, not msgpack, followed by others, too deeply nested, or
            use extension types.
    """
    if len(data) > limit:
        raise ProtocolError(f"{what}: {len(data)} bytes, at most {limit} are allowed")
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=limits.MAX_ARRAY_ITEMS,
            max_map_len=limits.MAX_MAP_ITEMS,
            max_ext_len=0,
        )
    except RecursionError as error:
        raise ProtocolError(f"{what}: nested too deeply") from error
    # Everything else that msgpack raises on bad bytes: its own exceptions are ValueErrors but for StackError's base.
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"{what}: not valid msgpack: {error or type(error).__name__}") from error
