"""Limits: what makes no sense is refused, and each is an option with its default."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from tokenmq.broker.limits import DEFAULTS, OPTIONS, UNLIMITED, Limits
from tokenmq.protocol.limits import MAX_ATTACHMENTS, MAX_MESSAGE_BYTES

NAMES = [field.name for field in fields(Limits)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 2.0**60])
def test_no_limit_is_nonsense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be from"):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_no_limit_is_wider_than_the_wire() -> None:
    with pytest.raises(ValueError, match=f"message_bytes must be from 1 to {MAX_MESSAGE_BYTES}, got 0"):
        Limits(message_bytes=0)
    with pytest.raises(ValueError, match=f"message_bytes must be from 1 to {MAX_MESSAGE_BYTES}, got"):
        Limits(message_bytes=MAX_MESSAGE_BYTES + 1)
    with pytest.raises(ValueError, match=f"attachments must be from 0 to {MAX_ATTACHMENTS}, got"):
        Limits(attachments=MAX_ATTACHMENTS + 1)


def test_zero_is_no_limit() -> None:
    assert all(getattr(UNLIMITED, name) == 0 for name in NAMES if name not in ("message_bytes", "attachments"))


def test_every_limit_is_an_option() -> None:
    assert [option.field for option in OPTIONS] == NAMES
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for option in OPTIONS:
        assert option.name.startswith("--")
        assert option.help.endswith(".")
        assert option.default == getattr(DEFAULTS, option.field)
        assert type(option.default) is (float if option.metavar == "S" else int)
        for edge in (option.least, option.most):
            if edge is not None:
                Limits(**{option.field: edge})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if option.least == 0], ids=lambda option: option.name
)
def test_help_says_what_0_means(option: object) -> None:
    assert "0: " in option.help or "0 allows none" in option.help  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("connections", "descriptors", "expected"),
    [
        (16_384, 1_048_576, 16_384),
        (16_384, 1_024, 448),
        (100, 1_024, 100),
        (0, 1_024, 448),  # no limit but that of the system
        (16_384, 64, 1),
    ],
)
def test_connections_need_descriptors(connections: int, descriptors: int, expected: int) -> None:
    limits = Limits(connections=connections, handshakes=7).within(descriptors)
    assert limits == Limits(connections=expected, handshakes=7)


def test_too_large() -> None:
    limits = Limits(message_bytes=100, attachments=2)
    assert limits.too_large(100, 2) == ""
    assert limits.too_large(101, 2) == "the request has 101 bytes; this broker takes at most 100"
    assert limits.too_large(100, 3) == "the request has 3 attachments; this broker takes at most 2"
