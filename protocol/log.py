"""What is worth a line in the log, as a value: the pure cores return it, the servers write it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from .values import value


@value
class Log:
    """One event.

    Attributes:
        event: its name, words joined by underscores: `worker_registered`.
        fields: what belongs to it: plain values, never a prompt or a text.
        request_id: the request that it is about.
        level: a level of the logging module.
    """

    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    request_id: bytes | None = None
    level: int = logging.INFO


def write(logger: logging.Logger, log: Log) -> None:
    """Hand the event to a logger; the record's `tokenmq` attribute holds event, request id and fields."""
    if not logger.isEnabledFor(log.level):
        return
    values = dict(log.fields)
    if log.request_id is not None:
        values = {"request": log.request_id.hex(), **values}
    line = " ".join([log.event, *(f"{name}={shown(value)}" for name, value in values.items())])
    logger.log(log.level, line, extra={"tokenmq": {"event": log.event, **values}})


def shown(value: Any) -> str:
    """Return a field's value as it stands in a line: floats short, in quotes what would not be read as one word."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(not c.isprintable() or c in ' "=' for c in text) else text
