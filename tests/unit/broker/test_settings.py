"""Settings that make no sense are refused, with a message that says which and why."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tokenmq.broker.settings import BrokerSettings
from tokenmq.transport.endpoints import EndpointError


def test_the_defaults_are_valid_and_local() -> None:
    settings = BrokerSettings()
    assert settings.frontend == ("tcp://127.0.0.1:5555",)
    assert settings.backend == ("tcp://127.0.0.1:5556",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"policy": "fastest"},
            "unknown policy 'fastest'; known are least-tokens, lottery, power-of-two, prefix-aff",
        ),
        ({"heartbeat_s": 0.0}, "at least 0.01 s, got 0.0"),
        ({"heartbeat_s": math.nan}, "at least 0.01 s, got nan"),
        ({"heartbeat_s": 3.0}, r"expiry \(5.0 s\) must be at least twice the heartbeat interval \(3.0 s\)"),
        ({"heartbeat_s": math.inf, "expiry_s": math.inf}, "expiry must be at most"),
        ({"expiry_s": math.nan}, "expiry must be at most 86400 s, got nan"),
        ({"max_waiting": -1}, "must not be negative"),
        ({"grace_s": -0.1}, "must not be negative"),
        ({"grace_s": math.nan}, "must not be negative"),
        ({"pending_bytes": -1}, "pending bytes must not be negative, got -1"),
        ({"write_timeout_s": 0.0}, "write timeout must be more than 0 s, got 0.0"),
        ({"write_timeout_s": math.nan}, "write timeout must be more than 0 s, got nan"),
        ({"frontend": ()}, "at least one frontend"),
        ({"backend": ()}, "at least one frontend and one backend"),
        ({"name": ""}, "1 to 256 printable characters"),
        ({"name": "n" * 257}, "1 to 256 printable characters"),
        ({"name": "\udcff"}, "1 to 256 printable characters"),
        ({"group": "g" * 257}, "at most 256 characters, got 257"),
        ({"frontend": ("http://127.0.0.1:80",)}, "invalid endpoint 'http://127.0.0.1:80'"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BrokerSettings(**fields)


@pytest.mark.parametrize("endpoint", ["tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://[::]:5555", "tcp://eth0:5555"])
@pytest.mark.parametrize("side", ["frontend", "backend"])
def test_an_open_endpoint_needs_insecure(side: str, endpoint: str) -> None:
    with pytest.raises(EndpointError, match="can be reached from other machines by anyone"):
        BrokerSettings(**{side: (endpoint,)})  # type: ignore[arg-type]
    settings = BrokerSettings(**{side: (endpoint,)}, insecure=True)  # type: ignore[arg-type]
    assert endpoint in settings.frontend + settings.backend


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "tcp://[::1]:5555", "tcp://localhost:1", "ipc:///tmp/x"])
def test_a_local_endpoint_needs_nothing(endpoint: str) -> None:
    assert BrokerSettings(frontend=(endpoint,)).frontend == (endpoint,)
