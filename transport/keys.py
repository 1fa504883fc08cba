"""CURVE keys in files: reading them, and refusing those that others can read (ZeroMQ RFC 26, CurveZMQ)."""

from __future__ import annotations

from dataclasses import dataclass, field


class KeyFileError(ValueError):
    """A key that cannot be used; the message names the file and says why, and never shows what is in it."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key pair; both are 40 characters of Z85.

    Attributes:
        public: the half that others know it by.
        secret: the half that nobody else may see.
    """

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Curve:
    """What a peer needs to connect to a server with CURVE.

    Attributes:
        pair: its own.
        server_key: the server's public key, as 40 characters of Z85.
    """

    pair: KeyPair
    server_key: str
