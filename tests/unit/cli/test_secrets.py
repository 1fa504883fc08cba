"""No secret is given on a command line, where all who can list processes would see it, and none is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest

from tokenmq.cli.broker import main as broker
from tokenmq.cli.client import main as client
from tokenmq.cli.worker import main as worker
from tokenmq.worker.engines.openai.link import Link

SECRET = "sk-0123456789abcdef"
#: Options whose names speak of secrets, and why they have none: a public key, the path of a file, a variable's name.
HARMLESS = {
    "server_key": "public",
    "uplink_server_key": "public",
    "key": "FILE",
    "uplink_key": "FILE",
    "api_key_env": "VARIABLE",
}


def options(command: click.Command) -> Iterator[click.Option]:
    yield from (one for one in command.params if isinstance(one, click.Option))
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from options(inner)


@pytest.mark.parametrize("command", [broker, worker, client], ids=["broker", "worker", "client"])
def test_no_option_takes_a_secret(command: click.Command) -> None:
    for option in options(command):
        name = option.name or ""
        if not name.endswith("_timeout") and re.search(
            r"(^|_)(key|secret|password|passwd|credential|token)(_|$)", name
        ):
            assert name in HARMLESS, f"{option.opts}: does it take a secret?"
            told = f"{option.help} {option.metavar}"
            assert HARMLESS[name] in told, told


def test_a_key_is_in_nothing_that_is_shown() -> None:
    link = Link("http://127.0.0.1:9/v1", SECRET, lambda _ticket, _event: None, lambda _why: None)
    assert SECRET not in repr(link)
    assert SECRET not in link.server
