"""Endpoints: which are taken for what, and that sockets reach each other through all kinds of them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tokenmq.transport.endpoints import EndpointError, announced, check_destination, check_endpoint
from tokenmq.transport.sockets import connect, dealer, router

PATIENCE_MS = 10_000


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.mark.parametrize("endpoint", ["tcp://*:5555", "tcp://127.0.0.1:*", "tcp://127.0.0.1:0", "tcp://*:*"])
def test_a_peer_connects_to_no_wildcard(endpoint: str) -> None:
    assert check_endpoint(endpoint) == endpoint  # a broker may listen there
    with pytest.raises(EndpointError, match=r"name the host and the port"):
        check_destination(endpoint)


@pytest.mark.parametrize(
    ("endpoint", "bound", "told"),
    [
        ("tcp://gpu-3.lab:*", "tcp://10.0.0.7:41443", "tcp://gpu-3.lab:41443"),
        ("tcp://127.0.0.1:6000", "tcp://127.0.0.1:6000", "tcp://127.0.0.1:6000"),
        ("tcp://[::1]:0", "tcp://[::1]:41443", "tcp://[::1]:41443"),
        ("tcp://lo:*", "tcp://127.0.0.1:41443", "tcp://127.0.0.1:41443"),
        ("ipc:///run/w", "ipc:///run/w", "ipc:///run/w"),
    ],
)
def test_others_are_told_the_host_as_given_and_the_port_as_bound(endpoint: str, bound: str, told: str) -> None:
    assert announced(endpoint, bound) == told


@pytest.mark.parametrize("endpoint", ["inproc://x", "udp://h:1", "tcp://", "tcp://h", "tcp://h:65536", "ipc://", "x"])
def test_other_forms_are_refused_on_both_sides(endpoint: str) -> None:
    for check in (check_endpoint, check_destination):
        with pytest.raises(EndpointError, match="invalid endpoint"):
            check(endpoint)


def reach(context: zmq.Context[zmq.Socket[bytes]], listen: list[str], dial: str | None) -> None:
    server, bound = router(context, listen)
    with server:
        for endpoint in [dial.replace("*", bound[0].rpartition(":")[2])] if dial else bound:
            with dealer(context, endpoint) as client:
                connect(client, endpoint)
                client.send(b"hello")
                assert server.poll(PATIENCE_MS), endpoint
                assert server.recv_multipart()[1:] == [b"hello"]


def test_tcp_and_ipc_on_one_socket(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    reach(context, ["tcp://127.0.0.1:*", f"ipc://{tmp_path}/s"], None)


def test_localhost_is_the_address_that_the_broker_listens_on(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    reach(context, ["tcp://127.0.0.1:*"], "tcp://localhost:*")


def test_ipv6_beside_ipv4(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6")
    reach(context, ["tcp://[::1]:*", "tcp://127.0.0.1:*"], None)


def test_an_ipc_path_in_use_is_refused_and_one_left_over_is_not(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    endpoint = f"ipc://{tmp_path}/s"
    with router(context, [endpoint])[0]:
        with pytest.raises(EndpointError, match="already in use"):
            router(context, [endpoint])
        reach(context, ["tcp://127.0.0.1:*"], None)
    with socket.socket(socket.AF_UNIX) as killed:  # what a killed broker leaves: a file that nobody listens on
        killed.bind(f"{tmp_path}/left")
    reach(context, [f"ipc://{tmp_path}/left"], None)
