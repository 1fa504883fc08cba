"""What all commands of zmq-client share: the client, its broker, and how they end when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..protocol.errors import TokenmqError
from ..transport.endpoints import EndpointError
from .lifecycle import fail, interruptible
from .options import option

if TYPE_CHECKING:
    from ..client import Client

EXIT_INTERRUPTED = 130


def broker_option(command: Any) -> Any:
    """Let --broker stand behind the command's name too, where people type it."""
    return option(
        "--broker", multiple=True, metavar="ENDPOINT", show_envvar=False, help="As before the command's name."
    )(command)


def json_option(command: Any) -> Any:
    """Add --json."""
    return option(
        "--json", "as_json", is_flag=True, envvar="TOKENMQ_CLIENT_JSON", help="Print JSON, one object a line."
    )(command)


@contextmanager
def connected(broker: tuple[str, ...], direct: tuple[str, ...] = ()) -> Iterator[Client]:
    """Give a client; end the command with one line on an error, after a cancel on Ctrl-C.

    Args:
        broker: endpoints in the place of those that the group of commands was given; none for these.
        direct: networks in which workers are dialled for their tokens.
    """
    # Here, since --help and a mistake in the options need nothing of it.
    from ..client import Client
    from ..client.settings import KEYS_PREFIX

    chosen: dict[str, Any] = dict(click.get_current_context().obj)
    if broker:
        chosen["server_key"] = _keys_of(broker, chosen["endpoints"], chosen["server_key"])
        chosen["endpoints"] = list(broker)
    if direct:
        chosen["direct"] = list(direct)
    try:
        with interruptible(), Client(**chosen) as client:
            yield client
    except TokenmqError as error:
        request = f" [request {error.request_id}]" if error.request_id else ""
        # A program is told which arguments of Client were wrong; here the options are named in the text.
        fail(f"{error.message.removeprefix(KEYS_PREFIX)} ({error.code}){request}")
    except EndpointError as error:
        fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone (head, less): no complaint, as other tools do
        sys.exit(1)
    except OSError as error:
        fail(f"cannot read or write: {error.strerror}")
    except UnicodeError as error:
        fail(f"cannot read or write: {error}")
    except KeyboardInterrupt:
        click.echo(err=True)  # what follows stands below the terminal's ^C; the output gets no line more
        sys.exit(EXIT_INTERRUPTED)


def _keys_of(broker: tuple[str, ...], endpoints: list[str], server_keys: list[str]) -> list[str]:
    """Return the server keys of some brokers, of those that the group of commands was given for others.

    With one key for each of these, a broker that is not among them has none that is known.
    """
    if len(server_keys) != len(endpoints) or len(server_keys) < 2:
        return server_keys
    known = dict(zip(endpoints, server_keys, strict=True))
    unknown = [endpoint for endpoint in broker if endpoint not in known]
    if unknown:
        fail(f"no --server-key is given for {unknown[0]}: name it with --broker before the command, in their order")
    return [known[endpoint] for endpoint in broker]
