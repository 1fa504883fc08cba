"""`zmq-broker --shards`: the command as several brokers, each a process with endpoints of its own."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NoReturn

import click
import zmq

from ..broker.settings import BrokerSettings
from ..client.local import LocalClusterError, free_ports
from ..protocol.log import Log, write
from ..transport.curves import curves
from ..transport.endpoints import EndpointError, check_endpoint
from ..transport.keyring import Keyring
from ..transport.sockets import router
from .processes import LOGGER, Supervisor, Team

#: A broker has a port for clients and one for workers, which stand side by side by default.
PORT_STEP = 2
_GROUP_BYTES = 8
#: Hosts of endpoints that stand for all addresses of the machine, where nobody can connect to.
_ANY_HOST = ("*", "0.0.0.0", "[::]")  # noqa: S104 (nothing is bound here)


def supervise(context: click.Context, settings: BrokerSettings, count: int) -> NoReturn:
    """Run `count` brokers of this command, and exit with their supervisor's code.

    Args:
        context: the command as it was called.
        settings: what that says about one broker.
        count: how many there are to be.

    Raises:
        ValueError: the brokers could not start so: better told once, here, than by each process.
    """
    shards = divide(settings, count, settings.group or secrets.token_hex(_GROUP_BYTES), free_ports)
    _try_to_listen(shards)
    if settings.curve:
        Keyring(settings.curve)
    curves(settings.uplink_server_keys, settings.uplink_key, settings.uplinks)
    teams = [_team(context, shard) for shard in shards]
    for frontends, backends in zip_longest(
        zip(*(shard.frontend for shard in shards), strict=True),
        zip(*(shard.backend for shard in shards), strict=True),
    ):
        told = {"clients": frontends, "workers": backends}
        write(LOGGER, Log("addresses", {whose: _options(which) for whose, which in told.items() if which}))
    raise SystemExit(Supervisor(teams, settings.grace_s, kind="shard").run())


def divide(
    settings: BrokerSettings, count: int, group: str, ports: Callable[[int], Sequence[int]]
) -> list[BrokerSettings]:
    """Return what each of several brokers is told.

    Args:
        settings: what the command says.
        count: how many brokers there are to be.
        group: what they have in common.
        ports: finds so many different free ports. Where the command leaves the choice to the system, each broker gets
            one here, so that it is the same when it is started again.

    Raises:
        EndpointError: two would listen in the same place, or one nowhere.
    """
    given = (*settings.frontend, *settings.backend)
    fixed = {_port(endpoint) + PORT_STEP * number for endpoint in given for number in range(count)}
    wanted = count * sum(_port(endpoint) == 0 for endpoint in given)
    try:
        free = iter([port for port in ports(wanted + len(fixed)) if port not in fixed] if wanted else [])
    except LocalClusterError as error:
        raise EndpointError(str(error)) from error
    shards = []
    for number in range(count):
        frontend, backend = (
            tuple(_endpoint(endpoint, number, free) for endpoint in side)
            for side in (settings.frontend, settings.backend)
        )
        name = f"{settings.name}.{number}"
        shards.append(replace(settings, name=name, frontend=frontend, backend=backend, group=group))
    _refuse_twice(shards)
    return shards


def _port(endpoint: str) -> int:
    """Return an endpoint's port, 0 for a free one and -1 where there is none."""
    scheme, _, rest = check_endpoint(endpoint).partition("://")
    port = rest.rpartition(":")[2]
    return -1 if scheme != "tcp" else 0 if port == "*" else int(port)


def _endpoint(endpoint: str, number: int, free: Iterator[int]) -> str:
    """Return where the broker of this number listens in the place of the command's endpoint."""
    port = _port(endpoint)
    if port < 0:
        if endpoint == "ipc://*":
            raise EndpointError("ipc://* is another path at each start: with --shards, name one")
        return f"{endpoint}.{number}" if number else endpoint
    chosen = port + PORT_STEP * number if port else next(free)
    if chosen > 65535:
        raise EndpointError(f"shard {number} has no port beside {endpoint}: {chosen} is more than 65535")
    return f"{endpoint.rpartition(':')[0]}:{chosen}"


def _refuse_twice(shards: Sequence[BrokerSettings]) -> None:
    """Raise EndpointError where two endpoints are the same."""
    seen: dict[str, str] = {}
    for shard in shards:
        for side, endpoints in (("frontend", shard.frontend), ("backend", shard.backend)):
            for endpoint in endpoints:
                whose = f"the {side} of {shard.name}"
                if endpoint in seen:
                    raise EndpointError(f"{endpoint} would be both {seen[endpoint]} and {whose}: give other ports")
                seen[endpoint] = whose


def _try_to_listen(shards: Sequence[BrokerSettings]) -> None:
    """Raise EndpointError where an endpoint cannot be bound; nothing is left open."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    # All at a time: names that differ may mean the same address.
    open_ones = []
    try:
        for shard in shards:
            open_ones.append(router(context, shard.frontend))
            open_ones.append(router(context, shard.backend))
    finally:
        context.destroy(linger=0)


def _team(context: click.Context, shard: BrokerSettings) -> Team:
    own = {
        "frontend": shard.frontend,
        "backend": shard.backend,
        "name": shard.name,
        "group": shard.group,
        "shards": 1,
        "supervised": True,
    }
    return Team(
        name=shard.name,
        command=(sys.executable, "-m", "tokenmq.cli.broker", *arguments(context.command, {**context.params, **own})),
        environments=[{}],
        shown={"frontend": ",".join(shard.frontend), "backend": ",".join(shard.backend)},
    )


def arguments(command: click.Command, values: Mapping[str, Any]) -> list[str]:
    """Return the command line that gives a command's options these values, whatever its environment says."""
    line = []
    for option in command.params:
        value = values.get(option.name or "")
        if not isinstance(option, click.Option) or value is None:
            continue
        name = max(option.opts, key=len)
        if option.is_flag:
            line += [name] * bool(value)
        else:
            line += [f"{name}={one}" for one in (value if option.multiple else (value,))]
    return line


def _options(endpoints: Sequence[str]) -> str:
    """Return the options that make a command connect to all of these."""
    return " ".join(f"--broker {_reachable(endpoint)}" for endpoint in endpoints)


def _reachable(endpoint: str) -> str:
    """Return an endpoint with the machine's name where it is bound to all of its addresses."""
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{socket.gethostname()}:{port}" if scheme == "tcp" and host in _ANY_HOST else endpoint
