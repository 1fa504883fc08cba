"""Option values that are more than a word: JSON, from a file or as it stands, and a token's bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


_OPENS = {dict: "{", list: "["}


class JsonValue(click.ParamType):
    """JSON, or the name of a file that holds it; gives plain data."""

    name = "json"

    def __init__(self, kind: type[Any]) -> None:
        """Take only `dict` or `list`."""
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the data; fail with what is wrong with it, and where it came from."""
        if isinstance(value, self._kind):
            return value
        where, text = "it", str(value)
        if not text.lstrip().startswith(("{", "[")):
            where = repr(text)
            try:
                text = Path(text).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                self.fail(f"{where} is neither JSON nor a file that can be read: {why}", param, ctx)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.fail(f"{where} is not valid JSON: {error}", param, ctx)
        if not isinstance(data, self._kind):
            self.fail(f"{where} must begin with {_OPENS[self._kind]}", param, ctx)
        return data


class Bias(click.ParamType):
    """ID=BIAS; gives (token id, number)."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Return the pair; what it may be is the library's to say."""
        if isinstance(value, tuple):
            return value
        token, _, bias = str(value).partition("=")
        try:
            return int(token), float(bias)
        except ValueError:
            self.fail(f"expected ID=BIAS, such as 50256=-5, got {value!r}", param, ctx)
