"""What the ends send is what TMQ/1 says, with the ids and routes in their places; without a relay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import (
    Chunks,
    Disconnect,
    DisconnectCode,
    Finish,
    FinishReason,
    Heartbeat,
    Request,
    Timings,
    Usage,
)

KINDS = ("c-proxy", "bare", "nats", "zmq-broker")
ID = bytes(range(16))


@pytest.fixture
def make(load: Callable[[str], Any]) -> Callable[..., Any]:
    """Make ends that are connected to nothing; clients are known by what a relay would have told."""

    def made(kind: str, clients: int = 2, streams: int = 3) -> Any:
        class Here(load("kinds").KINDS[kind]):  # type: ignore[misc]
            def _open(self, *_: object) -> None:
                self._routes = {number: bytes([65 + number]) * 16 for number in range(clients)}
                self._peers = [bytes([0, 1, 2, 3, number]) for number in range(clients)]

        relay = load("relays").Relay(kind, 1, 2, 3)
        return Here(relay, 1, clients, streams, 6)

    return made


def frames_of(load: Callable[[str], Any], ends: Any, wire: bytes) -> list[bytes]:
    """Return the bodies of what was written."""
    if ends.relay == "nats":
        found, end = load("nats_text").scan(wire.replace(b"PUB ", b"MSG "))
        assert end == len(wire)
        return [wire[begin:stop] for _, _, begin, stop in found]
    found, end = load("zmtp").scan(wire)
    assert end == len(wire)
    return [wire[begin:stop] for _, _, begin, stop in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_brings_a_token_of_every_stream(make: Any, load: Any, kind: str) -> None:
    streams = load("streams")
    ends = make(kind)
    case = streams.Case(2, 3)
    made = streams.bodies(ends, streams.all_streams(case))
    messages = [(client, decode([body])) for client, body in made]
    assert len(messages) == (2 if kind == "zmq-broker" else 6)
    brought = []
    for client, message in messages:
        assert isinstance(message, Chunks)
        assert message.route == ends.route(client)
        brought += [(client, chunk.request_id) for chunk in message.chunks]
        assert all(len(chunk.token_ids) == 1 for chunk in message.chunks)
    assert brought == [(client, id) for client in range(2) for id in ends.ids[client]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_burst_is_those_messages_as_the_worker_writes_them(make: Any, load: Any, kind: str) -> None:
    streams = load("streams")
    ends = make(kind)
    case = streams.Case(2, 3)
    part = streams.burst(ends, streams.all_streams(case), 4)
    assert part.tokens == 24
    assert part.messages == (8 if kind == "zmq-broker" else 24)
    size = len(part.data) // part.messages
    marked = [part.data[at + part.stamp_at : at + part.stamp_at + 8] for at in range(0, len(part.data), size)]
    assert marked == [b"STAMPED!"] * part.messages


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_is_counted_in_tokens(make: Any, load: Any, kind: str) -> None:
    streams = load("streams")
    ends = make(kind)

    group = streams.all_streams(streams.Case(2, 3))
    bodies = dict(streams.bodies(ends, group))

    class Client:
        rest = b""

        def __init__(self, number: int) -> None:
            self.number = number

        def receive(self) -> bytes:
            return bytes(ends.incoming(self.number, bodies[self.number])) * 5

    ends.clients = [Client(0), Client(1)]
    receivers = streams.Receivers(ends, group)
    receivers.receive(ends.clients[1])
    assert receivers.messages == 5
    assert receivers.tokens == (15 if kind == "zmq-broker" else 5)


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_the_ids_of_its_request(make: Any, load: Any, kind: str, finish: bool) -> None:
    ends = make(kind, streams=0)
    loop = load("closed_loop")
    way = {"c-proxy": load("zmtp").frame(b"peer.", more=True), "nats": b"c0001"}.get(kind, b"W" * 16)
    frames = frames_of(load, ends, loop.answer_form(ends, 0, finish=finish) % {b"id": ID, b"way": way})
    if kind == "c-proxy":
        assert frames[::2] == [b"peer."] * (2 if finish else 1)
        frames = frames[1::2]
    messages = [decode([frame]) for frame in frames]
    chunks = messages[0]
    assert isinstance(chunks, Chunks)
    assert chunks.chunks[0].request_id == ID
    assert chunks.route == (way if kind in ("bare", "zmq-broker") else ID)
    if finish:
        end = messages[1]
        assert isinstance(end, Finish)
        assert end.id == (way if kind == "bare" else ID)
        assert end.reason is FinishReason.LENGTH
    assert len(messages) == (2 if finish else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_whole_around_its_id(make: Any, load: Any, kind: str) -> None:
    ends = make(kind, streams=0)
    head, tail = ends.asking(1)
    frames = frames_of(load, ends, head + ID + tail)
    if kind == "nats":
        assert frames[0] == b"".join(load("ends").request(ID, ends.route(1)))
        return
    request = decode(frames)
    assert isinstance(request, Request)
    assert request.id == ID
    # A broker puts the route in; where there is none, the client has to tell it.
    assert request.envelope.route == (None if kind == "zmq-broker" else ends.route(1))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_found_wherever_what_arrives_is_cut(make: Any, load: Any, kind: str) -> None:
    ends = make(kind, streams=0)
    zmtp, nats = load("zmtp"), load("nats_text")
    ids = [bytes([number]) * 16 for number in range(3)]
    ways, wires = [], []
    for number, id in enumerate(ids):
        route = bytes([70 + number]) * 16
        frames = load("ends").request(id, route)
        peer = bytes([0, 7, 7, 7, number])
        ways.append({"c-proxy": zmtp.frame(peer, more=True), "nats": b"c%04d" % number}.get(kind, route))
        wires.append(
            nats.delivery(b"work", b"".join(frames), ways[-1])
            if kind == "nats"
            else zmtp.message(*([peer, *frames] if kind == "c-proxy" else frames))
        )
    data = b"".join(wires)
    expected = [{b"id": id, b"way": way} for id, way in zip(ids, ways, strict=True)]
    find = load("closed_loop").find
    for cut in range(len(data) + 1):
        first, rest = find(ends.requests, data[:cut])
        second, rest = find(ends.requests, rest + data[cut:])
        assert first + second == expected
    found, rest = [], b""
    for at in range(len(data)):
        some, rest = find(ends.requests, rest + data[at : at + 1])
        found += some
    assert found == expected


def test_answers_are_counted_wherever_they_are_cut(load: Any) -> None:
    count = load("closed_loop").count
    message = encode(Finish(ID, 1, FinishReason.LENGTH, Usage(), Timings(), ""))[0]
    data, prefix = b"head" + message + b"other" + message, message[:8]
    for cut in range(len(data) + 1):
        first, rest = count(b"", data[:cut], prefix)
        second, _ = count(rest, data[cut:], prefix)
        assert first + second == 2


def test_the_end_of_a_session_is_no_figure(make: Any, load: Any) -> None:
    ends = make("zmq-broker")
    zmtp = load("zmtp")
    ends.take(None, zmtp.frame(encode(Heartbeat(7))[0]))
    told = zmtp.frame(encode(Disconnect(DisconnectCode.LOST_MESSAGES, "3 of 4"))[0])
    with pytest.raises(load("rounds").BenchmarkError, match="the relay says lost_messages: 3 of 4"):
        ends.take(None, told)
    with pytest.raises(load("rounds").BenchmarkError, match="lost_messages"):
        load("closed_loop").count(b"", told, b"TMQ\x01\x14")
    with pytest.raises(load("rounds").BenchmarkError, match="Permissions"):
        make("nats").take(None, b"-ERR 'Permissions'\r\n")
