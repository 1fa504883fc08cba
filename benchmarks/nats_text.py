"""The text protocol of NATS, as bytes: what an end must say and understand that is a plain TCP socket."""

from __future__ import annotations

import json

END = b"\r\n"
PING, PONG = b"PING" + END, b"PONG" + END


def connect() -> bytes:
    """Return the command that opens a session, and a PING that shows when it is open."""
    told = {"verbose": False, "pedantic": False, "tls_required": False, "name": "tokenmq-benchmark"}
    return b"CONNECT " + json.dumps(told).encode() + END + PING


def subscribe(subject: bytes, queue: bytes = b"") -> bytes:
    """Return the command that asks for a subject, as one of a queue group where one is named."""
    return b" ".join(part for part in (b"SUB", subject, queue, b"1") if part) + END


def publish(subject: bytes, body: bytes, reply: bytes = b"") -> bytes:
    """Return the command that sends a message."""
    return b" ".join(part for part in (b"PUB", subject, reply, b"%d" % len(body)) if part) + END + body + END


def delivery(subject: bytes, body: bytes, reply: bytes = b"") -> bytes:
    """Return how the message arrives at who has subscribed by `subscribe`."""
    return b" ".join(part for part in (b"MSG", subject, b"1", reply, b"%d" % len(body)) if part) + END + body + END


def scan(data: bytes) -> tuple[list[tuple[bytes, int, int, int]], int]:
    """Find the whole operations at the beginning of what has arrived.

    Returns:
        Of each operation its first line, where it begins, where its body begins and where the body ends (the same for
        one without a body); and where the first operation begins that is not whole yet.
    """
    found = []
    at = 0
    while (end := data.find(END, at)) >= 0:
        line = data[at:end]
        begin = stop = after = end + 2
        if line.startswith(b"MSG "):
            stop = begin + int(line[line.rindex(b" ") :])
            after = stop + 2
            if after > len(data):
                break
        found.append((line, at, begin, stop))
        at = after
    return found, at
