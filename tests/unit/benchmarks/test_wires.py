"""What the ends of the benchmarks write and read: ZMTP and the text of NATS, against libzmq where it can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import zmq


@pytest.fixture
def zmtp(load: Callable[[str], Any]) -> Any:
    return load("zmtp")


@pytest.fixture
def nats(load: Callable[[str], Any]) -> Any:
    return load("nats_text")


@pytest.mark.parametrize("size", [0, 1, 255, 256, 70_000])
def test_frames_are_found_again(zmtp: Any, size: int) -> None:
    data = zmtp.message(b"a" * size, b"", b"end")
    found, end = zmtp.scan(data)
    assert end == len(data)
    assert [data[begin:stop] for _, _, begin, stop in found] == [b"a" * size, b"", b"end"]
    assert [bool(flags & zmtp.MORE) for flags, *_ in found] == [True, True, False]
    assert found[0][2] - found[0][1] == zmtp.head_bytes(size)


@pytest.mark.parametrize("size", [3, 300])
def test_a_frame_that_is_not_whole_waits(zmtp: Any, size: int) -> None:
    first, second = zmtp.frame(b"whole"), zmtp.frame(b"x" * size)
    for cut in range(len(second)):
        found, end = zmtp.scan(first + second[:cut])
        assert len(found) == 1
        assert end == len(first)


def test_libzmq_understands_the_handshake_and_a_message(zmtp: Any, load: Callable[[str], Any]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    try:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        connection = load("connection").Connection(port, 0)
        try:
            connection.send(zmtp.GREETING + zmtp.ready("DEALER"))
            connection.until(lambda data: zmtp.scan(data[64:])[1] > 0)
            connection.send(zmtp.message(b"first", b"x" * 300))
            assert router.poll(10_000)
            peer, *frames = router.recv_multipart()
            assert frames == [b"first", b"x" * 300]
            router.send_multipart([peer, b"back"])
            connection.until(lambda data: data.endswith(zmtp.frame(b"back")))
            assert connection.rest[0:1] + connection.rest[9:11] == b"\xff\x7f\x03"
            flags, _, begin, end = zmtp.scan(connection.rest[64:])[0][0]
            assert flags == zmtp.COMMAND
            assert connection.rest[64:][begin:end].startswith(b"\x05READY")
        finally:
            connection.socket.close()
    finally:
        router.close(linger=0)
        context.term()


def test_nats_operations_are_found_again(nats: Any) -> None:
    body = b"with\r\nMSG in it\r\n"
    data = nats.delivery(b"c0001", body) + nats.PING + nats.delivery(b"work", b"x", b"c0007")
    found, end = nats.scan(data)
    assert end == len(data)
    assert [line.split(b" ")[0] for line, *_ in found] == [b"MSG", b"PING", b"MSG"]
    assert [data[begin:stop] for _, _, begin, stop in found] == [body, b"", b"x"]
    assert found[2][0].split(b" ")[3] == b"c0007"


def test_a_nats_operation_that_is_not_whole_waits(nats: Any) -> None:
    first, second = nats.delivery(b"a", b"1"), nats.delivery(b"b", b"22")
    for cut in range(len(second)):
        found, end = nats.scan(first + second[:cut])
        assert len(found) == 1
        assert end == len(first)


def test_what_nats_is_told(nats: Any) -> None:
    assert nats.publish(b"c0001", b"abc") == b"PUB c0001 3\r\nabc\r\n"
    assert nats.publish(b"work", b"abc", b"c0001") == b"PUB work c0001 3\r\nabc\r\n"
    assert nats.subscribe(b"work", b"group") == b"SUB work group 1\r\n"
    assert nats.connect().endswith(b"}\r\nPING\r\n")
