"""What a client can be told, with its defaults: one object for library, command and documentation."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..protocol import limits
from ..protocol.codec import encode
from ..protocol.credit import WINDOW_TOKENS
from ..protocol.errors import BadRequestError, ProtocolError
from ..protocol.messages import Hello
from ..protocol.version import SOFTWARE
from ..transport.endpoints import DEFAULT_FRONTEND, check_destination

#: How long a request waits for a broker before it fails: a broker's restart fits in, a person's patience ends.
CONNECT_TIMEOUT_S = 5.0
#: A management answer takes a broker a millisecond; one that needs seconds is not coming.
QUERY_TIMEOUT_S = 5.0


def _default_name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"[: limits.MAX_NAME_CHARS]


def _seconds(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= limits.MAX_SECONDS:
        raise BadRequestError(f"{name}: expected seconds, more than 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a client behaves.

    Attributes:
        endpoints: the brokers' frontends, tried in this order and then from the first again.
        connect_timeout_s: how long a request waits for an open session before it fails with NoBrokerError.
        query_timeout_s: how long the broker may take for the answer to a query.
        window_tokens: tokens of one stream that may be under way or unread.
        name: how the broker names this client to people; host and process id by default.
        heartbeat_s: the heartbeat interval to ask the broker for; None for the broker's own.
    """

    endpoints: tuple[str, ...] = (DEFAULT_FRONTEND,)
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    query_timeout_s: float = QUERY_TIMEOUT_S
    window_tokens: int = WINDOW_TOKENS
    name: str = field(default_factory=_default_name)
    heartbeat_s: float | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            BadRequestError: one of them is not valid; the message names it.
            EndpointError: an endpoint is not valid.
        """
        if not self.endpoints:
            raise BadRequestError("endpoints: at least one is needed")
        for endpoint in self.endpoints:
            check_destination(endpoint)
        _seconds("connect_timeout_s", self.connect_timeout_s)
        _seconds("query_timeout_s", self.query_timeout_s)
        if self.heartbeat_s is not None:
            _seconds("heartbeat_s", self.heartbeat_s)
        if type(self.window_tokens) is not int or not 1 <= self.window_tokens <= limits.MAX_COUNT:
            raise BadRequestError(f"window_tokens: expected a positive integer, got {self.window_tokens!r}")
        if not isinstance(self.name, str) or len(self.name) > limits.MAX_NAME_CHARS:
            raise BadRequestError(f"name: expected a string of at most {limits.MAX_NAME_CHARS} characters")
        try:
            encode(self.hello())
        except ProtocolError as error:
            raise BadRequestError(f"name: {error.message}") from error

    def hello(self) -> Hello:
        """Return the HELLO that opens a session."""
        heartbeat_s = None if self.heartbeat_s is None else max(0.001, float(self.heartbeat_s))
        return Hello(client=self.name, software=SOFTWARE, heartbeat_s=heartbeat_s)


def settings_from(
    endpoints: str | Sequence[str] | None,
    *,
    connect_timeout_s: float,
    query_timeout_s: float,
    window_tokens: int,
    name: str | None,
    heartbeat_s: float | None,
) -> Settings:
    """Return the settings that the arguments of a client stand for; None means the default.

    Raises:
        BadRequestError: a value is not valid; the message names it.
        EndpointError: an endpoint is not valid.
    """
    if endpoints is None:
        endpoints = DEFAULT_FRONTEND
    return Settings(
        endpoints=(endpoints,) if isinstance(endpoints, str) else tuple(endpoints),
        connect_timeout_s=connect_timeout_s,
        query_timeout_s=query_timeout_s,
        window_tokens=window_tokens,
        name=_default_name() if name is None else name,
        heartbeat_s=heartbeat_s,
    )
