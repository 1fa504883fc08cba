"""A worker's own port beside hostile peers: raw ZMTP that no libzmq would send."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import zmq

from tests.fuzz.zmtp import Raw, message
from tokenmq.protocol.codec import encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import Attach, Message
from tokenmq.transport import door as door_module
from tokenmq.transport.door import Door
from tokenmq.transport.pump import Pump

WAIT_S = 20.0
HELLO = Attach(b"k" * 16)


class Place:
    """A door, and the loop that it stands in; its clock is the test's."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.pump = Pump()
        self.door = Door(self.context, "tcp://127.0.0.1:*", self.pump)
        self.raws: list[Raw] = []
        self.now = 100.0

    def raw(self) -> Raw:
        raw = Raw(int(self.door.endpoint.rpartition(":")[2]))
        self.raws.append(raw)
        assert raw.handshake()
        return raw

    def heard(self, count: int) -> list[Message | ProtocolError]:
        """Serve until so many messages have come."""
        found: list[Message | ProtocolError] = []
        until = time.monotonic() + WAIT_S
        while len(found) < count and time.monotonic() < until:
            self.round()
            found += [each for _, each in self.door.receive()]
        return found

    def round(self) -> None:
        self.pump.wait(0.01)
        self.door.look(self.now)

    def is_cut(self, raw: Raw) -> bool:
        """Serve until a connection is closed from this side."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            self.now += 0.1
            self.round()
            for _ in self.door.receive():
                pass
            if not raw.send(b""):
                return True
            raw.socket.settimeout(0.01)
            try:
                if raw.socket.recv(4096) == b"":
                    return True
            except TimeoutError:
                continue
            except OSError:
                return True
        return False


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    for raw in made.raws:
        raw.close()
    made.door.close()
    made.context.term()
    made.pump.close()


def test_a_message_of_many_frames_costs_the_connection_and_nobody_else(place: Place) -> None:
    honest, hostile = place.raw(), place.raw()
    assert hostile.send(message([b""] * 60_000))
    assert place.is_cut(hostile)
    honest.send(message(encode(HELLO)))
    assert place.heard(1) == [HELLO]


def test_it_is_taken_off_in_portions(place: Place) -> None:
    hostile, honest = place.raw(), place.raw()
    hostile.send(message([b""] * 60_000))
    rounds = 0
    honest.send(message(encode(HELLO)))
    found: list[Message | ProtocolError] = []
    until = time.monotonic() + WAIT_S
    while not (found and rounds > 5) and time.monotonic() < until:
        place.round()
        found += [each for _, each in place.door.receive()]
        rounds += place.door._swallow.under_way
    assert found == [HELLO]
    assert rounds > 5


def test_a_message_without_an_end_is_cut(place: Place) -> None:
    hostile = place.raw()
    frames = b"".join(b"\x01\xff" + bytes(255) for _ in range(4096))
    for _ in range(8):
        if not hostile.send(frames):
            break
    assert place.is_cut(hostile)


def test_connections_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "_MOST_CONNECTIONS", 2)
    first, second = place.raw(), place.raw()
    while len(place.door._open) < 2:
        place.round()
    third = place.raw()
    assert place.is_cut(third)
    for raw in (first, second):
        raw.send(message(encode(HELLO)))
    assert place.heard(2) == [HELLO, HELLO]
