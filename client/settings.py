"""What a client can be told: one object for library, command and documentation."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..protocol import limits
from ..protocol.codec import encode
from ..protocol.credit import WINDOW_TOKENS
from ..protocol.errors import BadRequestError, ProtocolError
from ..protocol.messages import Hello
from ..protocol.version import SOFTWARE
from ..transport.curves import curves
from ..transport.endpoints import DEFAULT_FRONTEND, check_destination
from ..transport.keys import Curve, KeyFileError
from ..transport.networks import NetworkError, Networks
from .defaults import (
    CONNECT_TIMEOUT_S,
    FIRST_TOKEN_TIMEOUT_S,
    INTER_TOKEN_TIMEOUT_S,
    MAX_ATTEMPTS,
    QUERY_TIMEOUT_S,
    RECOVERY_TIMEOUT_S,
)


def _default_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"[: limits.MAX_NAME_CHARS]


def _seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= limits.MAX_SECONDS:
        raise BadRequestError(f"{name}: expected seconds, more than 0, got {value!r}")


def _integer(name: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise BadRequestError(f"{name}: expected an integer from 1 to {most}, got {value!r}")


_OPTIONAL_SECONDS = (
    "heartbeat_s", "queue_timeout_s", "first_token_timeout_s", "inter_token_timeout_s", "hedge_after_s",
)  # fmt: skip
#: Where the keys come from that the program does not give.
SERVER_KEY_VARIABLE = "TOKENMQ_CLIENT_SERVER_KEY"
KEY_VARIABLE = "TOKENMQ_CLIENT_KEY"
#: What an error about them begins with: the arguments' names.
KEYS_PREFIX = "server_key, key: "
#: Nobody counts further, and pauses double only so often.
_MOST_ATTEMPTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client behaves.

    Attributes:
        endpoints: the brokers' frontends. The client has a session with each of them; requests go to the first in
            this order that is there, or where that one shares its work with others of them, to one taken at random.
        connect_timeout_s: how long a new request waits for an open session before it fails with NoBrokerError.
        query_timeout_s: how long the broker may take for the answer to a query.
        window_tokens: tokens of one stream that may be under way or unread.
        name: how the broker names this client to people; host and process id by default.
        heartbeat_s: the heartbeat interval to ask the broker for; None for the broker's own.
        resume: whether a request whose attempt has failed is submitted again, with the tokens so far.
        max_attempts: how many attempts of a request may fail at workers.
        recovery_timeout_s: how long a request whose attempt has failed may be without a worker: with no broker, or
            refused by it again and again.
        queue_timeout_s: how long an attempt may wait at the broker for a worker; None for no bound.
        first_token_timeout_s: how long a worker that has the request may take for its first token; None for ever.
        inter_token_timeout_s: how long it may be silent after that while the reader wants more; None for ever.
        hedge_after_s: how long a worker may take for its first token before a second one is asked, too; the one that
            answers first goes on. None for no such hedging.
        direct: where workers may be whose chunks come from them, past the broker: ranges of addresses, hosts, `ipc`.
            No worker elsewhere is dialled; without any, none is.
        curves: the client's key pair and the broker's public key, for each endpoint in their order; empty where no
            keys are used.
    """

    endpoints: tuple[str, ...] = (DEFAULT_FRONTEND,)
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    query_timeout_s: float = QUERY_TIMEOUT_S
    window_tokens: int = WINDOW_TOKENS
    name: str = field(default_factory=_default_name)
    heartbeat_s: float | None = None
    resume: bool = True
    max_attempts: int = MAX_ATTEMPTS
    recovery_timeout_s: float = RECOVERY_TIMEOUT_S
    queue_timeout_s: float | None = None
    first_token_timeout_s: float | None = FIRST_TOKEN_TIMEOUT_S
    inter_token_timeout_s: float | None = INTER_TOKEN_TIMEOUT_S
    hedge_after_s: float | None = None
    direct: tuple[str, ...] = ()
    curves: tuple[Curve, ...] = ()

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            BadRequestError: one of them is not valid; the message names it.
            EndpointError: an endpoint is not valid.
        """
        if not self.endpoints:
            raise BadRequestError("endpoints: at least one is needed")
        for endpoint in self.endpoints:
            if not isinstance(endpoint, str):
                raise BadRequestError(f"endpoints: expected strings, got {endpoint!r:.80}")
            check_destination(endpoint)
        if len(set(self.endpoints)) < len(self.endpoints):
            raise BadRequestError("endpoints: each may stand there once")
        if len(self.curves) not in (0, len(self.endpoints)):
            raise BadRequestError(f"curves: expected none, or one for each of {len(self.endpoints)} endpoints")
        _seconds("connect_timeout_s", self.connect_timeout_s)
        _seconds("query_timeout_s", self.query_timeout_s)
        _seconds("recovery_timeout_s", self.recovery_timeout_s)
        for name in _OPTIONAL_SECONDS:
            if getattr(self, name) is not None:
                _seconds(name, getattr(self, name))
        if not isinstance(self.resume, bool):
            raise BadRequestError(f"resume: expected true or false, got {self.resume!r}")
        _integer("window_tokens", self.window_tokens, limits.MAX_NEW_TOKENS)
        _integer("max_attempts", self.max_attempts, _MOST_ATTEMPTS)
        if not all(isinstance(network, str) for network in self.direct):
            raise BadRequestError(f"direct: expected strings, got {list(self.direct)!r:.80}")
        try:
            Networks.of(self.direct)
        except NetworkError as error:
            raise BadRequestError(f"direct: {error}") from error
        if not isinstance(self.name, str) or len(self.name) > limits.MAX_NAME_CHARS:
            raise BadRequestError(f"name: expected a string of at most {limits.MAX_NAME_CHARS} characters")
        try:
            encode(self.hello())
        except ProtocolError as error:
            raise BadRequestError(f"name: {error.message}") from error

    def hello(self) -> Hello:
        """Return the HELLO that opens a session."""
        heartbeat_s = None if self.heartbeat_s is None else max(0.001, float(self.heartbeat_s))
        return Hello(client=self.name, software=SOFTWARE, heartbeat_s=heartbeat_s, direct=bool(self.direct))


def settings_from(
    endpoints: str | Sequence[str] | None,
    *,
    name: str | None,
    direct: str | Sequence[str] | None = None,
    server_key: str | Path | Sequence[str | Path] | None = None,
    key: str | Path | None = None,
    **settings: Any,
) -> Settings:
    """Return the settings that the arguments of a client stand for; None for one of these means the default.

    Raises:
        BadRequestError: a value is not valid; the message names it.
        EndpointError: an endpoint is not valid.
    """
    if endpoints is None:
        endpoints = DEFAULT_FRONTEND
    if not isinstance(endpoints, Iterable):
        raise BadRequestError(f"endpoints: expected a string or several, got {endpoints!r:.80}")
    if direct is None:
        direct = ()
    if not isinstance(direct, Iterable):
        raise BadRequestError(f"direct: expected a string or several, got {direct!r:.80}")
    endpoints = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    return Settings(
        endpoints=endpoints,
        curves=_curves(server_key, key, endpoints),
        name=_default_name() if name is None else name,
        direct=(direct,) if isinstance(direct, str) else tuple(direct),
        **settings,
    )


def _curves(
    server_key: str | Path | Sequence[str | Path] | None, key: str | Path | None, endpoints: Sequence[str]
) -> tuple[Curve, ...]:
    """Return the keys for each endpoint; what is None comes from the environment, and "" is nothing anyway."""
    if server_key is None:
        # Of several keys, as for an option that may be repeated. No key has a blank in it.
        server_key = os.environ.get(SERVER_KEY_VARIABLE, "").split()
    if key is None:
        key = os.environ.get(KEY_VARIABLE, "")
    given: Sequence[str | Path] = [server_key] if isinstance(server_key, (str, Path)) else server_key
    if not isinstance(key, (str, Path)) or not isinstance(given, Sequence):
        raise BadRequestError("server_key, key: expected strings or paths")
    if not all(isinstance(each, (str, Path)) for each in given):
        raise BadRequestError("server_key: expected a string or path, or several")
    try:
        return curves([str(each) for each in given if str(each)], str(key), endpoints)
    except KeyFileError as error:
        raise BadRequestError(f"{KEYS_PREFIX}{error}") from error
