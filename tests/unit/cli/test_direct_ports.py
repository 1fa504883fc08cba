"""`zmq-worker --devices --direct`: each worker has an endpoint of its own, or the command says why it cannot."""

from __future__ import annotations

import pytest

from tokenmq.cli.supervise import direct_of, make_teams


def directs(endpoint: str, workers: int) -> list[list[str]]:
    teams = make_teams(
        ["--model", "m", "--direct", endpoint], devices=["cpu"] * workers, size=1, name="w", numbered=True,
        direct=endpoint,
    )  # fmt: skip
    return [[part for part in team.command if part.startswith("--direct=")] for team in teams]


def test_each_worker_has_the_next_port() -> None:
    ports = [f"--direct=tcp://10.0.0.7:{port}" for port in (6000, 6001, 6002)]
    assert directs("tcp://10.0.0.7:6000", 3) == [[port] for port in ports]


def test_without_the_option_none_has_one() -> None:
    assert directs("", 2) == [[], []]


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://127.0.0.1:0"])
def test_the_system_finds_one_for_each(endpoint: str) -> None:
    assert {direct_of(endpoint, number) for number in range(3)} == {endpoint}


def test_sockets_of_the_file_system_are_numbered() -> None:
    assert [direct_of("ipc:///run/w", number) for number in range(3)] == [
        "ipc:///run/w", "ipc:///run/w.1", "ipc:///run/w.2",
    ]  # fmt: skip


def test_ports_end() -> None:
    assert direct_of("tcp://[::1]:65535", 0) == "tcp://[::1]:65535"
    with pytest.raises(ValueError, match="worker 1 would need port 65536"):
        direct_of("tcp://[::1]:65535", 1)
