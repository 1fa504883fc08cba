"""Checks of single values: what passes, and that a refusal is short, names the field and says what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest

from tokenmq.protocol import limits, schema
from tokenmq.protocol.errors import ProtocolError


class Colour(str, Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    y: int = 0
    tags: list[str] = field(default_factory=list)


POINT = {"x": schema.count(), "y": schema.count(), "tags": schema.listing(schema.text(4), 2)}


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def refusal(check: schema.Check, value: Any) -> str:
    with pytest.raises(ProtocolError) as caught:
        check(value, "a.b")
    assert caught.value.message.startswith("a.b")
    assert len(caught.value.message) < 300
    return caught.value.message


@pytest.mark.parametrize(
    ("check", "value", "result"),
    [
        (schema.text(3), "", ""),
        (schema.text(3), "äöü", "äöü"),
        (schema.count(1, 3), 3, 3),
        (schema.number(0, 1), 1, 1.0),
        (schema.number(0, 1), 0.5, 0.5),
        (schema.seconds, 0, 0.0),
        (schema.boolean, False, False),
        (schema.binary(2), b"ab", b"ab"),
        (schema.choice(Colour), "red", Colour.RED),
        (schema.optional(schema.boolean), None, None),
        (schema.optional(schema.boolean), True, True),
        (schema.listing(schema.boolean, 2), [True, False], (True, False)),
        (schema.integers(0, 9, 3), [1, 2], (1, 2)),
        (schema.integers(0, 9, 3), (), ()),
        (schema.plain, [{"a": [1.5, None, True, b"x", "y"]}], [{"a": [1.5, None, True, b"x", "y"]}]),
        (schema.plain, limits.MAX_INTEGER, limits.MAX_INTEGER),
        (schema.plain, limits.MIN_INTEGER, limits.MIN_INTEGER),
        (schema.mapping, {"a": 1}, {"a": 1}),
        (schema.record(Point, POINT), {"x": 1, "other": 2}, Point(1)),
        (schema.record(Point, POINT), {"x": 1, "y": 2, "tags": ["a"]}, Point(1, 2, ("a",))),  # type: ignore[arg-type]
        (schema.entries(Point, POINT), {"x": 1}, {"x": 1}),
    ],
)
def test_good_values(check: schema.Check, value: Any, result: Any) -> None:
    found = check(value, "a.b")
    assert found == result
    assert type(found) is type(result)


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [
        (schema.text(3), "abcd", "a.b: expected a string of 0 to 3 characters, got 'abcd'"),
        (schema.text(3), b"abc", "got 3 bytes"),
        (schema.text(3, empty=False), "", "a string of 1 to 3 characters, got ''"),
        (schema.count(1, 3), 0, "a.b: expected an integer from 1 to 3, got 0"),
        (schema.count(1, 3), True, "got True"),
        (schema.count(1, 3), 2.0, "got 2.0"),
        (schema.count(1, 3), "2", "got '2'"),
        (schema.count(), 2**63, "from 0 to 9223372036854775807, got 9223372036854775808"),
        (schema.number(0, 1), True, "a number from 0 to 1, got True"),
        (schema.number(0, 1), float("nan"), "got nan"),
        (schema.number(0, float("inf")), float("inf"), "got inf"),
        (schema.number(0, 1), 10**400, "got an integer of"),
        (schema.number(0, 1), "1", "got '1'"),
        (schema.seconds, -0.5, "a number from 0 to 1e+09, got -0.5"),
        (schema.boolean, 1, "a.b: expected true or false, got 1"),
        (schema.binary(2), b"a", "a.b: expected 2 bytes, got 1 bytes"),
        (schema.binary(2), "ab", "got 'ab'"),
        (schema.choice(Colour), "green", "a.b: expected one of red, blue, got 'green'"),
        (schema.choice(Colour), ["red"], "got a list of 1"),
        (schema.listing(schema.boolean, 2), [True] * 3, "a list of 0 to 2 elements, got a list of 3"),
        (schema.listing(schema.boolean, 2, least=1), [], "a list of 1 to 2 elements"),
        (schema.listing(schema.boolean, 2), [True, 1], "a.b[1]: expected true or false, got 1"),
        (schema.listing(schema.boolean, 2), "ab", "got 'ab'"),
        (schema.integers(0, 9, 3), [1, 10], "a.b[1]: expected an integer from 0 to 9, got 10"),
        (schema.integers(0, 9, 3), [False], "a.b[0]: expected an integer from 0 to 9, got False"),
        (schema.integers(0, 9, 3), [1] * 4, "a list of 0 to 3 integers from 0 to 9, got a list of 4"),
        (schema.plain, [{"a": float("nan")}], "a.b: expected finite numbers only, got nan"),
        (schema.plain, [2**64], "a.b: expected integers of 64 bits at most, got an integer of 65 bits"),
        (schema.plain, {"a": -(2**63) - 1}, "a.b: expected integers of 64 bits at most"),
        (schema.plain, {1: 2}, "a.b: a map has a key that is not a string"),
        (schema.plain, [object()], "a.b: expected plain data, got a object"),
        (schema.plain, Unprintable(), "a.b: expected plain data, got a Unprintable"),
        (schema.mapping, [], "a.b: expected a map, got a list of 0"),
        (schema.record(Point, POINT), {}, "a.b: missing x"),
        (schema.record(Point, POINT), None, "a.b: expected a map, got None"),
        (schema.record(Point, POINT), {"x": 1, "tags": ["ab", "abcde"]}, "a.b.tags[1]: expected a string of 0 to 4"),
        (schema.record(Point, POINT, strict=True), {"x": 1, "z": 2}, "a.b: unknown 'z'; known are tags, x, y"),
        (schema.record(Point, POINT, strict=True), dict.fromkeys("xabcdef"), "and 3 more; known are"),
    ],
)
def test_bad_values(check: schema.Check, value: Any, expected: str) -> None:
    assert expected in refusal(check, value)


def test_integers_too_long_to_print_are_described() -> None:
    # Python refuses to print more than 4,300 digits.
    assert refusal(schema.count(), 10**5000).endswith("got an integer of 16610 bits")
    assert "unknown an integer of 16610 bits" in refusal(
        schema.record(Point, POINT, strict=True), {"x": 1, 10**5000: 2}
    )


def test_a_cycle_is_too_deep() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert refusal(schema.plain, loop) == "a.b: nested deeper than 32 levels"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("x" * 78, repr("x" * 78)),
        ("x" * 79, "'" + "x" * 76 + "... (79 characters)"),
        ("\n" * 50, "'" + "\\n" * 38 + "... (50 characters)"),
        ({"a": 1}, "a map of 1"),
        ((1, 2), "a list of 2"),
        (None, "None"),
    ],
)
def test_values_are_shown_in_a_few_words(value: Any, shown: str) -> None:
    assert schema.show(value) == shown


@pytest.mark.parametrize("make", [lambda n: "x" * n, lambda n: [0] * n, bytes, lambda n: dict.fromkeys(range(n))])
def test_showing_a_large_value_is_short(make: Callable[[int], Any]) -> None:
    assert len(schema.show(make(1_000_000))) < 120


def test_dump_makes_plain_data() -> None:
    @dataclass
    class Box:
        colour: Colour
        point: Point | None = None
        rest: Any = None

    assert schema.dump(Box(Colour.RED, Point(1))) == {"colour": "red", "point": {"x": 1}}
    assert schema.dump(Point(1, 2)) == {"x": 1, "y": 2}
    assert schema.dump(Box(Colour.BLUE, rest={"a": (Colour.RED, None)})) == {
        "colour": "blue",
        "rest": {"a": ["red", None]},
    }
