"""Who a peer is, as its key tells: a role and a name. Where there are no keys, nobody is anybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Role(str, Enum):
    """What the holder of a key may do; the keys of each role lie in the folder that is called so, in the plural."""

    #: Submit requests at a frontend, read their streams, ask read-only questions.
    CLIENT = "client"
    #: Register at a backend, and answer requests. Brokers with --uplink are workers of others.
    WORKER = "worker"
    #: All that a client may, and change things: drain and remove workers, set policies and speeds.
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Identity:
    """The holder of a key.

    Attributes:
        role: what it may do.
        name: what the operator calls it: the name of the key's file. It stands in logs, fairness and quotas.
        key: its public key, as 40 characters of Z85 (ZeroMQ RFC 32).
    """

    role: Role
    name: str
    key: str


@dataclass(frozen=True, slots=True)
class Allowed:
    """Whom a broker lets in: a state of its allow-lists.

    Attributes:
        by_key: all identities by their public key.
    """

    by_key: Mapping[str, Identity]

    def has(self, identity: Identity | None) -> bool:
        """Tell whether this is still who it was: the same key, under the same name and in the same role."""
        return identity is not None and self.by_key.get(identity.key) == identity
