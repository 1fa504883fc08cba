"""`zmq-broker --shards`: which endpoints and names the brokers get, and that each hears what the command was told."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmq.broker.settings import BrokerSettings
from tokenmq.cli import broker
from tokenmq.cli.shards import _options, arguments, divide
from tokenmq.client.local import LocalClusterError
from tokenmq.transport.endpoints import EndpointError


def no_ports(count: int) -> Sequence[int]:
    raise AssertionError(f"{count} ports were asked for, and all are given")


def divided(count: int = 2, **settings: Any) -> list[BrokerSettings]:
    return divide(BrokerSettings(**settings), count, "5f1c", no_ports)


def test_the_defaults_stand_side_by_side() -> None:
    shards = divided(3)
    assert [shard.frontend for shard in shards] == [(f"tcp://127.0.0.1:{port}",) for port in (5555, 5557, 5559)]
    assert [shard.backend for shard in shards] == [(f"tcp://127.0.0.1:{port}",) for port in (5556, 5558, 5560)]
    assert [shard.name for shard in shards] == ["broker.0", "broker.1", "broker.2"]
    assert {shard.group for shard in shards} == {"5f1c"}


def test_every_endpoint_gets_a_place_of_its_own() -> None:
    shards = divided(
        2, frontend=("tcp://[::1]:7000", "ipc:///tmp/f"), backend=("ipc:///tmp/b", "tcp://localhost:8000")
    )
    assert shards[0].frontend == ("tcp://[::1]:7000", "ipc:///tmp/f")
    assert shards[1].frontend == ("tcp://[::1]:7002", "ipc:///tmp/f.1")
    assert shards[1].backend == ("ipc:///tmp/b.1", "tcp://localhost:8002")


def test_free_ports_are_chosen_once_for_all() -> None:
    asked: list[int] = []

    def ports(count: int) -> list[int]:
        asked.append(count)
        return list(range(6000, 6000 + count))

    frontend, backend = ("tcp://127.0.0.1:*", "tcp://127.0.0.1:6001"), ("tcp://127.0.0.1:0",)
    shards = divide(BrokerSettings(frontend=frontend, backend=backend), 2, "g", ports)
    assert len(asked) == 1
    assert [shard.frontend[1] for shard in shards] == ["tcp://127.0.0.1:6001", "tcp://127.0.0.1:6003"]
    chosen = [shard.frontend[0] for shard in shards] + [shard.backend[0] for shard in shards]
    assert set(chosen) == {f"tcp://127.0.0.1:{port}" for port in (6000, 6002, 6004, 6005)}


def test_no_free_ports_are_an_error_of_one_line() -> None:
    def none(count: int) -> list[int]:
        raise LocalClusterError(f"no {count} free TCP ports")

    with pytest.raises(EndpointError, match="free TCP ports"):
        divide(BrokerSettings(frontend=("tcp://127.0.0.1:*",)), 2, "g", none)


def test_what_else_was_said_counts_for_each() -> None:
    weights = {"batch": 0.5}
    for shard in divided(2, policy="lottery", client_weights=weights, max_waiting=7, grace_s=3.0):
        assert (shard.policy, shard.client_weights, shard.max_waiting, shard.grace_s) == ("lottery", weights, 7, 3.0)


def test_each_has_a_name_of_its_own_for_the_brokers_above() -> None:
    shards = divided(3, name="site", uplinks=("tcp://10.0.0.1:5556",))
    assert {shard.uplinks for shard in shards} == {("tcp://10.0.0.1:5556",)}
    assert len({shard.name for shard in shards}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"frontend": ("tcp://127.0.0.1:7000",), "backend": ("tcp://127.0.0.1:7002",)},
            r"tcp://127.0.0.1:7002 would be both the backend of broker.0 and the frontend of broker.1",
        ),
        (
            {"frontend": ("tcp://127.0.0.1:7000", "tcp://127.0.0.1:7002")},
            r"tcp://127.0.0.1:7002 would be both the frontend of broker.0 and the frontend of broker.1",
        ),
        ({"frontend": ("ipc:///tmp/a", "ipc:///tmp/a.1")}, r"ipc:///tmp/a.1 would be both"),
        ({"backend": ("tcp://127.0.0.1:65534",)}, "shard 1 has no port beside tcp://127.0.0.1:65534: 65536"),
        ({"backend": ("ipc://*",)}, "name one"),
        ({"name": "n" * 256}, "1 to 256 printable characters"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divided(2, **settings)


@given(
    bases=st.lists(st.integers(1, 65535), min_size=2, max_size=4),
    count=st.integers(2, 20),
)
def test_no_two_brokers_listen_in_one_place(bases: list[int], count: int) -> None:
    frontend, *backend = (f"tcp://127.0.0.1:{port}" for port in bases)
    try:
        shards = divided(count, frontend=(frontend,), backend=tuple(backend))
    except EndpointError:
        wanted = [base + 2 * number for base in bases for number in range(count)]
        assert len(set(wanted)) < len(wanted) or max(wanted) > 65535
    else:
        used = [endpoint for shard in shards for endpoint in (*shard.frontend, *shard.backend)]
        assert len(set(used)) == len(bases) * count


def test_addresses_can_be_pasted_on_other_machines_too() -> None:
    here = socket.gethostname()
    assert _options(["tcp://*:1", "tcp://[::]:2"]) == f"--broker tcp://{here}:1 --broker tcp://{here}:2"
    assert _options(["tcp://10.0.0.7:1", "ipc:///tmp/f"]) == "--broker tcp://10.0.0.7:1 --broker ipc:///tmp/f"


def parsed(line: list[str]) -> dict[str, Any]:
    return broker.main.make_context("zmq-broker", list(line)).params


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--frontend", "tcp://127.0.0.1:1", "--frontend", "ipc:///tmp/a b", "--insecure"],
        ["--client-weight", "a=2", "--client-weight", "-b=0.5", "--name", "--odd", "--grace", "0.25"],
        ["--shards", "4", "--log-format", "json", "--uplink", "tcp://10.0.0.1:5556", "--policy", "lottery"],
    ],
)
def test_a_command_line_says_again_what_was_said(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    values = parsed(line)
    again = arguments(broker.main, values)
    assert parsed(again) == values
    monkeypatch.setenv("TOKENMQ_BROKER_FRONTEND", "tcp://127.0.0.1:7 tcp://127.0.0.1:8")
    monkeypatch.setenv("TOKENMQ_BROKER_SHARDS", "9")
    assert parsed(again) == values, "the environment changes nothing about it"


def test_what_a_process_is_told_of_its_own_takes_the_place_of_what_was_given() -> None:
    values = parsed(["--frontend", "tcp://127.0.0.1:1", "--shards", "2"])
    told = arguments(broker.main, {**values, "frontend": ("tcp://127.0.0.1:3",), "shards": 1, "supervised": True})
    assert parsed(told) == {**values, "frontend": ("tcp://127.0.0.1:3",), "shards": 1, "supervised": True}


def test_the_options_of_processes_are_not_shown() -> None:
    shown = broker.main.get_help(click.Context(broker.main, info_name="zmq-broker"))
    assert "--shards" in shown
    assert "--supervised" not in shown
