"""What a hostile peer sends in flood.py, as bytes that are made before: connections, sessions, blocks of messages.

Nothing here is sent; flooder.py does that, in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import zmtp
from ends import MODEL, PAYLOAD, SOFTWARE
from strides import STAMP_BYTES, stamp

from tokenmq.protocol.codec import PREFIX, encode
from tokenmq.protocol.limits import MAX_ATTACHMENTS, MAX_CREDIT_TOKENS, MAX_MESSAGE_BYTES
from tokenmq.protocol.messages import (
    ID_BYTES,
    Cancel,
    Chunk,
    Chunks,
    Command,
    Credit,
    Envelope,
    Finish,
    FinishReason,
    Goodbye,
    Hello,
    Load,
    Message,
    ModelInfo,
    Query,
    Ready,
    Request,
    Timings,
    Usage,
)

FRONTEND, BACKEND = "frontend", "backend"
#: What the flooder's own worker serves, so that what comes of it is no work for others' workers.
HOSTILE = "hostile"
_MIB = 1 << 20
#: Small messages are sent by so many bytes: thousands of messages with each call into the system.
_BLOCK_BYTES = 256 * 1024
#: What attacks that fill the memory of the broker may send by one connection; libzmq takes 64 bytes and more for the
#: smallest frame.
_FILL_BYTES = 512 * _MIB
_FILL_SMALL_BYTES = 32 * _MIB
_SLOTS = 16


@dataclass(slots=True)
class Block:
    """Messages that are sent at once, again and again.

    Attributes:
        data: the bytes.
        messages: how many they are.
        ids_at: where the ids of the messages begin that must be new each time; None where nothing must.
        size: bytes of each message, where they have ids.
    """

    data: bytearray
    messages: int
    ids_at: int | None = None
    size: int = 0

    def renew(self, turn: int) -> None:
        """Give all messages ids that they had in no other turn."""
        if self.ids_at is not None:
            stamp(self.data, self.ids_at, self.size, turn)


@dataclass(frozen=True, slots=True)
class Attack:
    """One kind of flood by sessions or connections; see flood.py for what each is.

    Attributes:
        side: where to.
        block: makes what is sent for as long as the connection holds.
        opening: messages before it, once for each connection.
        shakes: the connection begins with a handshake.
        reads: what comes is read, and thrown away.
        most_bytes: with so many the connection is only held open from then on; 0 for no end.
    """

    side: str
    block: Callable[[], Block]
    opening: bytes = b""
    shakes: bool = True
    reads: bool = True
    most_bytes: int = 0


def wire(*messages: Message) -> bytes:
    """Return messages as they stand on the connection."""
    return b"".join(zmtp.message(*encode(message)) for message in messages)


def ready(model: str = HOSTILE, slots: int = _SLOTS, models: int = 1, incarnation: int = 1) -> Ready:
    """Return what the hostile worker says first."""
    offered = (ModelInfo(model), *(ModelInfo(f"{model}-{number}") for number in range(1, models)))
    return Ready("hostile-worker", incarnation, SOFTWARE, offered, slots, "none", Load(), 1.0)


HELLO = wire(Hello("hostile", SOFTWARE))


def repeated(once: bytes, messages: int = 1, block_bytes: int = _BLOCK_BYTES) -> Block:
    """Return a block of the same bytes, which are so many messages, again and again."""
    count = max(1, block_bytes // len(once))
    return Block(bytearray(once * count), count * messages)


def numbered(message: Message, block_bytes: int = _BLOCK_BYTES) -> Block:
    """Return a block of a message whose id, of ID_BYTES that stand in its header, is new each time."""
    once = wire(message)
    at = once.index(b"TMQ") + 8
    count = max(1, block_bytes // len(once))
    data = bytearray(once * count)
    for number in range(count):
        begin = number * len(once) + at
        data[begin : begin + ID_BYTES - STAMP_BYTES] = number.to_bytes(ID_BYTES - STAMP_BYTES, "big")
    return Block(data, count, at + ID_BYTES - STAMP_BYTES, len(once))


def request(model: str, payload: bytes = PAYLOAD, attachments: tuple[bytes, ...] = ()) -> Request:
    """Return a request that is as it should be."""
    return Request(bytes(ID_BYTES), Envelope(model, 1, MAX_CREDIT_TOKENS, expected_tokens=1), payload, attachments)


def _malformed() -> Block:
    """Requests whose envelopes are none: each is named by its id, so that the session goes on."""
    frames = encode(request(MODEL))
    return repeated(zmtp.message(frames[0][: 8 + ID_BYTES] + b"\xc1" * 64, *frames[1:]))


def _controls() -> Block:
    id = os.urandom(ID_BYTES)
    return repeated(wire(Credit(id, 1, 1000), Cancel(id, 1)), 2)


def large(model: str) -> Block:
    """Return one request of 16 MiB."""
    return numbered(request(model, bytes(16 * _MIB)), 1)


def _images() -> Block:
    attachments = tuple(bytes((MAX_MESSAGE_BYTES - _MIB) // MAX_ATTACHMENTS) for _ in range(MAX_ATTACHMENTS))
    return numbered(request("nobody", PAYLOAD, attachments), 1)


def _strays() -> Block:
    id = os.urandom(ID_BYTES)
    return repeated(wire(Chunks(id, (Chunk(id, 1, 0, 0, (12345,), " Paris"),))))


def _ends() -> Block:
    return numbered(Finish(bytes(ID_BYTES), 1, FinishReason.LENGTH, Usage(8, 1), Timings(), "hostile-worker"))


ATTACKS: Mapping[str, Attack] = {
    "shared": Attack(FRONTEND, lambda: numbered(request(MODEL)), HELLO),
    "shared-unread": Attack(FRONTEND, lambda: numbered(request(MODEL)), HELLO, reads=False),
    "nobody": Attack(FRONTEND, lambda: numbered(request("nobody")), HELLO),
    "malformed": Attack(FRONTEND, _malformed, HELLO),
    "garbage": Attack(FRONTEND, lambda: repeated(zmtp.frame(os.urandom(64)))),
    "noise": Attack(FRONTEND, lambda: Block(bytearray(os.urandom(_BLOCK_BYTES)), 1), shakes=False),
    "controls": Attack(FRONTEND, _controls, HELLO),
    "queries": Attack(FRONTEND, lambda: numbered(Query(bytes(ID_BYTES), "status")), HELLO),
    "large": Attack(FRONTEND, lambda: large("nobody"), HELLO),
    "images": Attack(FRONTEND, _images, HELLO),
    "hellos": Attack(FRONTEND, lambda: repeated(wire(Goodbye(), Hello("hostile", SOFTWARE)), 2), HELLO),
    "strays": Attack(BACKEND, _strays, wire(ready())),
    "ends": Attack(BACKEND, _ends, wire(ready())),
    "readies": Attack(BACKEND, lambda: repeated(wire(ready(models=1000), ready(models=999)), 2), wire(ready())),
    "frames": Attack(FRONTEND, lambda: repeated(zmtp.frame(b"x", more=True)), HELLO, most_bytes=_FILL_SMALL_BYTES),
    "frames-large": Attack(
        FRONTEND,
        lambda: repeated(zmtp.frame(bytes(_MIB), more=True), block_bytes=_MIB),
        HELLO,
        most_bytes=_FILL_BYTES,
    ),
}
"""By what flood.py calls them; those that need more than one connection are in flooder.py."""

#: The header of a request, by which the hostile worker finds its own.
REQUEST_PREFIX = PREFIX[Command.REQUEST]


def streams(ids: list[bytes]) -> bytes:
    """Return what a hostile client says that wants streams of the hostile worker."""
    asked = [Request(id, Envelope(HOSTILE, 1, MAX_CREDIT_TOKENS, expected_tokens=1), PAYLOAD) for id in ids]
    return HELLO + wire(*asked)


def tokens(route: bytes, ids: list[bytes]) -> Block:
    """Return what the hostile worker then sends: a token of each stream, a message each, as fast as it can."""
    made = [Chunks(route, (Chunk(id, 1, 0, 0, (12345,), " Paris"),)) for id in ids]
    return repeated(wire(*made), len(made))
