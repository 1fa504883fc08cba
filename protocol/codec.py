"""Messages to frames and back, and the peek at the header that routing needs.

A message is one frame, header and body, for frames cost more than bytes; REQUEST has more: its payload, and its
attachments. The header is 24 bytes:

    offset  0  3 bytes   "TMQ"
    offset  3  1 byte    protocol version, 1
    offset  4  1 byte    command
    offset  5  3 bytes   zero
    offset  8  16 bytes  id: of the request or query; of the return route for CHUNKS; else zero
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from string import ascii_letters, digits
from typing import Any, TypeAlias

from . import limits
from .errors import ProtocolError
from .messages import (
    ID_BYTES,
    NO_ID,
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
from .packing import pack, unpack
from .schema import (
    Check,
    binary,
    boolean,
    choice,
    count,
    dump,
    entries,
    fail,
    integers,
    listing,
    mapping,
    number,
    octets,
    optional,
    plain,
    record,
    seconds,
    text,
)

HEADER_BYTES = 8 + ID_BYTES
VERSION = 1
_MAGIC = b"TMQ" + bytes([VERSION])
#: The first bytes of a header, by command: one comparison tells magic, version and command at once.
PREFIX: dict[Command, bytes] = {command: _MAGIC + bytes([command, 0, 0, 0]) for command in Command}
CHUNKS_PREFIX = PREFIX[Command.CHUNKS]
_REQUEST_PREFIX = PREFIX[Command.REQUEST]
_COMMANDS = {prefix: command for command, prefix in PREFIX.items()}

_name = text(empty=False)
_prose = text(limits.MAX_TEXT_CHARS)
_attempt = count(1)
_credit = count(0, limits.MAX_CREDIT_TOKENS)
_interval = number(0.001, limits.MAX_SECONDS)

_part = number(0.0, 1.0)
#: What ZeroMQ RFC 32 writes 4 bytes as 5 of.
_Z85 = frozenset(digits + ascii_letters + ".-:+=^!/*?&<>()[]{}@%$#")


def _public_key(value: Any, path: str) -> str:
    """Check a CURVE key as text, or no key."""
    if not isinstance(value, str) or len(value) not in (0, 40) or not _Z85.issuperset(value):
        raise fail(path, "40 characters of Z85, or none", value)
    return value


MODEL_INFO = record(
    ModelInfo,
    {
        "name": _name,
        "context_tokens": count(),
        "chat": boolean,
        "resumes": boolean,
        "generates": boolean,
        "embeds": boolean,
        "images": boolean,
    },
)
LOAD = record(
    Load,
    {
        "state": choice(WorkerState),
        "running": count(),
        "waiting": count(),
        "held": count(),
        "steps": count(),
        "step_age_s": seconds,
        "tokens_per_s": number(0.0, 1e12),
        "kv_use": _part,
        "steps_per_s": number(0.0, 1e12),
        "prefill_use": _part,
        "decode_use": _part,
        "prefix_hits": _part,
        "memory_used_bytes": count(),
        "memory_bytes": count(),
    },
)
_CONSIDERED = record(
    Considered,
    {
        "worker": text(),
        "load": count(),
        "slots": count(),
        "speed": number(0.0, 1e12),
        "cost": number(0.0, 1e15),
    },
)
_DECISION = record(
    Decision,
    {
        "broker": _name,
        "policy": _name,
        "worker": text(),
        "candidates": count(),
        "considered": listing(_CONSIDERED, limits.MAX_CONSIDERED),
    },
)
_USAGE = record(Usage, {"prompt_tokens": count(), "completion_tokens": count()})
_TIMINGS = record(
    Timings,
    {
        "broker_queue_s": seconds,
        "worker_queue_s": seconds,
        "prefill_s": seconds,
        "decode_s": seconds,
        "routing": listing(_DECISION, limits.MAX_HOPS),
    },
)
_ENVELOPE = record(
    Envelope,
    {
        "model": _name,
        "attempt": _attempt,
        "credit": _credit,
        "deadline_s": optional(seconds),
        "route": optional(binary(ID_BYTES)),
        "prior_tokens": count(0, limits.MAX_NEW_TOKENS),
        "avoid": listing(_name, limits.MAX_AVOIDED),
        "queue_s": optional(seconds),
        "expected_tokens": count(0, limits.MAX_NEW_TOKENS),
        "priority": count(0, limits.MAX_PRIORITY),
        "affinity": text(),
        "hedge": boolean,
        "explain": boolean,
        "path": listing(_name, limits.MAX_HOPS),
        "key": optional(binary(ID_BYTES)),
    },
)
_token_ids = integers(0, limits.MAX_TOKEN_ID, limits.MAX_ARRAY_ITEMS)
_chunk_text = text(limits.MAX_BODY_BYTES)
_session = {"software": text(), "heartbeat_s": _interval, "expiry_s": _interval}

#: The fields that the body of a message carries; its id stands in the header.
_FIELDS: dict[type[Any], dict[str, Check]] = {
    Hello: {"client": text(), "software": text(), "heartbeat_s": optional(_interval), "direct": boolean},
    Welcome: {"broker": _name, **_session, "group": text()},
    Ready: {
        "worker": _name,
        "incarnation": count(),
        "software": text(),
        "models": listing(MODEL_INFO, limits.MAX_MODELS),
        "slots": count(1, limits.MAX_SLOTS),
        "engine": text(),
        "load": LOAD,
        "speed": optional(number(limits.SLOWEST_TOKENS_PER_S, limits.FASTEST_TOKENS_PER_S)),
        "heartbeat_s": optional(_interval),
        "brokers": listing(_name, limits.MAX_BROKERS),
        "direct": text(),
    },
    Accepted: {"broker": _name, **_session},
    Credit: {"attempt": _attempt, "limit": _credit},
    Cancel: {"attempt": _attempt},
    Parked: {"attempt": _attempt},
    Started: {
        "attempt": _attempt,
        "worker": text(),
        "direct": text(),
        "key": optional(binary(ID_BYTES)),
        "server_key": _public_key,
    },
    Attach: {},
    Finish: {
        "attempt": _attempt,
        "reason": choice(FinishReason),
        "usage": _USAGE,
        "timings": _TIMINGS,
        "worker": text(),
        "chunks": count(),
    },
    Error: {
        "attempt": count(),
        "code": _name,
        "message": _prose,
        "retryable": boolean,
        "retry_after_s": optional(seconds),
        "worker": text(),
    },
    Query: {"method": _name, "arguments": mapping},
    Reply: {"result": plain},
    Heartbeat: {"sent": count(), "load": optional(LOAD)},
    Draining: {},
    Goodbye: {},
    Disconnect: {"code": choice(DisconnectCode), "message": _prose},
    Drain: {"grace_s": optional(seconds), "undo": boolean},
}
#: By class, since members of an enumeration are slow to hash.
_PREFIX_OF: dict[type[Any], bytes] = {kind: PREFIX[kind.command] for kind in _FIELDS}


def header(command: Command, subject: bytes = NO_ID) -> bytes:
    """Return the header of a message; `subject` is its 16-byte id."""
    return PREFIX[command] + subject


#: Fields of an envelope that differ between what a client sends and what a worker gets, and how the route is added.
#: The bare names: msgpack has several ways to write the length of a string.
_CHANGING = (b"route", b"deadline_s", b"avoid", b"queue_s", b"key")
_ROUTE = pack("route") + pack(bytes(ID_BYTES))[:-ID_BYTES]
_SMALLEST_MAP, _LARGEST_MAP = 0x80, 0x8F


def with_route(first: bytes, route: bytes) -> bytes | None:
    """Return the first frame of a client's REQUEST as a worker gets it: with one more field, and else as it came.

    That takes a tenth of the time of packing the envelope anew. None where more has to be changed; it may also be
    that a value only has the name of such a field in it.

    Args:
        first: the frame; it has been decoded.
        route: the client's return route.
    """
    fields = first[HEADER_BYTES]
    longer = len(first) - HEADER_BYTES + len(_ROUTE) + ID_BYTES
    if not _SMALLEST_MAP <= fields < _LARGEST_MAP or longer > limits.MAX_BODY_BYTES:
        return None
    for name in _CHANGING:
        if first.find(name, HEADER_BYTES) >= 0:
            return None
    return b"%b%c%b%b%b" % (first[:HEADER_BYTES], fields + 1, first[HEADER_BYTES + 1 :], _ROUTE, route)


def peek(frame: bytes) -> tuple[Command, bytes]:
    """Return the command and the id of the header that a message's first frame begins with.

    Raises:
        ProtocolError: it is not a TMQ/1 header.
    """
    if len(frame) < HEADER_BYTES:
        raise ProtocolError(f"header: expected {HEADER_BYTES} bytes, got {len(frame)}")
    command = _COMMANDS.get(frame[:8])
    if command is not None:
        return command, frame[8:HEADER_BYTES]
    if frame[:3] != b"TMQ":
        raise ProtocolError("header: does not begin with TMQ")
    if frame[3] != VERSION:
        raise ProtocolError(f"header: protocol version {frame[3]}, this peer speaks {VERSION}")
    if frame[5:8] != bytes(3):
        raise ProtocolError("header: reserved bytes are not zero")
    raise ProtocolError(f"header: unknown command 0x{frame[4]:02x}")


def _encode_request(message: Request) -> list[bytes]:
    first = _REQUEST_PREFIX + message.id + pack(dump(message.envelope))
    return [first, message.payload, *message.attachments]


def _encode_chunks(message: Chunks) -> list[bytes]:
    body = pack(
        [
            [c.request_id, c.attempt, c.index, c.offset, c.token_ids, c.text]
            if c.details is None
            else [c.request_id, c.attempt, c.index, c.offset, c.token_ids, c.text, _dump_details(c.details)]
            for c in message.chunks
        ]
    )
    return [CHUNKS_PREFIX + message.route + body]


def _dump_details(details: Details) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if details.logprobs:
        body["logprobs"] = [_dump_logprobs(one) for one in details.logprobs]
    if details.prompt_logprobs:
        body["prompt_logprobs"] = [one and _dump_logprobs(one) for one in details.prompt_logprobs]
    if details.vector:
        body["vector"] = details.vector
    return body


def _dump_logprobs(of: TokenLogprobs) -> list[Any]:
    return [of.token_id, of.text, of.logprob, [[one.token_id, one.text, one.logprob] for one in of.top]]


_SENT = PREFIX[Command.HEARTBEAT] + NO_ID + b"\x81" + pack("sent")


def _encode_heartbeat(message: Heartbeat) -> list[bytes]:
    # A broker says it to each of thousands of peers a second.
    if message.load is not None:
        return [PREFIX[Command.HEARTBEAT] + NO_ID + pack(dump(message))]
    return [_SENT + pack(message.sent)]


_SPECIAL_ENCODERS: dict[type[Any], Callable[[Any], list[bytes]]] = {
    Request: _encode_request,
    Chunks: _encode_chunks,
    Heartbeat: _encode_heartbeat,
}


def encode(message: Message) -> list[bytes]:
    """Return the frames of a message.

    Raises:
        ProtocolError: a value cannot be packed. Limits are checked where messages arrive, by `decode`.
    """
    kind = type(message)
    special = _SPECIAL_ENCODERS.get(kind)
    if special is not None:
        return special(message)
    body = dump(message)
    return [_PREFIX_OF[kind] + body.pop("id", NO_ID) + pack(body)]


def _decode_request(subject: bytes, frames: Sequence[bytes]) -> Request:
    if len(frames) < 2:
        raise ProtocolError("REQUEST: expected a payload, got no frame after the envelope")
    attachments = tuple(frames[2:])
    if len(attachments) > limits.MAX_ATTACHMENTS:
        raise ProtocolError(f"REQUEST: {len(attachments)} attachments, at most {limits.MAX_ATTACHMENTS} are allowed")
    if len(frames[1]) > limits.MAX_PAYLOAD_BYTES:
        raise ProtocolError(
            f"REQUEST: a payload of {len(frames[1])} bytes, at most {limits.MAX_PAYLOAD_BYTES} are allowed"
        )
    # Without the first frame, to which the broker adds something.
    total = len(frames[1]) + sum(map(len, attachments))
    if total > limits.MAX_MESSAGE_BYTES:
        raise ProtocolError(f"REQUEST: {total} bytes, at most {limits.MAX_MESSAGE_BYTES} are allowed")
    envelope = _ENVELOPE(unpack(frames[0][HEADER_BYTES:], "envelope"), "envelope")
    return Request(subject, envelope, frames[1], attachments)


_token_id = count(0, limits.MAX_TOKEN_ID)
_token_text = text(limits.MAX_TEXT_CHARS)
#: The logarithm of a probability; one that is zero is told as the lowest of these.
_logprob = number(limits.MIN_LOGPROB, 0.0)


def _one_logprob(value: Any, path: str) -> TokenLogprob:
    if not isinstance(value, list) or len(value) < 3:
        raise fail(path, "a list of 3 elements", value)
    return TokenLogprob(
        _token_id(value[0], f"{path}.token_id"),
        _token_text(value[1], f"{path}.text"),
        _logprob(value[2], f"{path}.logprob"),
    )


_top = listing(_one_logprob, limits.MAX_LOGPROBS)


def _logprobs(value: Any, path: str) -> TokenLogprobs:
    if not isinstance(value, list) or len(value) < 4:
        raise fail(path, "a list of 4 elements", value)
    chosen = _one_logprob(value, path)
    return TokenLogprobs(chosen.token_id, chosen.text, chosen.logprob, _top(value[3], f"{path}.top"))


_details = record(
    Details,
    {
        "logprobs": listing(_logprobs, limits.MAX_ARRAY_ITEMS),
        "prompt_logprobs": listing(optional(_logprobs), limits.MAX_ARRAY_ITEMS),
        "vector": octets(limits.MAX_VECTOR_BYTES, 4),
    },
)
_request_id = binary(ID_BYTES)
_index = count(0, limits.MAX_COMPLETIONS - 1)
_offset = count()


def _decode_chunks(value: Any) -> tuple[Chunk, ...]:
    """Check and build the chunks of one body.

    This is what a client spends its time on, so the good case is one chain of comparisons without a call, and
    whatever fails it goes to `_decode_odd_chunk`, which knows what is wrong, or that nothing is.
    """
    if type(value) is not list or not 1 <= len(value) <= limits.MAX_CHUNKS:
        raise fail("chunks", f"a list of 1 to {limits.MAX_CHUNKS} elements", value)
    # Names of this function are looked up faster than the module's.
    most, most_index, most_id = limits.MAX_COUNT, limits.MAX_COMPLETIONS, limits.MAX_TOKEN_ID
    chunks = []
    for item in value:
        if type(item) is list and len(item) == 6:
            request_id, attempt, index, offset, token_ids, piece = item
            if (
                type(request_id) is bytes
                and len(request_id) == ID_BYTES
                and type(attempt) is int
                and 0 < attempt <= most
                and type(index) is int
                and 0 <= index < most_index
                and type(offset) is int
                and 0 <= offset <= most
                and type(token_ids) is list
                # The lengths of both need no look: msgpack's limits bound them.
                and type(piece) is str
            ):
                for token_id in token_ids:
                    if type(token_id) is not int or not 0 <= token_id <= most_id:
                        break
                else:
                    chunks.append(Chunk(request_id, attempt, index, offset, tuple(token_ids), piece))
                    continue
        chunks.append(_decode_odd_chunk(item, f"chunks[{len(chunks)}]"))
    return tuple(chunks)


def _decode_odd_chunk(value: Any, path: str) -> Chunk:
    # Longer arrays are allowed: a newer peer may add elements.
    if not isinstance(value, list) or len(value) < 6:
        raise fail(path, "a list of 6 elements", value)
    details = _details(value[6], f"{path}.details") if len(value) > 6 else None
    return Chunk(
        _request_id(value[0], f"{path}.request_id"),
        _attempt(value[1], f"{path}.attempt"),
        _index(value[2], f"{path}.index"),
        _offset(value[3], f"{path}.offset"),
        _token_ids(value[4], f"{path}.token_ids"),
        _chunk_text(value[5], f"{path}.text"),
        details if details != Details() else None,
    )


def decode(frames: Sequence[bytes]) -> Message:
    """Return the message that the frames hold.

    Args:
        frames: all frames of one message, without a ROUTER's routing id.

    Raises:
        ProtocolError: anything is wrong with them; its `subject` is set where a REQUEST or QUERY can be answered.
    """
    if not frames:
        raise ProtocolError("empty message")
    first = frames[0]
    reader = _READERS.get(first[:8])
    if reader is None or len(first) < HEADER_BYTES:
        peek(first)  # tells what is wrong
    assert reader is not None
    try:
        return reader(first[8:HEADER_BYTES], frames)
    except ProtocolError as error:
        if first[4] in _ANSWERABLE:
            error.subject = first[8:HEADER_BYTES]
        raise


def _body_of(frames: Sequence[bytes], name: str) -> Any:
    if len(frames) != 1:
        raise ProtocolError(f"{name}: expected one frame, got {len(frames)}")
    return unpack(frames[0][HEADER_BYTES:], name)


def _reader(kind: type[Any], checks: dict[str, Check]) -> _Reader:
    """Make what reads messages of one command."""
    name, taken = kind.command.name, entries(kind, checks)
    has_id = any(item.name == "id" for item in fields(kind))

    def read(subject: bytes, frames: Sequence[bytes]) -> Message:
        found = taken(_body_of(frames, name), name)
        if has_id:
            found["id"] = subject
        return kind(**found)  # type: ignore[no-any-return]

    return read


def _read_chunks(subject: bytes, frames: Sequence[bytes]) -> Chunks:
    return Chunks(subject, _decode_chunks(_body_of(frames, "CHUNKS")))


_usage_fields = frozenset({"prompt_tokens", "completion_tokens"})
_timing_fields = frozenset({"broker_queue_s", "worker_queue_s", "prefill_s", "decode_s"})


def _read_finish(subject: bytes, frames: Sequence[bytes]) -> Message:
    """Read the end of a request: the usual one in a few comparisons, as with chunks, any other field by field."""
    value = _body_of(frames, "FINISH")
    if type(value) is dict:
        usage, timings = value.get("usage"), value.get("timings")
        attempt, worker, chunks = value.get("attempt"), value.get("worker"), value.get("chunks", 0)
        told = value.get("reason")
        reason = _REASONS.get(told) if type(told) is str else None
        if (
            reason is not None
            and type(usage) is dict
            and type(timings) is dict
            and usage.keys() <= _usage_fields
            and timings.keys() <= _timing_fields
            and type(attempt) is int
            and 0 < attempt <= limits.MAX_COUNT
            and type(worker) is str
            and len(worker) <= limits.MAX_NAME_CHARS
            and type(chunks) is int
            and 0 <= chunks <= limits.MAX_COUNT
        ):
            for tokens in usage.values():
                if type(tokens) is not int or not 0 <= tokens <= limits.MAX_COUNT:
                    break
            else:
                for seconds_ in timings.values():
                    if type(seconds_) is not float or not 0.0 <= seconds_ <= limits.MAX_SECONDS:
                        break
                else:
                    return Finish(subject, attempt, reason, Usage(**usage), Timings(**timings), worker, chunks)
    return _read_any_finish(subject, frames)


_Reader: TypeAlias = Callable[[bytes, Sequence[bytes]], Message]
_read_any_finish = _reader(Finish, _FIELDS[Finish])
_REASONS: dict[Any, FinishReason] = {member.value: member for member in FinishReason}
#: By the first bytes of the header: what is looked up for each message is found without a look at its command.
_READERS: dict[bytes, _Reader] = {
    PREFIX[Command.REQUEST]: _decode_request,
    CHUNKS_PREFIX: _read_chunks,
    **{PREFIX[kind.command]: _reader(kind, checks) for kind, checks in _FIELDS.items()},
    PREFIX[Command.FINISH]: _read_finish,
}
#: Messages that are answered with ERROR where they are malformed.
_ANSWERABLE = frozenset({int(Command.REQUEST), int(Command.QUERY)})
