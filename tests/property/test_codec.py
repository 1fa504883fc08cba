"""Round trips of every message, and hostile bytes: `decode` answers with a message or a ProtocolError, never else."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmq.protocol import limits
from tokenmq.protocol.codec import HEADER_BYTES, PREFIX, decode, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import (
    Accepted,
    Attach,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Considered,
    Credit,
    Decision,
    Details,
    Disconnect,
    DisconnectCode,
    Drain,
    Draining,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Message,
    ModelInfo,
    Parked,
    Query,
    Ready,
    Reply,
    Request,
    Started,
    Timings,
    TokenLogprob,
    TokenLogprobs,
    Usage,
    Welcome,
    WorkerState,
)

hostile = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])

characters = st.characters(exclude_categories=["Cs"])
names = st.text(characters, min_size=1, max_size=20)
texts = st.text(characters, max_size=20)
ids = st.binary(min_size=16, max_size=16)
counts = st.integers(0, limits.MAX_COUNT)
attempts = st.integers(1, limits.MAX_COUNT)
credits_ = st.integers(0, limits.MAX_CREDIT_TOKENS)
seconds = st.floats(0, limits.MAX_SECONDS)
intervals = st.floats(0.001, limits.MAX_SECONDS)
token_ids = st.lists(st.integers(0, limits.MAX_TOKEN_ID), max_size=4).map(tuple)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(limits.MIN_INTEGER, limits.MAX_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.binary(max_size=20)
)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
loads = st.builds(
    Load,
    st.sampled_from(WorkerState),
    counts,
    counts,
    counts,
    counts,
    seconds,
    st.floats(0, 1e12),
    st.floats(0, 1),
    st.floats(0, 1e12),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    counts,
    counts,
)
considered = st.builds(Considered, texts, counts, counts, st.floats(0, 1e12), st.floats(0, 1e15))
decisions = st.builds(Decision, names, names, texts, counts, st.lists(considered, max_size=3).map(tuple))
token_texts = (st.integers(0, limits.MAX_TOKEN_ID), texts, st.floats(limits.MIN_LOGPROB, 0))
logprobs = st.builds(
    TokenLogprobs, *token_texts, st.lists(st.builds(TokenLogprob, *token_texts), max_size=3).map(tuple)
)
details = st.builds(
    Details,
    st.lists(logprobs, max_size=3).map(tuple),
    st.lists(st.none() | logprobs, max_size=3).map(tuple),
    st.integers(0, 5).flatmap(lambda size: st.binary(min_size=4 * size, max_size=4 * size)),
).filter(lambda given: given != Details())
chunks = st.builds(
    Chunk,
    ids,
    attempts,
    st.integers(0, limits.MAX_COMPLETIONS - 1),
    counts,
    token_ids,
    texts,
    st.none() | details,
)
messages: dict[Command, st.SearchStrategy[Message]] = {
    Command.HELLO: st.builds(Hello, texts, texts, st.none() | intervals, st.booleans()),
    Command.WELCOME: st.builds(Welcome, names, texts, intervals, intervals, texts),
    Command.READY: st.builds(
        Ready,
        names,
        counts,
        texts,
        st.lists(st.builds(ModelInfo, names, counts, *[st.booleans()] * 5), max_size=3).map(tuple),
        st.integers(1, limits.MAX_SLOTS),
        texts,
        loads,
        st.none() | st.floats(1e-6, 1e6),
        st.none() | intervals,
        st.lists(names, max_size=3).map(tuple),
        texts,
    ),
    Command.ACCEPTED: st.builds(Accepted, names, texts, intervals, intervals),
    Command.REQUEST: st.builds(
        Request,
        ids,
        st.builds(
            Envelope,
            names,
            attempts,
            credits_,
            st.none() | seconds,
            st.none() | ids,
            st.integers(0, limits.MAX_NEW_TOKENS),
            st.lists(names, max_size=3).map(tuple),
            st.none() | seconds,
            st.integers(0, limits.MAX_NEW_TOKENS),
            st.integers(0, limits.MAX_PRIORITY),
            texts,
            st.booleans(),
            st.booleans(),
            st.lists(names, max_size=limits.MAX_HOPS).map(tuple),
            st.none() | ids,
        ),
        st.binary(max_size=50),
        st.lists(st.binary(max_size=50), max_size=3).map(tuple),
    ),
    Command.CREDIT: st.builds(Credit, ids, attempts, credits_),
    Command.CANCEL: st.builds(Cancel, ids, attempts),
    Command.PARKED: st.builds(Parked, ids, attempts),
    Command.STARTED: st.builds(Started, ids, attempts, texts, texts, st.none() | ids),
    Command.ATTACH: st.builds(Attach, ids),
    Command.CHUNKS: st.builds(Chunks, ids, st.lists(chunks, min_size=1, max_size=4).map(tuple)),
    Command.FINISH: st.builds(
        Finish,
        ids,
        attempts,
        st.sampled_from(FinishReason),
        st.builds(Usage, counts, counts),
        st.builds(Timings, seconds, seconds, seconds, seconds, st.lists(decisions, max_size=2).map(tuple)),
        texts,
        counts,
    ),
    Command.ERROR: st.builds(Error, ids, counts, names, texts, st.booleans(), st.none() | seconds, texts),
    Command.QUERY: st.builds(Query, ids, names, st.dictionaries(texts, plain, max_size=4)),
    Command.REPLY: st.builds(Reply, ids, plain),
    Command.HEARTBEAT: st.builds(Heartbeat, counts, st.none() | loads),
    Command.DRAINING: st.builds(Draining),
    Command.GOODBYE: st.builds(Goodbye),
    Command.DRAIN: st.builds(Drain, st.none() | seconds, st.booleans()),
    Command.DISCONNECT: st.builds(Disconnect, st.sampled_from(DisconnectCode), texts),
}
any_message = st.one_of(*messages.values())

VECTORS = Path(__file__).parents[1] / "vectors"
GOLDEN = [
    [bytes.fromhex(frame) for frame in vector["frames"]]
    for command in Command
    for vector in json.loads((VECTORS / f"{command.name.lower()}.json").read_text(encoding="utf-8"))
]

# Values as a hostile peer makes them: extreme, mistyped, with keys of all kinds.
wild_scalars = st.one_of(
    scalars,
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), True]),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    st.just(msgpack.Timestamp(1, 2)),
    st.sampled_from(["x" * 256, "x" * 257, "\n" * 5000]),
)
wild = st.recursive(
    wild_scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(texts | st.integers(0, 9) | st.binary(max_size=3), inner, max_size=4)
    ),
    max_leaves=15,
)


def message_or_refusal(frames: list[bytes]) -> Message | None:
    """Decode; a message must survive a round trip, a refusal must be short and name what can be answered."""
    try:
        message = decode(frames)
    except ProtocolError as error:
        refusal = error
    else:
        assert decode(encode(message)) == message
        return message
    assert 0 < len(refusal.message) < 400, refusal.message
    if refusal.subject is not None:
        assert frames[0][4] in (Command.REQUEST, Command.QUERY)
        assert refusal.subject == frames[0][8:HEADER_BYTES]
    return None


def test_every_command_has_a_strategy() -> None:
    assert set(messages) == set(Command)


@pytest.mark.parametrize("command", Command)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_round_trip(command: Command, data: st.DataObject) -> None:
    message = data.draw(messages[command])
    frames = encode(message)
    assert message.command is command
    assert all(type(frame) is bytes for frame in frames)
    assert decode(frames) == message
    assert encode(decode(frames)) == frames


@given(st.lists(st.binary(max_size=60), max_size=4))
@hostile
def test_random_frames(frames: list[bytes]) -> None:
    message_or_refusal(frames)


@given(st.sampled_from(Command), ids, st.lists(st.binary(max_size=60), max_size=4))
@hostile
def test_random_bodies(command: Command, subject: bytes, bodies: list[bytes]) -> None:
    message_or_refusal([PREFIX[command] + subject + b"".join(bodies[:1]), *bodies[1:]])


@given(st.sampled_from(GOLDEN) | any_message.map(encode), st.data())
@settings(hostile, max_examples=600)
def test_mutated_frames(frames: list[bytes], data: st.DataObject) -> None:
    frames = list(frames)
    for _ in range(data.draw(st.integers(1, 3))):
        which = data.draw(st.integers(0, len(frames) - 1))
        frame = frames[which]
        at = data.draw(st.integers(0, max(0, len(frame) - 1)))
        match data.draw(st.sampled_from(["truncate", "flip", "insert", "splice", "drop", "repeat"])):
            case "truncate":
                frames[which] = frame[:at]
            case "flip":
                if frame:
                    frames[which] = frame[:at] + bytes([frame[at] ^ data.draw(st.integers(1, 255))]) + frame[at + 1 :]
            case "insert":
                frames[which] = frame[:at] + data.draw(st.binary(max_size=6)) + frame[at:]
            case "splice":
                other = data.draw(st.sampled_from(GOLDEN))[-1]
                frames[which] = frame[:at] + other[data.draw(st.integers(0, len(other))) :]
            case "drop":
                if len(frames) > 1:
                    del frames[which]
            case "repeat":
                frames.insert(which, frame)
    message_or_refusal(frames)


@given(st.sampled_from(Command), ids, wild, st.lists(st.binary(max_size=8), max_size=2))
@hostile
def test_random_values_as_bodies(command: Command, subject: bytes, value: Any, more: list[bytes]) -> None:
    message_or_refusal([PREFIX[command] + subject + msgpack.packb(value), *more])


@given(st.sampled_from([frames for frames in GOLDEN if frames[0][4] != Command.CHUNKS]), wild, st.data())
@hostile
def test_one_field_replaced_by_anything(frames: list[bytes], value: Any, data: st.DataObject) -> None:
    header, body = frames[0][:HEADER_BYTES], msgpack.unpackb(frames[0][HEADER_BYTES:])
    if not body:
        return
    name = data.draw(st.sampled_from(sorted(body)))
    if isinstance(body[name], dict) and body[name] and data.draw(st.booleans()):
        body[name][data.draw(st.sampled_from(sorted(body[name])))] = value
    else:
        body[name] = value
    message_or_refusal([header + msgpack.packb(body), *frames[1:]])


@given(st.integers(0, 5), wild, ids, st.booleans())
@hostile
def test_one_element_of_a_chunk_replaced_by_anything(position: int, value: Any, subject: bytes, listed: bool) -> None:
    chunk: list[Any] = [subject, 1, 0, 5, [7], "x"]
    chunk[position] = [value] if listed else value
    message = message_or_refusal([PREFIX[Command.CHUNKS] + subject + msgpack.packb([chunk])])
    if message is not None:
        # Only what has the right type and range passes, on the fast way as on the slow one.
        assert isinstance(message, Chunks)
        assert [*dataclasses.astuple(message.chunks[0])[:4]] == chunk[:4]
        assert all(type(number) is int and 0 <= number <= limits.MAX_COUNT for number in chunk[1:4])
        assert all(type(token) is int and 0 <= token <= limits.MAX_TOKEN_ID for token in chunk[4])
        assert type(chunk[5]) is str


HEADS = {
    "array": (b"\xdd", ">I"),
    "map": (b"\xdf", ">I"),
    "string": (b"\xdb", ">I"),
    "bytes": (b"\xc6", ">I"),
    "extension": (b"\xc9", ">I"),
    "short array": (b"\xdc", ">H"),
}


@given(st.sampled_from(Command), st.sampled_from(sorted(HEADS)), st.integers(0, 2**32 - 1), st.binary(max_size=20))
@hostile
def test_declared_lengths(command: Command, kind: str, length: int, rest: bytes) -> None:
    code, form = HEADS[kind]
    length %= 2 ** (8 * struct.calcsize(form))
    more = [b""] if command is Command.REQUEST else []
    message_or_refusal([PREFIX[command] + bytes(16) + code + struct.pack(form, length) + rest, *more])


@given(
    st.sampled_from(Command),
    st.integers(1, 5000),
    st.sampled_from([b"\x91", b"\x81\xa1a", b"\x92\xc0", b"\x82\xa1a\x01\xa1b"]),
    st.sampled_from([b"", b"\xc0", b"\x90", b"\xc1"]),
    st.sampled_from([b"", b"\x81\xa6result", b"\x82\xa6method\xa1m\xa9arguments", b"\x82\xa4sent\x01\xa4more"]),
)
@hostile
def test_deep_nests(command: Command, depth: int, level: bytes, end: bytes, field: bytes) -> None:
    message = message_or_refusal([PREFIX[command] + bytes(16) + field + level * depth + end])
    if isinstance(message, (Reply, Query)):
        assert depth <= limits.MAX_DEPTH


@given(st.binary(min_size=HEADER_BYTES - 2, max_size=HEADER_BYTES + 2))
@hostile
def test_random_headers(frame: bytes) -> None:
    message_or_refusal([frame + b"\x80"])
