"""A worker's own port beside hostile peers: raw ZMTP that no libzmq would send."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from tests.fuzz.zmtp import Raw, message
from tokenmq.protocol.codec import encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import Attach, Message
from tokenmq.transport import door as door_module
from tokenmq.transport.door import MOST_CONNECTIONS, Door
from tokenmq.transport.pump import Pump
from tokenmq.transport.visitors import GREETING_S

WAIT_S = 20.0
HELLO = Attach(b"k" * 16)


class Place:
    """A door, and the loop that it stands in; its clock is the test's."""

    def __init__(self, most: int = MOST_CONNECTIONS) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.pump = Pump()
        self.door = Door(self.context, "tcp://127.0.0.1:*", self.pump, most=most)
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

    def heard_for(self, rounds: int) -> list[Message | ProtocolError]:
        """Serve so many rounds."""
        found: list[Message | ProtocolError] = []
        for _ in range(rounds):
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

    def close(self) -> None:
        for raw in self.raws:
            raw.close()
        self.door.close()
        self.context.term()
        self.pump.close()


@pytest.fixture
def places() -> Iterator[Callable[[int], Place]]:
    """Make places that let in so many; all are closed in the end."""
    made: list[Place] = []

    def make(most: int) -> Place:
        made.append(Place(most))
        return made[-1]

    yield make
    for place in made:
        place.close()


@pytest.fixture
def place(places: Callable[[int], Place]) -> Place:
    return places(MOST_CONNECTIONS)


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


def serve_until(place: Place, what: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not what() and time.monotonic() < until:
        place.round()
    assert what()


def attached(place: Place) -> Raw:
    raw = place.raw()
    assert raw.send(message(encode(HELLO)))
    assert place.heard(1) == [HELLO]
    return raw


def is_served(place: Place, raw: Raw) -> bool:
    return raw.send(message(encode(HELLO))) and place.heard(1) == [HELLO]


def test_silent_connections_keep_nobody_out(places: Callable[[int], Place]) -> None:
    place = places(4)
    silent = [place.raw() for _ in range(12)]
    honest = attached(place)
    for raw in silent[:9]:
        assert place.is_cut(raw)
    assert is_served(place, honest)
    assert len(place.door._visitors) <= 4
    place.door._visitors.validate()


def test_who_has_attached_makes_room_for_nobody(places: Callable[[int], Place]) -> None:
    place = places(2)
    first, second = attached(place), attached(place)
    assert place.is_cut(place.raw())
    assert is_served(place, first)
    assert is_served(place, second)


def test_there_is_room_again_when_somebody_has_left(places: Callable[[int], Place]) -> None:
    place = places(1)
    first = attached(place)
    first.close()
    serve_until(place, lambda: len(place.door._visitors) == 0)
    assert place.door._brought == {}
    attached(place)


def test_the_silent_have_little_time(place: Place) -> None:
    honest = attached(place)
    silent = place.raw()
    serve_until(place, lambda: len(place.door._visitors) == 2)
    came = place.now
    assert place.is_cut(silent)
    assert place.now >= came + GREETING_S
    place.now += 3600.0
    place.round()
    assert is_served(place, honest)


def test_rubbish_is_no_greeting(place: Place) -> None:
    hostile = place.raw()
    assert hostile.send(message([b"rubbish"]))
    (found,) = place.heard(1)
    assert isinstance(found, ProtocolError)
    assert place.is_cut(hostile)


@pytest.mark.parametrize("identity", [b"somebody", b"\0\1\2\3", b"ahead"], ids=["a name", "too short", "ahead"])
def test_who_claims_an_identity_is_cut_with_its_first_message(place: Place, identity: bytes) -> None:
    if identity == b"ahead":  # what libzmq would abort over, some connections later
        identity = b"\0" + ((place.door._claims._first + 1000) % 2**32).to_bytes(4, "big")
    raw = Raw(int(place.door.endpoint.rpartition(":")[2]))
    place.raws.append(raw)
    assert raw.handshake(((b"Socket-Type", b"DEALER"), (b"Identity", identity)))
    came = place.now
    assert raw.send(message(encode(HELLO)))
    until = time.monotonic() + WAIT_S
    heard: list[Message | ProtocolError] = []
    while not is_closed(raw) and time.monotonic() < until:
        place.round()
        heard += [each for _, each in place.door.receive()]
    assert is_closed(raw)
    assert heard == []
    assert place.now == came  # not for its silence
    attached(place)


def is_closed(raw: Raw) -> bool:
    raw.socket.settimeout(0.01)
    try:
        return raw.socket.recv(4096) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def test_many_that_come_at_once_are_all_welcome(place: Place) -> None:
    raws = [place.raw() for _ in range(50)]  # nobody has looked meanwhile
    for raw in raws:
        assert raw.send(message(encode(HELLO)))
    found: list[Message | ProtocolError] = []
    until = time.monotonic() + WAIT_S
    while len(found) < len(raws) and time.monotonic() < until:
        place.pump.wait(0.01)
        found += [each for _, each in place.door.receive()]  # without a look in between, too
    assert found == [HELLO] * len(raws)


def test_what_a_gone_connection_has_left_cuts_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = attached(place)
    (connection,) = place.door._brought
    gone = place.raw()
    serve_until(place, lambda: len(place.door._visitors) == 2)
    assert gone.send(message([b"", b""]))
    gone.close()
    serve_until(place, lambda: len(place.door._visitors) == 1)
    monkeypatch.setattr(door_module, "id_of", lambda _: connection)  # its descriptor is the other one's now
    assert place.heard_for(10) == []
    monkeypatch.undo()
    assert is_served(place, honest)
