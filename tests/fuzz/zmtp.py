"""A peer that speaks ZMTP byte by byte (ZeroMQ RFC 23 and 37), as wrongly as it is told to."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Sequence

MORE, LONG, COMMAND = 1, 2, 4
_WAIT_S = 2.0


def greeting(mechanism: bytes = b"NULL", *, major: int = 3, minor: int = 0, server: int = 0) -> bytes:
    """Return the 64 bytes that a connection begins with."""
    return (
        b"\xff"
        + bytes(8)
        + b"\x7f"
        + bytes((major, minor))
        + mechanism.ljust(20, b"\0")[:20]
        + bytes((server,))
        + bytes(31)
    )


def frame(body: bytes, flags: int = 0, *, declared: int | None = None, long: bool = False) -> bytes:
    """Return a frame; `declared` is the length that it says, where that is another one than it has."""
    length = len(body) if declared is None else declared
    if length > 255 or long:
        return bytes((flags | LONG,)) + struct.pack(">Q", length % 2**64) + body
    return bytes((flags, length)) + body


def message(frames: Sequence[bytes]) -> bytes:
    """Return the frames of a message as they stand on the wire; nothing for none."""
    return b"".join(frame(body, MORE * (number < len(frames) - 1)) for number, body in enumerate(frames))


def command(name: bytes, body: bytes = b"", *, named: int | None = None) -> bytes:
    """Return a command; `named` is what it says of the length of its name."""
    return frame(bytes((len(name) if named is None else named,)) + name + body, COMMAND)


def ready(properties: Iterable[tuple[bytes, bytes]] = ((b"Socket-Type", b"DEALER"),)) -> bytes:
    """Return the READY with which a peer of the mechanism NULL introduces itself."""
    made = (bytes((len(name) % 256,)) + name + struct.pack(">I", len(value)) + value for name, value in properties)
    return command(b"READY", b"".join(made))


class Raw:
    """A TCP connection and what has come by it. All waits are bounded; that the other side hangs up is no error."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.socket = socket.create_connection((host, port), timeout=_WAIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    @classmethod
    def of(cls, accepted: socket.socket) -> Raw:
        """Return the other side of a connection: one that was accepted."""
        raw = cls.__new__(cls)
        raw.socket, raw._buffer = accepted, b""
        accepted.settimeout(_WAIT_S)
        return raw

    def send(self, data: bytes) -> bool:
        """Send; tell whether the other side still takes something."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def take(self, count: int) -> bytes | None:
        """Return so many bytes; None where they do not come."""
        while len(self._buffer) < count:
            try:
                found = self.socket.recv(65_536)
            except OSError:
                return None
            if not found:
                return None
            self._buffer += found
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def frame(self) -> tuple[int, bytes] | None:
        """Return the flags and the body of the next frame; None where none comes."""
        head = self.take(2)
        if head is None:
            return None
        length = head[1]
        if head[0] & LONG:
            more = self.take(7)
            if more is None:
                return None
            (length,) = struct.unpack(">Q", head[1:] + more)
        body = self.take(length)
        return None if body is None else (head[0], body)

    def message(self) -> list[bytes] | None:
        """Return the next message; commands in between are passed over. None where none comes."""
        frames: list[bytes] = []
        while True:
            found = self.frame()
            if found is None:
                return None
            flags, body = found
            if flags & COMMAND:
                continue
            frames.append(body)
            if not flags & MORE:
                return frames

    def handshake(self, properties: Iterable[tuple[bytes, bytes]] = ((b"Socket-Type", b"DEALER"),)) -> bool:
        """Do as a decent peer does; tell whether the other side has done so, too."""
        if not self.send(greeting()) or self.take(64) is None or not self.send(ready(properties)):
            return False
        return self.frame() is not None

    def reset(self) -> None:
        """Close with a TCP reset."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Close."""
        self.socket.close()
