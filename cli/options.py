"""Options that several commands share, and how every option looks: default, unit and environment variable shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..protocol.version import VERSION
from . import logs

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def settings(prefix: str) -> dict[str, Any]:
    """Return click's context settings for a command whose variables begin with `prefix`."""
    return {
        "auto_envvar_prefix": prefix,
        "show_default": True,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    }


def option(*names: str, **values: Any) -> Callable[[CommandT], CommandT]:
    """Return click's option decorator, with the environment variable shown in the help."""
    return click.option(*names, **{"show_envvar": True, **values})


def logging_options(command: CommandT) -> CommandT:
    """Add --log-format, --log-level and --version."""
    command = option("--log-format", type=click.Choice(logs.FORMATS), default="text", help="Form of the log lines.")(
        command
    )
    command = option(
        "--log-level", type=click.Choice(logs.LEVELS), default="info", help="Least important lines to log."
    )(command)
    return version_option(command)


def version_option(command: CommandT) -> CommandT:
    """Add --version."""
    return click.version_option(VERSION, "--version", message="%(prog)s %(version)s")(command)
