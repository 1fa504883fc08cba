"""Messages of one length are told from others without a look at each, however they are cut."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest


@pytest.fixture
def strides(load: Callable[[str], Any]) -> Any:
    return load("strides")


@pytest.fixture
def zmtp(load: Callable[[str], Any]) -> Any:
    return load("zmtp")


def units_of(zmtp: Any) -> Callable[[bytes], tuple[list[bytes], int]]:
    def units(data: bytes) -> tuple[list[bytes], int]:
        found, end = zmtp.scan(data)
        return [data[at:stop] for _, at, _, stop in found], end

    return units


@pytest.mark.parametrize("size", [40, 400])
def test_all_that_comes_is_told_apart_wherever_it_is_cut(strides: Any, zmtp: Any, size: int) -> None:
    chunks = zmtp.frame(b"TMQ\x01\x13" + b"c" * size)
    # Of another length, and of the same length but of another command.
    others = [zmtp.frame(b"TMQ\x01\x30" + b"h" * 20), zmtp.frame(b"TMQ\x01\x17" + b"s" * size)]
    for seed in range(30):
        random = Random(seed)
        sent = [others[random.randrange(2)] if random.random() < 0.1 else chunks for _ in range(60)]
        taken: list[bytes] = []
        reader = strides.Strides(chunks, units_of(zmtp), taken.append)
        data, rest, count = b"".join(sent), b"", 0
        while data:
            cut = random.randrange(1, 5 * len(chunks))
            whole, rest = reader.split(rest + data[:cut])
            data = data[cut:]
            assert whole == chunks * (len(whole) // len(chunks))
            count += len(whole) // reader.size
        # What comes last may be too short to be looked at before something follows it.
        whole, rest = reader.split(rest + chunks)
        count += len(whole) // reader.size - 1
        assert rest == b""
        assert count == sent.count(chunks)
        assert taken == [message for message in sent if message != chunks]


def test_stamps_are_read_where_they_were_written(strides: Any, zmtp: Any) -> None:
    message = zmtp.frame(b"TMQ\x01\x13" + strides.STAMP.encode() + b"behind")
    block = bytearray(message * 5)
    first = message.index(strides.STAMP.encode())
    strides.stamp(block, first, len(message), 2**40 + 7)
    reader = strides.Strides(message, units_of(zmtp), lambda _unit: None)
    whole, rest = reader.split(bytes(block))
    assert reader.moments(whole) == [2**40 + 7] * 5
    assert rest == b""
    # Nothing else was written over.
    assert bytes(block).replace((2**40 + 7).to_bytes(8, "big"), strides.STAMP.encode()) == message * 5
