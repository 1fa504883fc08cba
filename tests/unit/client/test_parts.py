"""The small parts around the core: imports, settings, mailboxes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tokenmq.client.events import Ending
from tokenmq.client.mailbox import Mailbox
from tokenmq.client.settings import Settings
from tokenmq.client.sync import _BELL
from tokenmq.protocol.credit import ReceiveWindow
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.messages import FinishReason
from tokenmq.transport.endpoints import EndpointError

from .story import key, make_chunk


@pytest.mark.parametrize(
    ("blocked", "statement"),
    [
        ("zmq", "import tokenmq.client.core"),
        ("asyncio", "from tokenmq.client import Client"),
        ("torch", "from tokenmq.client import Client, AsyncClient"),
    ],
)
def test_imports_stay_light(blocked: str, statement: str) -> None:
    program = f"import sys; sys.modules[{blocked!r}] = None; {statement}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        {"endpoints": ()},
        {"connect_timeout_s": 0},
        {"query_timeout_s": float("nan")},
        {"heartbeat_s": -1.0},
        {"hedge_after_s": 0.0},
        {"window_tokens": 0},
        {"window_tokens": 1.5},
        {"name": "x" * 1000},
        {"name": "\ud800"},
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any]) -> None:
    with pytest.raises(BadRequestError, match=next(iter(arguments))):
        Settings(**arguments)


def test_a_wrong_endpoint_is_named() -> None:
    with pytest.raises(EndpointError, match="http://x"):
        Settings(endpoints=("http://x",))


def test_a_mailbox_gives_chunks_then_the_first_outcome() -> None:
    window = ReceiveWindow(2)
    mailbox = Mailbox(key(1), window, _BELL)
    assert mailbox.take() == (None, None)
    window.receive(1)
    mailbox.put(make_chunk(0))
    end = Ending(FinishReason.STOP)
    assert mailbox.end(end)
    assert not mailbox.end(Ending(FinishReason.LENGTH))
    mailbox.put(make_chunk(1))
    assert mailbox.take() == (make_chunk(0), None)
    assert mailbox.take() == (end, None)
    assert mailbox.take() == (end, None)


def test_a_mailbox_tells_when_to_grant_credit() -> None:
    window = ReceiveWindow(2)
    mailbox = Mailbox(key(1), window, _BELL)
    window.receive(1)
    mailbox.put(make_chunk(0))
    assert mailbox.take() == (make_chunk(0), 3)
