"""Option values that are more than a word: JSON, from a file or as it stands, and a token's bias."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def json_value(kind: type[dict[str, Any]] | type[list[Any]]) -> Callable[[str], Any]:
    """Make an option's type: a JSON text, or the name of a file that holds one; gives a dict, or a list."""

    def convert(value: str) -> Any:
        text = value
        if not value.lstrip().startswith(("{", "[")):
            try:
                text = Path(value).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise click.BadParameter(f"{value!r} is neither JSON nor a file that can be read: {why}") from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise click.BadParameter(f"not valid JSON: {error}") from error
        if not isinstance(data, kind):
            expected = "an object, {...}" if kind is dict else "a list, [...]"
            raise click.BadParameter(f"expected JSON that is {expected}")
        return data

    return convert


def bias(value: str) -> tuple[int, float]:
    """Return the token id and the number of ID=BIAS; what these may be is the library's to say."""
    token, _, number = value.partition("=")
    try:
        return int(token), float(number)
    except ValueError:
        raise click.BadParameter(f"expected ID=BIAS, such as 50256=-5, got {value!r}") from None
