"""Networks that a user has named, and whether an endpoint that a message names is in one of them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from .endpoints import EndpointError, check_destination

_Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

#: In a list of networks: sockets of this machine's file system.
IPC = "ipc"


class NetworkError(ValueError):
    """What was given names no network; the message shows it."""


@dataclass(frozen=True, slots=True)
class Networks:
    """Places that endpoints may be in; none of them at first.

    Attributes:
        ranges: addresses.
        hosts: names of hosts, as endpoints must spell them: none is ever looked up to see where it leads.
        ipc: sockets of this machine's file system.
    """

    ranges: tuple[_Network, ...] = ()
    hosts: frozenset[str] = field(default_factory=frozenset)
    ipc: bool = False

    @classmethod
    def of(cls, names: Iterable[str]) -> Networks:
        """Return the networks that these names stand for.

        Args:
            names: each an address, a range (`10.0.0.0/8`, `fd00::/8`), the name of a host, or `ipc`.

        Raises:
            NetworkError: one of them is none of these.
        """
        ranges: list[_Network] = []
        hosts: set[str] = set()
        given = list(names)
        for name in given:
            if name == IPC:
                continue
            try:
                ranges.append(ipaddress.ip_network(name.strip("[]")))
            except ValueError as error:
                if not _is_host(name):
                    raise NetworkError(_complaint(name)) from error
                hosts.add(name.lower())
        return cls(tuple(ranges), frozenset(hosts), IPC in given)

    def has(self, endpoint: str) -> bool:
        """Tell whether an endpoint is one that can be connected to, and in one of these networks."""
        try:
            scheme, _, rest = check_destination(endpoint).partition("://")
        except EndpointError:
            return False
        if scheme == "ipc":
            return self.ipc
        host = rest.rpartition(":")[0].strip("[]").lower()
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host in self.hosts
        return any(address in network for network in self.ranges)


def _is_host(name: str) -> bool:
    """Tell whether this may be the name of a host, and is not an address or a range with a mistake in it."""
    labels = name.split(".")
    well_formed = all(label.replace("-", "a").replace("_", "a").isalnum() and label.isascii() for label in labels)
    return well_formed and not labels[-1].isdigit() and len(name) <= 255


def _complaint(name: str) -> str:
    expected = "expected a network such as 10.0.0.0/8, an address, a host's name, or ipc"
    try:
        wanted = ipaddress.ip_network(name, strict=False)
    except ValueError:
        return f"{name!r} is no network: {expected}"
    return f"{name!r} is no network, but an address in {wanted}: give one of them"
