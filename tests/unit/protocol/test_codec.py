"""What the golden frames are too small to show: sizes, limits, hostile bodies, the header peek."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from tokenmq.protocol import limits
from tokenmq.protocol.codec import CHUNKS_PREFIX, HEADER_BYTES, PREFIX, decode, encode, header, peek, with_route
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import (
    NO_ID,
    Chunk,
    Chunks,
    Command,
    Envelope,
    Goodbye,
    Load,
    Query,
    Ready,
    Reply,
    Request,
)

ID = bytes(range(16))
ROUTE = bytes(range(0xA0, 0xB0))


def refusal(frames: list[bytes]) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(frames)
    assert len(caught.value.message) < 300
    return caught.value.message


def test_header_layout() -> None:
    frame = header(Command.CHUNKS, ID)
    assert len(frame) == HEADER_BYTES == 24
    assert frame == b"TMQ\x01\x13\x00\x00\x00" + ID
    assert frame.startswith(CHUNKS_PREFIX)
    assert header(Command.GOODBYE)[8:] == NO_ID


@pytest.mark.parametrize("command", Command)
def test_peek_returns_command_and_id(command: Command) -> None:
    assert peek(PREFIX[command] + ID) == (command, ID)


def test_a_reply_of_none_survives() -> None:
    assert decode(encode(Reply(ID, None))) == Reply(ID, None)


def test_records_inside_a_reply_become_maps() -> None:
    message = decode(encode(Reply(ID, (Load(running=3), {"a": (1,)}))))
    assert isinstance(message, Reply)
    assert message.result[0] == {"running": 3}  # what has its default is left out
    assert message.result[1] == {"a": [1]}


@pytest.mark.parametrize("value", [object(), 2**64, -(2**63) - 1, "\ud800", {"a": {1, 2}}])
def test_what_cannot_be_packed_is_refused_by_the_sender(value: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be packed"):
        encode(Reply(ID, value))


def test_the_sender_refuses_endless_nesting() -> None:
    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    with pytest.raises(ProtocolError, match="cannot be packed"):
        encode(Reply(ID, deep))


def test_a_deep_value_in_a_scalar_field_is_described_not_shown() -> None:
    # repr() of a thousand nested lists is a RecursionError.
    body = b"\x81\xa4sent" + b"\x91" * 1000 + b"\xc0"
    assert refusal([header(Command.HEARTBEAT) + body]).endswith("got a list of 1")


def test_errors_do_not_repeat_megabytes() -> None:
    body = msgpack.packb({"method": "secret " * 1_000_000})
    message = refusal([header(Command.QUERY, ID) + body])
    assert message.startswith("QUERY.method: expected a string of 1 to 256 characters, got 'secret ")
    assert message.count("secret") < 13
    assert message.endswith("(7000000 characters)")


@pytest.mark.parametrize("element", [b"\x80", b"\x90", b"\x81\xa1a\xc0"])
def test_empty_containers_do_not_fill_memory(element: bytes) -> None:
    part = b"\xdd" + struct.pack(">I", 1_000_000) + element * 1_000_000
    body = b"\x82\xa4sent\x01\xa1x\x92" + part + part if len(element) == 1 else b"\x82\xa4sent\x01\xa1x" + part
    tracemalloc.start()
    try:
        assert f"more than {limits.MAX_CONTAINERS} arrays and maps" in refusal([header(Command.HEARTBEAT) + body])
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()


def test_declared_lengths_alone_take_no_memory() -> None:
    nested = (b"\xdd" + struct.pack(">I", limits.MAX_ARRAY_ITEMS)) * 1000
    tracemalloc.start()
    try:
        refusal([header(Command.HEARTBEAT) + nested])
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_the_largest_honest_chunks_pass() -> None:
    chunk = Chunk(ID, 1, 0, 0, (1,), "a")
    message = Chunks(ID, (chunk,) * limits.MAX_CHUNKS)
    assert decode(encode(message)) == message
    assert "a list of 1 to 65536 elements" in refusal(encode(Chunks(ID, (chunk,) * (limits.MAX_CHUNKS + 1))))


def test_the_second_bad_chunk_is_named() -> None:
    body = msgpack.packb([[ID, 1, 0, 0, [1], "a"], [ID, 1, 0, 0, [1], 7]])
    expected = f"chunks[1].text: expected a string of 0 to {limits.MAX_BODY_BYTES} characters, got 7"
    assert refusal([header(Command.CHUNKS, ID) + body]) == expected


@pytest.mark.parametrize("item", [None, 1, "abcdef", {}, [], [ID] * 5])
def test_a_chunk_is_a_list_of_six(item: Any) -> None:
    assert "chunks[0]: expected a list of 6" in refusal([header(Command.CHUNKS, ID) + msgpack.packb([item])])


def test_body_size_is_bounded() -> None:
    body = bytes(limits.MAX_BODY_BYTES + 1)
    assert refusal([header(Command.REPLY, ID) + body]) == "REPLY: 8388609 bytes, at most 8388608 are allowed"
    assert "envelope: 8388609 bytes" in refusal([header(Command.REQUEST, ID) + body, b""])


def test_request_sizes_are_bounded() -> None:
    payload = bytes(limits.MAX_PAYLOAD_BYTES + 1)
    assert "a payload of 16777217 bytes" in refusal(encode(Request(ID, Envelope("m", 1, 1), payload)))
    image = bytes(limits.MAX_FRAME_BYTES)
    at_most = Request(ID, Envelope("m", 1, 1), b"", (image, image))
    assert decode(encode(at_most)) == at_most  # the first frame, to which brokers add something, does not count
    assert "at most 67108864 are allowed" in refusal(encode(replace(at_most, payload=b"x")))


def test_as_many_attachments_as_allowed_pass() -> None:
    message = Request(ID, Envelope("m", 1, 1), b"", (b"x",) * limits.MAX_ATTACHMENTS)
    assert decode(encode(message)) == message


def test_ready_names_the_model_that_is_wrong() -> None:
    body = msgpack.unpackb(encode(Ready("w", 1, "", (), 1, "", Load(), 1.0))[0][HEADER_BYTES:])
    body["models"] = [{"name": "a"}, {"name": "b", "context_tokens": "long"}]
    message = refusal([header(Command.READY) + msgpack.packb(body)])
    assert message.startswith("READY.models[1].context_tokens: expected an integer from 0")


def test_a_duplicate_key_deep_inside_is_refused() -> None:
    body = b"\x82\xa6method\xa1m\xa9arguments\x81\xa1a\x91\x82\xa1k\x01\xa1k\x02"
    assert "a map has a key twice" in refusal([header(Command.QUERY, ID) + body])


def test_arguments_may_nest_as_deep_as_the_limit() -> None:
    deep: Any = None
    for _ in range(limits.MAX_DEPTH - 2):
        deep = [deep]
    message = Query(ID, "m", {"a": deep})
    assert decode(encode(message)) == message
    assert "nested deeper than 32 levels" in refusal(encode(Query(ID, "m", {"a": [deep]})))


def test_messages_without_fields_have_an_empty_map_for_body() -> None:
    assert encode(Goodbye()) == [header(Command.GOODBYE) + b"\x80"]


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope("m", 1, 256),
        Envelope(
            "海", 2, 0, prior_tokens=3, expected_tokens=64, priority=9, affinity="b5d4", hedge=True, explain=True
        ),
    ],
)
def test_a_route_is_added_to_what_a_client_sent(envelope: Envelope) -> None:
    first, payload, image = encode(Request(ID, envelope, b"\x80", (b"image",)))
    routed = with_route(first, ROUTE)
    assert routed is not None
    assert decode([routed, payload, image]) == Request(ID, replace(envelope, route=ROUTE), b"\x80", (b"image",))


@pytest.mark.parametrize(
    "changed",
    [{"deadline_s": 1.0}, {"queue_s": 0.0}, {"avoid": ("w1",)}, {"route": ID}, {"key": ID}],
)
def test_what_needs_more_than_a_route_is_packed_anew(changed: dict[str, Any]) -> None:
    assert with_route(encode(Request(ID, Envelope("m", 1, 256, **changed), b""))[0], ROUTE) is None


@pytest.mark.parametrize("length", [b"\xa5", b"\xd9\x05", b"\xda\x00\x05", b"\xdb\x00\x00\x00\x05"])
@pytest.mark.parametrize("value", [b"\xc0", b"\xc4\x10" + ROUTE])
def test_a_route_that_a_client_smuggles_in_is_packed_anew(length: bytes, value: bytes) -> None:
    envelope = b"\x84\xa5model\xa1m\xa7attempt\x01\xa6credit\x0a" + length + b"route" + value
    frames = [header(Command.REQUEST, ID) + envelope, b""]
    assert isinstance(decode(frames), Request)
    assert with_route(frames[0], ROUTE) is None


def test_an_envelope_that_would_become_too_long_is_packed_anew() -> None:
    padding = limits.MAX_BODY_BYTES - len(msgpack.packb({"model": "m", "attempt": 1, "credit": 1, "new": b""})) - 4
    for less, fits in ((0, False), (24, True)):
        body = {"model": "m", "attempt": 1, "credit": 1, "new": bytes(padding - less)}
        frames = [header(Command.REQUEST, ID) + msgpack.packb(body), b""]
        assert isinstance(decode(frames), Request)
        assert (with_route(frames[0], ROUTE) is not None) == fits


def test_a_finish_without_a_worker_is_refused() -> None:
    body = {"attempt": 1, "reason": "stop", "usage": {}, "timings": {}}
    assert refusal([header(Command.FINISH, ID) + msgpack.packb(body)]) == "FINISH: missing worker"


def test_a_map_that_is_written_otherwise_is_packed_anew() -> None:
    many = {"model": "m", "attempt": 1, "credit": 1, **{f"new{number}": 0 for number in range(12)}}
    frames = [header(Command.REQUEST, ID) + msgpack.packb(many), b""]
    assert isinstance(decode(frames), Request)
    assert with_route(frames[0], ROUTE) is None
