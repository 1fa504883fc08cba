"""`--each`: one question or order for each of several brokers, and not only for the first that is there."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .asking import EXIT_INTERRUPTED
from .options import option


def each_broker(command: click.Command) -> click.Command:
    """Add --each to a command with --broker; it goes on where a broker does not answer, and exits with its code."""
    ask = command.callback
    assert ask is not None, command.name

    def run(*, each: bool, broker: tuple[str, ...], **values: Any) -> None:
        if not each:
            ask(broker=broker, **values)
            return
        exit_code = 0
        for endpoint in broker or click.get_current_context().obj["endpoints"]:
            # Whose the following lines are.
            click.echo(json.dumps({"endpoint": endpoint}) if values["as_json"] else f"{endpoint}:")
            try:
                ask(broker=(endpoint,), **values)
            except SystemExit as end:
                if end.code == EXIT_INTERRUPTED:
                    raise
                exit_code = 1
        sys.exit(exit_code)

    command.callback = run
    return option(
        "--each", is_flag=True, show_envvar=False,
        help="Ask each of the given brokers, such as the shards of one, and not only the first that is there.",
    )(command)  # fmt: skip
