"""Handshakes with a ZAP handler in the loop: who is let in, and what the messages then tell of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest
import zmq

from tokenmq.transport.pump import Pump
from tokenmq.transport.zap import Zap, key_of

WAIT_S = 10.0


class Place:
    """A ROUTER with keys, its pump and its handler, and a context for those who dial."""

    def __init__(self) -> None:
        self.public, secret = zmq.curve_keypair()
        self.asked: list[tuple[str, str, str]] = []
        self.allowed: set[str] = set()
        self.dialled: list[zmq.Socket[bytes]] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.others: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.pump = Pump()
        self.zap = Zap(self.context, self.pump, self._admits)
        self.zap.serve("front")
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.CURVE_SERVER, 1)
        self.router.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self.domain("front")
        self.endpoint = f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}"
        self.pump.watch(self.router)

    def domain(self, name: str) -> None:
        self.router.setsockopt(zmq.ZAP_DOMAIN, name.encode())

    def _admits(self, domain: str, key: str, address: str) -> bool:
        self.asked.append((domain, key, address))
        return key in self.allowed

    def dial(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes], str]:
        public, secret = zmq.curve_keypair()
        dealer = self.others.socket(zmq.DEALER)
        dealer.linger = 0
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, secret)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self.public)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        self.dialled += [monitor, dealer]
        return dealer, monitor, public.decode()

    def outcome(self, monitor: zmq.Socket[bytes]) -> int:
        """Serve until the handshake has ended; return which event ended it."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            self.pump.wait(0.01)
            self.zap.answer()
            if monitor.poll(0):
                return int(struct.unpack_from("=H", monitor.recv_multipart()[0])[0])
        raise TimeoutError

    def close(self) -> None:
        self.zap.close()
        self.router.close(linger=0)
        for socket in self.dialled:
            socket.close(linger=0)
        self.others.term()
        self.context.term()
        self.pump.close()


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.close()


def test_who_is_admitted_is_known_by_its_key(place: Place) -> None:
    dealer, monitor, key = place.dial()
    place.allowed.add(key)
    dealer.connect(place.endpoint)
    dealer.send(b"x")
    assert place.outcome(monitor) == zmq.EVENT_HANDSHAKE_SUCCEEDED
    assert place.asked == [("front", key, "127.0.0.1")]
    assert place.router.poll(int(WAIT_S * 1000))
    place.router.recv()
    assert key_of(place.router.recv(copy=False)) == key


def test_who_is_not_is_refused(place: Place) -> None:
    dealer, monitor, _ = place.dial()
    dealer.connect(place.endpoint)
    dealer.send(b"x")
    assert place.outcome(monitor) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    assert not place.router.poll(50)


def test_a_domain_that_is_not_served_admits_nobody(place: Place) -> None:
    place.domain("other")
    endpoint = f"tcp://127.0.0.1:{place.router.bind_to_random_port('tcp://127.0.0.1')}"
    dealer, monitor, key = place.dial()
    place.allowed.add(key)
    dealer.connect(endpoint)
    assert place.outcome(monitor) == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    assert not place.asked


def test_many_at_a_time(place: Place) -> None:
    dialled = [place.dial() for _ in range(20)]
    place.allowed = {key for _, _, key in dialled[::2]}
    for dealer, _, _ in dialled:
        dealer.connect(place.endpoint)
    for number, (_, monitor, _) in enumerate(dialled):
        wanted = zmq.EVENT_HANDSHAKE_FAILED_AUTH if number % 2 else zmq.EVENT_HANDSHAKE_SUCCEEDED
        assert place.outcome(monitor) == wanted


def test_without_keys_nobody_is_anybody() -> None:
    with zmq.Context() as context:
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
        dealer.send(b"x")
        router.recv()
        assert key_of(router.recv(copy=False)) is None
        router.close(linger=0)
        dealer.close(linger=0)
