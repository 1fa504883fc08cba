"""Endpoints as users type them: checked before libzmq sees them, and told apart by who can reach them."""

from __future__ import annotations

import ipaddress
import socket

DEFAULT_FRONTEND = "tcp://127.0.0.1:5555"
DEFAULT_BACKEND = "tcp://127.0.0.1:5556"
MAX_PORT = 65535
_EXPECTED = "expected tcp://HOST:PORT or ipc://PATH"


class EndpointError(ValueError):
    """An endpoint that cannot be used; the message names it and says why."""


def check_endpoint(endpoint: str) -> str:
    """Return the endpoint if it has a form that tokenmq uses.

    Raises:
        EndpointError: it has not.
    """
    scheme, separator, rest = endpoint.partition("://")
    if not separator or scheme not in ("tcp", "ipc") or not rest:
        raise EndpointError(f"invalid endpoint {endpoint!r}: {_EXPECTED}")
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        if not host or not (port == "*" or (port.isascii() and port.isdigit() and int(port) <= MAX_PORT)):
            raise EndpointError(f"invalid endpoint {endpoint!r}: {_EXPECTED}, PORT from 0 to 65535")
    return endpoint


def check_destination(endpoint: str) -> str:
    """Return the endpoint if a peer can connect to it: it names one host and one port.

    Raises:
        EndpointError: it does not, or has none of the forms that tokenmq uses.
    """
    scheme, _, rest = check_endpoint(endpoint).partition("://")
    host, _, port = rest.rpartition(":")
    if scheme == "tcp" and (host == "*" or port == "*" or int(port) == 0):
        raise EndpointError(f"cannot connect to {endpoint}: name the host and the port that the broker listens on")
    return endpoint


def check_offer(endpoint: str) -> str:
    """Return the endpoint if it can be bound, and told to others then.

    Raises:
        EndpointError: it names all interfaces, or a path that is another one elsewhere, or has none of the forms that
            tokenmq uses.
    """
    scheme, _, rest = check_endpoint(endpoint).partition("://")
    if scheme == "tcp" and _is_everywhere(rest.rpartition(":")[0].strip("[]")):
        raise EndpointError(f"{endpoint} stands for all interfaces: name the one address that clients can reach")
    if scheme == "ipc" and not rest.startswith(("/", "@")):
        raise EndpointError(f"{endpoint}: name the whole path, from / on, by which clients can reach it")
    return endpoint


def announced(endpoint: str, bound: str) -> str:
    """Return what others are told of an endpoint that was bound: the host as it was given, the port as bound.

    Args:
        endpoint: as given.
        bound: as libzmq says, which knows addresses and no names.
    """
    scheme, _, rest = endpoint.partition("://")
    host = rest.rpartition(":")[0]
    if scheme != "tcp" or host in {name for _, name in socket.if_nameindex()}:
        return bound  # the name of an interface means nothing to others
    return f"tcp://{host}:{bound.rpartition(':')[2]}"


def _is_everywhere(host: str) -> bool:
    if host == "*":
        return True
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_ipv6(endpoint: str) -> bool:
    """Tell whether the endpoint has an IPv6 address, which stands in brackets."""
    return endpoint.startswith("tcp://[")


def is_local(endpoint: str) -> bool:
    """Tell whether only this machine can reach a socket that is bound to the endpoint."""
    scheme, _, rest = check_endpoint(endpoint).partition("://")
    if scheme != "tcp":
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # "*", an interface's name, a host name: taken for open
