"""The golden frames of tests/vectors/: they are the contract, and the code is held to them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from tokenmq.protocol.codec import decode, encode, peek
from tokenmq.protocol.errors import BadRequestError, ProtocolError
from tokenmq.protocol.messages import Command
from tokenmq.protocol.payload import pack_generation, unpack_generation

VECTORS = Path(__file__).parents[2] / "vectors"


def vectors(*files: str) -> list[Any]:
    return [
        pytest.param({"command": file.upper(), **vector}, id=f"{file}: {vector['name']}")
        for file in files
        for vector in json.loads((VECTORS / f"{file}.json").read_text(encoding="utf-8"))
    ]


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return value


def frames(vector: Mapping[str, Any]) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in vector["frames"]]


@pytest.mark.parametrize("vector", vectors(*[command.name.lower() for command in Command]))
def test_a_message_and_its_frames_are_the_same(vector: Mapping[str, Any]) -> None:
    message = decode(frames(vector))
    assert message.command.name == vector["command"]
    assert plain(message) == vector["message"]
    assert [frame.hex() for frame in encode(message)] == vector["frames"]


@pytest.mark.parametrize("vector", vectors("lenient"))
def test_what_newer_and_other_peers_may_send_is_taken(vector: Mapping[str, Any]) -> None:
    message = decode(frames(vector))
    assert message.command.name == vector["command"]
    assert plain(message) == vector["message"]


@pytest.mark.parametrize("vector", vectors("bad"))
def test_bad_frames_are_refused_with_a_reason(vector: Mapping[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(frames(vector))
    assert vector["error"] in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize("vector", vectors("bad"))
def test_only_a_request_or_query_can_be_answered(vector: Mapping[str, Any]) -> None:
    try:
        command, subject = peek(frames(vector)[0])
    except (ProtocolError, IndexError):
        command, subject = Command.HEARTBEAT, b""
    with pytest.raises(ProtocolError) as caught:
        decode(frames(vector))
    assert caught.value.subject == (subject if command in (Command.REQUEST, Command.QUERY) else None)


@pytest.mark.parametrize("vector", vectors("payload"))
def test_a_generation_and_its_payload_are_the_same(vector: Mapping[str, Any]) -> None:
    generation = unpack_generation(bytes.fromhex(vector["payload"]))
    assert plain(generation) == vector["generation"]
    assert pack_generation(generation).hex() == vector["payload"]


@pytest.mark.parametrize("vector", vectors("bad_payload"))
def test_bad_payloads_are_refused_with_a_reason(vector: Mapping[str, Any]) -> None:
    with pytest.raises(BadRequestError) as caught:
        unpack_generation(bytes.fromhex(vector["payload"]))
    assert vector["error"] in caught.value.message
