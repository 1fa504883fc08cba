"""The entrance of a ROUTER, with real connections: who comes, who goes, who is closed, and descriptors used again."""

from __future__ import annotations

import contextlib
import os
import resource
import socket as sockets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from tokenmq.transport.connections import Arrival, ConnectionId, Entrance, Seen, id_of

#: No wait for an event is longer.
BOUND_S = 20.0


class Door:
    """A ROUTER with its entrance, and all that was seen there."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.context = context
        self.router = context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.entrance = Entrance(self.router)
        self.dealers: list[zmq.Socket[bytes]] = []
        self.arrived: list[Arrival] = []
        self.closed: list[ConnectionId] = []
        self.broken = 0

    def look(self) -> Seen:
        seen = self.entrance.look()
        self.arrived += seen.arrived
        self.closed += seen.closed
        self.broken += seen.broken
        return seen

    def until(self, done: Callable[[], bool]) -> None:
        ends = time.monotonic() + BOUND_S
        while not done():
            assert time.monotonic() < ends, "it never happened"
            self.entrance.socket.poll(100)
            self.look()

    def dealer(self, endpoint: str) -> zmq.Socket[bytes]:
        """A peer that has spoken; it does not come back when it is closed."""
        dealer = self.context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RECONNECT_IVL, -1)
        dealer.connect(endpoint)
        dealer.send(b"hello")
        self.dealers.append(dealer)
        return dealer

    def receive(self) -> zmq.Frame:
        assert self.router.poll(1000 * BOUND_S)
        return self.router.recv_multipart(copy=False)[-1]

    def close(self) -> None:
        self.entrance.close()
        self.router.close(linger=0)
        for dealer in self.dealers:
            dealer.close(linger=0)


@pytest.fixture
def door() -> Iterator[Door]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = Door(context)
    yield door
    door.close()
    context.term()


def tcp(door: Door) -> tuple[str, int]:
    port = door.router.bind_to_random_port("tcp://127.0.0.1")
    return f"tcp://127.0.0.1:{port}", port


def test_a_connection_comes_and_goes(door: Door) -> None:
    endpoint, _ = tcp(door)
    dealer = door.dealer(endpoint)
    connection = id_of(door.receive())
    assert connection is not None
    door.until(lambda: bool(door.arrived))
    assert door.arrived == [Arrival(connection, "127.0.0.1")]
    assert door.broken == 0
    dealer.close(linger=0)
    door.until(lambda: bool(door.closed))
    assert door.closed == [connection]
    assert door.broken == 1


def test_ipc_has_no_address(door: Door, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    door.router.bind(endpoint)
    door.dealer(endpoint)
    connection = id_of(door.receive())
    assert connection is not None
    door.until(lambda: bool(door.arrived))
    assert door.arrived == [Arrival(connection, "")]
    assert door.entrance.cut(connection)
    door.until(lambda: bool(door.closed))
    assert door.closed == [connection]


def test_ipv6(door: Door) -> None:
    door.router.setsockopt(zmq.IPV6, 1)
    try:
        port = door.router.bind_to_random_port("tcp://[::1]")
    except zmq.ZMQError:
        pytest.skip("no IPv6 here")
    with sockets.create_connection(("::1", port), timeout=BOUND_S):
        door.until(lambda: bool(door.arrived))
    assert door.arrived[0].address == "::1"


def test_one_is_cut_and_the_others_are_not(door: Door) -> None:
    endpoint, _ = tcp(door)
    first, second = door.dealer(endpoint), door.dealer(endpoint)
    by_peer = {}
    for _ in range(2):
        assert door.router.poll(1000 * BOUND_S)
        peer, frame = door.router.recv_multipart(copy=False)
        by_peer[peer.bytes] = id_of(frame)
    (gone, its), (_, stays) = by_peer.items()
    door.until(lambda: len(door.arrived) == 2)
    assert its is not None
    assert door.entrance.cut(its)
    door.until(lambda: bool(door.closed))
    assert door.closed == [its]
    assert not door.entrance.cut(its)
    # Both speak once more; only one is heard.
    for dealer in (first, second):
        with contextlib.suppress(zmq.Again):  # it knows already that it has no connection
            dealer.send(b"again", zmq.DONTWAIT)
    frame = door.receive()
    assert frame.bytes == b"again"
    assert id_of(frame) == stays
    door.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    with pytest.raises(zmq.ZMQError) as error:
        door.router.send_multipart([gone, b"?"])
    assert error.value.errno == zmq.EHOSTUNREACH


def test_who_connects_and_never_speaks_is_seen_and_can_be_cut(door: Door) -> None:
    _, port = tcp(door)
    with sockets.create_connection(("127.0.0.1", port), timeout=BOUND_S) as silent:
        door.until(lambda: bool(door.arrived))
        connection, address = door.arrived[0]
        assert address == "127.0.0.1"
        assert door.entrance.cut(connection)
        while silent.recv(4096):  # libzmq's greeting, and then the end
            pass
    door.until(lambda: bool(door.closed))
    assert door.closed == [connection]
    assert door.entrance.failed["unfinished"] == 1


def test_what_is_no_zmtp_is_counted(door: Door) -> None:
    _, port = tcp(door)
    with sockets.create_connection(("127.0.0.1", port), timeout=BOUND_S) as raw:
        door.until(lambda: bool(door.arrived))
        # A greeting of ZMTP 3 that asks for a mechanism that is none (RFC 23).
        raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NOSUCH".ljust(20, b"\0") + bytes(32))
        while raw.recv(4096):  # the entrance holds nothing open that libzmq has closed
            pass
    door.until(lambda: door.broken > 0)
    assert door.closed == [arrival.connection for arrival in door.arrived]
    assert door.entrance.failed["protocol"] == 1


def test_descriptors_that_are_used_again_are_other_connections(door: Door) -> None:
    endpoint, _ = tcp(door)
    ids = []
    for number in range(5):
        dealer = door.dealer(endpoint)
        ids.append(id_of(door.receive()))
        door.until(lambda count=number + 1: len(door.arrived) == count)  # type: ignore[misc]
        dealer.close(linger=0)
        door.until(lambda count=number + 1: len(door.closed) == count)  # type: ignore[misc]
    assert len(set(ids)) == 5
    assert len({connection[0] for connection in ids if connection}) < 5
    assert door.closed == ids == [arrival.connection for arrival in door.arrived]
    # None of the first ones is there, though their descriptors may be.
    door.dealer(endpoint)
    last = id_of(door.receive())
    assert last is not None
    assert not any(door.entrance.cut(connection) for connection in ids if connection)
    assert door.look().closed == []
    assert door.entrance.cut(last)


def test_a_message_of_a_connection_that_is_gone_has_no_connection(door: Door) -> None:
    endpoint, _ = tcp(door)
    dealer = door.dealer(endpoint)
    frame = door.receive()
    connection = id_of(frame)
    dealer.close(linger=0)
    door.until(lambda: door.broken > 0)
    ends = time.monotonic() + BOUND_S
    while id_of(frame) == connection:  # its end is told just before its descriptor is closed
        assert time.monotonic() < ends
    assert id_of(frame) is None


def come_and_go(port: int) -> None:
    """Connect and leave; when this returns, libzmq has told of both."""
    with sockets.create_connection(("127.0.0.1", port), timeout=BOUND_S) as raw:
        raw.shutdown(sockets.SHUT_WR)
        while raw.recv(4096):
            pass


def test_what_has_come_and_gone_between_two_looks_has_never_been(door: Door) -> None:
    _, port = tcp(door)
    for _ in range(20):
        come_and_go(port)
    assert door.look() == Seen([], [], True)
    assert door.entrance.failed["unfinished"] == 20
    assert door.look() == Seen([], [], False)


def test_who_has_the_descriptor_of_one_that_was_never_seen_is_seen_once(door: Door) -> None:
    endpoint, port = tcp(door)
    come_and_go(port)
    door.dealer(endpoint)
    connection = id_of(door.receive())
    assert connection is not None
    assert door.look() == Seen([], [Arrival(connection, "127.0.0.1")], True)


def test_a_storm_stops_nobody(door: Door) -> None:
    endpoint, port = tcp(door)
    for _ in range(1_000):  # three events each: more than libzmq would queue for a monitor by default
        come_and_go(port)
    door.dealer(endpoint)
    assert door.receive().bytes == b"hello"
    door.look()
    assert door.entrance.failed["unfinished"] < 1_000  # one look goes through a part
    door.until(lambda: door.entrance.failed["unfinished"] == 1_000 and len(door.arrived) - len(door.closed) == 1)


def test_it_works_without_a_free_descriptor(door: Door) -> None:
    _, port = tcp(door)
    with sockets.create_connection(("127.0.0.1", port), timeout=BOUND_S):
        assert door.entrance.socket.poll(1000 * BOUND_S)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(name) for name in os.listdir("/proc/self/fd") if name.isdigit()) + 1
        holes: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    holes.append(os.open(os.devnull, os.O_RDONLY))
            with pytest.raises(OSError, match="Too many open files"):
                os.dup(0)
            seen = door.look()
            assert len(seen.arrived) == 1
            assert door.entrance.cut(seen.arrived[0].connection)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for hole in holes:
                os.close(hole)


def test_nothing_is_left_open(door: Door) -> None:
    endpoint, _ = tcp(door)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(10):
        dealer = door.dealer(endpoint)
        connection = id_of(door.receive())
        assert connection is not None
        door.until(lambda count=number + 1: len(door.arrived) == count)  # type: ignore[misc]
        assert door.entrance.cut(connection)
        door.until(lambda count=number + 1: len(door.closed) == count)  # type: ignore[misc]
        dealer.close(linger=0)
    ends = time.monotonic() + BOUND_S
    while len(os.listdir("/proc/self/fd")) > before:
        assert time.monotonic() < ends


@pytest.mark.parametrize("descriptor", [-1, 10_000_000])
def test_there_is_nothing_to_cut_where_nothing_is(door: Door, descriptor: int) -> None:
    assert not door.entrance.cut((descriptor, 1))


def test_a_file_is_no_connection(door: Door, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert not door.entrance.cut((file.fileno(), os.fstat(file.fileno()).st_ino))


def test_a_frame_that_came_by_no_connection(door: Door) -> None:
    door.router.bind("inproc://here")
    door.dealer("inproc://here")
    assert id_of(door.receive()) is None
