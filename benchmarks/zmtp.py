"""ZMTP 3.1 without security, as bytes: what an end must say and understand that is a plain TCP socket.

The ends of the traffic benchmarks speak it themselves, because libzmq would cost them as much as it costs the relay
that is measured. The form is that of ZeroMQ RFC 37.
"""

from __future__ import annotations

import struct

#: Signature, version 3.1, mechanism NULL, not a server, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
MORE, LONG, COMMAND = 1, 2, 4
_LONGEST_SHORT = 255
_LENGTH = struct.Struct(">Q")


def frame(body: bytes, *, more: bool = False) -> bytes:
    """Return a frame; with `more` another one of the same message follows."""
    return _head(MORE if more else 0, len(body)) + body


def message(*bodies: bytes) -> bytes:
    """Return the frames of one message."""
    return b"".join(frame(body, more=True) for body in bodies[:-1]) + frame(bodies[-1])


def ready(socket_type: str) -> bytes:
    """Return the command that ends the handshake."""
    properties = {b"Socket-Type": socket_type.encode(), b"Identity": b""}
    body = b"\x05READY" + b"".join(
        bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in properties.items()
    )
    return _head(COMMAND, len(body)) + body


def head_bytes(body_bytes: int) -> int:
    """Return how many octets stand before a body of this length."""
    return 2 if body_bytes <= _LONGEST_SHORT else 9


def _head(flags: int, size: int) -> bytes:
    if size <= _LONGEST_SHORT:
        return bytes([flags, size])
    return bytes([flags | LONG]) + _LENGTH.pack(size)


def scan(data: bytes) -> tuple[list[tuple[int, int, int, int]], int]:
    """Find the whole frames at the beginning of what has arrived.

    Returns:
        Of each frame its flags, where it begins, where its body begins and where it ends; and where the first frame
        begins that is not whole yet.
    """
    found = []
    at, size = 0, len(data)
    while size - at >= 2:
        flags = data[at]
        if flags & LONG:
            if size - at < 9:
                break
            begin = at + 9
            end = begin + _LENGTH.unpack_from(data, at + 1)[0]
        else:
            begin = at + 2
            end = begin + data[at + 1]
        if end > size:
            break
        found.append((flags, at, begin, end))
        at = end
    return found, at
