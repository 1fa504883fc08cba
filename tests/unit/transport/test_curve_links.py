"""What a link says about handshakes: over real sockets, with a CURVE server whose ZAP handler knows some keys."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import zmq
from zmq.auth.thread import ThreadAuthenticator

from tokenmq.protocol.links import Connected, LinkEvent, Open, Refused
from tokenmq.protocol.refusal import Refusal
from tokenmq.transport.keys import Curve, KeyPair
from tokenmq.transport.links import Links
from tokenmq.transport.pump import Pump
from tokenmq.transport.sockets import router

PATIENCE_ROUNDS = 20


def new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


SERVER, KNOWN, UNKNOWN = new_pair(), new_pair(), new_pair()


class Provider:
    """Admits one key, at one domain."""

    def callback(self, domain: str, key: bytes) -> bool:
        return domain == "frontend" and key == KNOWN.public.encode()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = ThreadAuthenticator(made)
    authenticator.start()
    for domain in ("frontend", "backend"):
        authenticator.configure_curve_callback(domain=domain, credentials_provider=Provider())
    yield made
    authenticator.stop()
    made.destroy(linger=0)


def first_event(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, curve: Curve | None) -> LinkEvent:
    """Open a link; return what happens to it first."""
    pump = Pump()
    links = Links(context, pump, {endpoint: curve} if curve else None)
    try:
        links.perform(Open(endpoint))
        events: list[LinkEvent] = []
        for _ in range(PATIENCE_ROUNDS):
            events += links.events(pump.wait(1.0))
            if events:
                return events[0]
        raise AssertionError("nothing happened")
    finally:
        links.close()
        pump.close()


@pytest.mark.parametrize(
    ("server", "domain", "client", "refusal"),
    [
        (SERVER, "frontend", Curve(KNOWN, SERVER.public), None),
        (None, "", None, None),
        (SERVER, "frontend", Curve(UNKNOWN, SERVER.public), Refusal.FORBIDDEN),
        (SERVER, "backend", Curve(KNOWN, SERVER.public), Refusal.FORBIDDEN),
        (SERVER, "frontend", None, Refusal.MISMATCH),
        (None, "", Curve(KNOWN, SERVER.public), Refusal.MISMATCH),
        (SERVER, "frontend", Curve(KNOWN, UNKNOWN.public), Refusal.BROKEN_OFF),
    ],
)
def test_who_is_let_in_and_why_the_others_are_not(
    context: zmq.Context[zmq.Socket[bytes]],
    server: KeyPair | None,
    domain: str,
    client: Curve | None,
    refusal: Refusal | None,
) -> None:
    listening, (endpoint,) = router(context, ["tcp://127.0.0.1:*"], curve=server, domain=domain)
    with listening:
        expected = Connected(endpoint) if refusal is None else Refused(endpoint, refusal)
        assert first_event(context, endpoint, client) == expected


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + b"." * 80])
@pytest.mark.parametrize("curve", [None, Curve(KNOWN, SERVER.public)])
def test_what_is_no_broker_breaks_the_handshake_off(
    context: zmq.Context[zmq.Socket[bytes]], answer: bytes, curve: Curve | None
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def once() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answer)

    thread = threading.Thread(target=once)
    thread.start()
    endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    try:
        assert first_event(context, endpoint, curve) == Refused(endpoint, Refusal.BROKEN_OFF)
    finally:
        thread.join()
        listener.close()


def test_routing_ids_begin_anywhere(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """libzmq draws them from C's rand, whose numbers are the same in each process unless somebody seeds it."""
    firsts = set()
    for _ in range(4):
        server, (endpoint,) = router(context, ["tcp://127.0.0.1:*"])
        with server, context.socket(zmq.DEALER) as client:
            client.connect(endpoint)
            client.send(b"")
            assert server.poll(10_000)
            firsts.add(struct.unpack(">xI", server.recv_multipart()[0])[0])
    assert len(firsts) > 1
    assert 0x6B8B4567 not in firsts, "the first number of a generator that nobody has seeded"
