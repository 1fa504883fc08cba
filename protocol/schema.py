"""Checks of values that come from the wire: each returns the value in its own type or raises ProtocolError.

A check is called with the path of the field (`load.state`), so that every error names what was wrong and where.
`record` makes the check of a dataclass from the checks of its fields; `dump` is its opposite.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar

from . import limits
from .errors import ProtocolError

Check: TypeAlias = Callable[[Any, str], Any]
EnumT = TypeVar("EnumT", bound=Enum)


#: Characters of a stranger's value that an error repeats.
_SHOWN_CHARS = 80


def fail(path: str, expected: str, value: Any) -> ProtocolError:
    """Return the error for a value that is not what was expected there."""
    return ProtocolError(f"{path}: expected {expected}, got {show(value)}")


def show(value: Any) -> str:
    """Describe a value in a few words, whatever it is: the `repr` of a stranger's data may take seconds or fail."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() <= 64 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, str):
        shown = repr(value[:_SHOWN_CHARS])
        if len(value) <= _SHOWN_CHARS and len(shown) <= _SHOWN_CHARS:
            return shown
        return f"{shown[: _SHOWN_CHARS - 3]}... ({len(value)} characters)"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"a map of {len(value)}"
    return f"a {type(value).__name__[:64]}"


def text(limit: int = limits.MAX_NAME_CHARS, *, empty: bool = True) -> Check:
    """Make a check for a string of at most `limit` characters."""
    expected = f"a string of {0 if empty else 1} to {limit} characters"

    def check(value: Any, path: str) -> str:
        if not isinstance(value, str) or len(value) > limit or not (empty or value):
            raise fail(path, expected, value)
        return value

    return check


def count(low: int = 0, high: int = limits.MAX_COUNT) -> Check:
    """Make a check for an integer from `low` to `high`, both included."""
    expected = f"an integer from {low} to {high}"

    def check(value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise fail(path, expected, value)
        return value

    return check


def number(low: float, high: float) -> Check:
    """Make a check for a finite number from `low` to `high`, both included; integers become floats."""
    expected = f"a number from {low:g} to {high:g}"
    # What is within finite bounds is finite, and NaN is within none.
    low, high = max(low, -sys.float_info.max), min(high, sys.float_info.max)

    def check(value: Any, path: str) -> float:
        if type(value) is float and low <= value <= high:
            return value
        if type(value) is not int or not low <= value <= high:
            raise fail(path, expected, value)
        return float(value)

    return check


#: A duration in seconds, not negative.
seconds = number(0.0, limits.MAX_SECONDS)


def boolean(value: Any, path: str) -> bool:
    """Check a boolean."""
    if type(value) is not bool:
        raise fail(path, "true or false", value)
    return value


def binary(size: int) -> Check:
    """Make a check for a byte string of exactly `size` bytes."""

    def check(value: Any, path: str) -> bytes:
        if type(value) is not bytes or len(value) != size:
            raise fail(path, f"{size} bytes", value)
        return value

    return check


def octets(limit: int, unit: int = 1) -> Check:
    """Make a check for a byte string of at most `limit` bytes, a multiple of `unit`."""
    expected = f"at most {limit} bytes" + (f", a multiple of {unit}" if unit > 1 else "")

    def check(value: Any, path: str) -> bytes:
        if type(value) is not bytes or len(value) > limit or len(value) % unit:
            raise fail(path, expected, value)
        return value

    return check


def choice(kind: type[EnumT]) -> Check:
    """Make a check for a member of an enumeration of strings."""
    members = {member.value: member for member in kind}
    expected = "one of " + ", ".join(members)

    def check(value: Any, path: str) -> EnumT:
        member = members.get(value) if isinstance(value, str) else None
        if member is None:
            raise fail(path, expected, value)
        return member

    return check


def optional(inner: Check) -> Check:
    """Make a check that lets None pass and hands everything else to `inner`."""

    def check(value: Any, path: str) -> Any:
        return None if value is None else inner(value, path)

    return check


def listing(inner: Check, limit: int, *, least: int = 0) -> Check:
    """Make a check for an array of `least` to `limit` elements, each checked by `inner`; gives a tuple."""

    def check(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= limit:
            raise fail(path, f"a list of {least} to {limit} elements", value)
        return tuple(inner(item, f"{path}[{position}]") for position, item in enumerate(value))

    return check


def integers(low: int, high: int, limit: int, *, least: int = 0) -> Check:
    """Make a check for an array of integers from `low` to `high`; gives a tuple. Token ids come by the thousand."""
    expected = f"a list of {least} to {limit} integers from {low} to {high}"

    def check(value: Any, path: str) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= limit:
            raise fail(path, expected, value)
        for position, item in enumerate(value):
            if type(item) is not int or not low <= item <= high:
                raise fail(f"{path}[{position}]", f"an integer from {low} to {high}", item)
        return tuple(value)

    return check


def plain(value: Any, path: str) -> Any:
    """Check free-form data: null, booleans, numbers, strings, bytes, arrays, maps with string keys, bounded depth."""
    pending = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if depth > limits.MAX_DEPTH:
            raise ProtocolError(f"{path}: nested deeper than {limits.MAX_DEPTH} levels")
        if isinstance(item, Mapping):
            if not all(isinstance(key, str) for key in item):
                raise ProtocolError(f"{path}: a map has a key that is not a string")
            pending.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend((inner, depth + 1) for inner in item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise fail(path, "finite numbers only", item)
        elif type(item) is int and not limits.MIN_INTEGER <= item <= limits.MAX_INTEGER:
            raise fail(path, "integers of 64 bits at most", item)
        elif item is not None and type(item) not in (bool, int, float, str, bytes):
            raise fail(path, "plain data", item)
    return value


def mapping(value: Any, path: str) -> dict[str, Any]:
    """Check a free-form map with string keys."""
    if not isinstance(value, Mapping):
        raise fail(path, "a map", value)
    plain(value, path)
    return dict(value)


def entries(kind: type[Any], checks: Mapping[str, Check], *, strict: bool = False) -> Check:
    """Make a check that takes the fields of the dataclass `kind` out of a map; gives them as a dict.

    Args:
        kind: the dataclass; fields with a default may be missing from the map.
        checks: one check for each field of `kind` that the map carries.
        strict: refuse keys that name no field. The wire ignores them, so that newer peers can add fields; what a
            user asks for must not be ignored in silence.
    """
    missing = dataclasses.MISSING
    required = {
        item.name
        for item in dataclasses.fields(kind)
        if item.name in checks and item.default is missing and item.default_factory is missing
    }

    def check(value: Any, path: str) -> dict[str, Any]:
        if type(value) is not dict and not isinstance(value, Mapping):
            raise fail(path, "a map", value)
        if not required <= value.keys():
            raise ProtocolError(f"{path}: missing {', '.join(sorted(required - value.keys()))}")
        if strict:
            unknown = [key for key in value if key not in checks]
            if unknown:
                found = ", ".join(sorted(show(key) for key in unknown[:3]))
                more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
                raise ProtocolError(f"{path}: unknown {found}{more}; known are {', '.join(sorted(checks))}")
        # Every request comes through here: the whole path is put together where it is told, and not for each field.
        taken: dict[str, Any] = {}
        try:
            for name, item in value.items():
                inner = checks.get(name)
                if inner is not None:
                    taken[name] = inner(item, name)
        except ProtocolError as error:
            raise ProtocolError(f"{path}.{error.message}") from None
        return taken

    return check


def record(kind: type[Any], checks: Mapping[str, Check], *, strict: bool = False) -> Check:
    """Make a check that builds the dataclass `kind` from a map; see `entries`."""
    taken = entries(kind, checks, strict=strict)

    def check(value: Any, path: str) -> Any:
        return kind(**taken(value, path))

    return check


#: How to take a record apart: what reads all its fields at once, their names, and what they are by default.
_Parts: TypeAlias = tuple[Callable[[Any], tuple[Any, ...]], tuple[str, ...], tuple[Any, ...]]


@cache
def _parts(kind: Any) -> _Parts | None:
    """Return how to take apart what is of this type; None where that is no dataclass."""
    if not dataclasses.is_dataclass(kind):
        return None
    items = dataclasses.fields(kind)
    names = tuple(item.name for item in items)
    defaults = [
        item.default if item.default_factory is dataclasses.MISSING else item.default_factory() for item in items
    ]
    if not names:
        return (lambda _value: ()), (), ()
    getter = attrgetter(*names)
    return (getter if len(names) > 1 else lambda value: (getter(value),)), names, tuple(defaults)


#: What msgpack takes as it is.
_PLAIN = frozenset({int, str, bytes, float, bool, type(None)})
#: Free-form data stands a few levels deep in the records around it; the receiver's bound counts from there.
_MAX_DUMP_DEPTH = limits.MAX_DEPTH + 8


def dump(value: Any) -> Any:
    """Turn records, enumerations and tuples into plain data.

    Fields of a record that a receiver cannot know are told: those that differ from their defaults.

    Raises:
        ProtocolError: it is nested deeper than any receiver takes.
    """
    return _dump(value, _MAX_DUMP_DEPTH)


def _dump(value: Any, depth: int) -> Any:
    kind: Any = type(value)  # to mypy, not every class is hashable
    if kind in _PLAIN:
        return value
    if depth == 0:
        raise ProtocolError(f"cannot be packed: nested deeper than {limits.MAX_DEPTH} levels")
    parts = _parts(kind)
    if parts is not None:
        getter, names, defaults = parts
        return {
            name: found if type(found) in _PLAIN else _dump(found, depth - 1)
            for name, found, default in zip(names, getter(value), defaults, strict=False)
            if found is not default and found != default
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_dump(item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        return {key: _dump(item, depth - 1) for key, item in value.items()}
    return value
