"""Networks that a user has named: what is in them, and what is no network."""

from __future__ import annotations

import pytest

from tokenmq.transport.networks import NetworkError, Networks


@pytest.mark.parametrize(
    ("names", "endpoint"),
    [
        (["10.0.0.0/8"], "tcp://10.1.2.3:6000"),
        (["10.1.2.3"], "tcp://10.1.2.3:6000"),
        (["192.168.0.0/16", "fd00::/8"], "tcp://[fd00::7]:6000"),
        (["::1"], "tcp://[::1]:6000"),
        (["[::1]"], "tcp://[::1]:6000"),
        (["gpu-3.lab"], "tcp://GPU-3.lab:6000"),
        (["localhost"], "tcp://localhost:6000"),
        (["10.0.0.0/8", "ipc"], "ipc:///run/w"),
        (["0.0.0.0/0"], "tcp://8.8.8.8:6000"),
    ],
)
def test_inside(names: list[str], endpoint: str) -> None:
    assert Networks.of(names).has(endpoint)


@pytest.mark.parametrize(
    ("names", "endpoint"),
    [
        ([], "tcp://127.0.0.1:6000"),
        ([], "ipc:///run/w"),
        (["10.0.0.0/8"], "tcp://11.0.0.1:6000"),
        (["10.0.0.0/8"], "ipc:///run/w"),
        (["ipc"], "tcp://127.0.0.1:6000"),
        (["127.0.0.0/8"], "tcp://localhost:6000"),  # names are not looked up
        (["gpu-3"], "tcp://gpu-3.elsewhere:6000"),
        (["10.0.0.0/8"], "tcp://[::ffff:10.0.0.1]:6000"),
        (["10.0.0.0/8"], "tcp://10.0.0.1:1;8.8.8.8:6000"),  # to libzmq that is a source and a destination
        (["10.0.0.0/8"], "tcp://10.0.0.1:*"),
        (["10.0.0.0/8"], "tcp://10.0.0.1"),
        (["10.0.0.0/8"], "udp://10.0.0.1:6000"),
        (["10.0.0.0/8"], ""),
    ],
)
def test_outside(names: list[str], endpoint: str) -> None:
    assert not Networks.of(names).has(endpoint)


@pytest.mark.parametrize(
    "name", ["", "10.0.0.0/33", "10.0.0.256", "a b", "tcp://10.0.0.1:5", "10.0.0.0-10.0.0.9", "é"]
)
def test_no_network(name: str) -> None:
    with pytest.raises(NetworkError, match="expected a network"):
        Networks.of([name])


def test_an_address_in_the_place_of_its_network() -> None:
    with pytest.raises(NetworkError, match=r"an address in 10\.0\.0\.0/8"):
        Networks.of(["10.1.0.0/8"])
