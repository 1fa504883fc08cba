"""What the hostile peer of benchmarks/flood.py sends is what it is said to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenmq.protocol.codec import decode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.limits import MAX_MESSAGE_BYTES
from tokenmq.protocol.messages import Cancel, Chunks, Credit, Finish, Goodbye, Hello, Message, Query, Ready, Request

KINDS: dict[str, set[type[Message]]] = {
    "shared": {Request},
    "nobody": {Request},
    "controls": {Credit, Cancel},
    "queries": {Query},
    "large": {Request},
    "images": {Request},
    "hellos": {Goodbye, Hello},
    "strays": {Chunks},
    "ends": {Finish},
    "readies": {Ready},
}


@pytest.fixture
def attacks(load: Callable[[str], Any]) -> Any:
    return load("attacks")


@pytest.fixture
def messages(load: Callable[[str], Any]) -> Callable[[bytes], list[list[bytes]]]:
    """Return the frames of each message of a block; all of it must be whole."""
    zmtp = load("zmtp")

    def split(data: bytes) -> list[list[bytes]]:
        found, end = zmtp.scan(data)
        assert end == len(data)
        made: list[list[bytes]] = [[]]
        for flags, _, begin, stop in found:
            made[-1].append(data[begin:stop])
            if not flags & zmtp.MORE:
                made.append([])
        assert made.pop() == []
        return made

    return split


@pytest.mark.parametrize("name", KINDS)
def test_messages_are_good_ones(name: str, attacks: Any, messages: Callable[[bytes], list[list[bytes]]]) -> None:
    block = attacks.ATTACKS[name].block()
    found = messages(bytes(block.data))
    assert len(found) == block.messages
    assert {type(decode(frames)) for frames in found[:100]} == KINDS[name]


@pytest.mark.parametrize("name", ["shared", "nobody", "queries", "ends", "large"])
def test_ids_are_never_the_same(name: str, attacks: Any, messages: Callable[[bytes], list[list[bytes]]]) -> None:
    block = attacks.ATTACKS[name].block()
    ids: list[bytes] = []
    for turn in (1, 2, 300):
        block.renew(turn)
        ids += [frames[0][8:24] for frames in messages(bytes(block.data))]
    assert len(set(ids)) == len(ids) == 3 * block.messages


def test_what_is_malformed_names_its_request(attacks: Any, messages: Callable[[bytes], list[list[bytes]]]) -> None:
    for frames in messages(bytes(attacks.ATTACKS["malformed"].block().data))[:10]:
        with pytest.raises(ProtocolError) as caught:
            decode(frames)
        assert caught.value.subject is not None


def test_images_are_just_within_what_the_wire_allows(
    attacks: Any, messages: Callable[[bytes], list[list[bytes]]]
) -> None:
    (frames,) = messages(bytes(attacks.ATTACKS["images"].block().data))
    request = decode(frames)
    assert isinstance(request, Request)
    size = len(request.payload) + sum(map(len, request.attachments))
    assert 0.9 * MAX_MESSAGE_BYTES < size <= MAX_MESSAGE_BYTES


def test_every_flood_has_a_line_in_the_help_and_a_flooder(load: Callable[[str], Any]) -> None:
    flood, flooder = load("flood"), load("flooder")
    assert set(flood.CASES) == set(flooder.kinds(flooder.Flooder({})))
    assert len(set(flood.CASES)) == len(flood.CASES)
    told = {word.rstrip(",") for line in flood.__doc__.splitlines() for word in line.split("  ")[0].split()}
    assert set(flood.CASES) <= told


def test_the_harm_is_that_of_the_worst_kind(load: Callable[[str], Any]) -> None:
    targets, row = load("targets"), load("rounds").Row
    rows = [
        row(how, kind, number, {"p99_ms": value})
        for kind, harm in (("a", 1.5), ("b", 4.0), ("c", 0.9))
        for number, quiet in ((1, 1.0), (2, 2.0))
        for how, value in (("quiet", quiet), ("neighbour", quiet), ("flooded", harm * quiet))
    ]
    assert targets.flood_harm(rows, "p99_ms").median == 4.0
    assert targets.flood_harm(rows[:6], "p99_ms").median == 1.5
    assert targets.flood_harm([], "p99_ms") is None
