"""How log events look: one line each, on standard error, for people (`text`) or for machines (`json`)."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..protocol.log import shown

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def configure(log_format: str, level: str, **fields: Any) -> None:
    """Send the log of tokenmq, and warnings of everything else, to standard error in this form.

    Args:
        log_format: one of FORMATS.
        level: one of LEVELS.
        fields: what every line tells, such as whose it is where several processes write to one place.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((_Json if log_format == "json" else _Text)(fields))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tokenmq").setLevel(level.upper())
    logging.captureWarnings(True)


def _time(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"


class _WithFields(logging.Formatter):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = fields

    def _missing(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return those of the fields that the event does not have itself."""
        own = getattr(record, "tokenmq", None) or {}
        return {name: value for name, value in self._fields.items() if name not in own}


class _Text(_WithFields):
    """`2026-11-21T04:52:16.123Z info broker worker_registered worker=w1`."""

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("tokenmq.")
        message = " ".join(record.getMessage().splitlines())  # of other libraries: ours has one line anyway
        line = f"{_time(record)} {record.levelname.lower()} {name} {message}"
        for field, value in self._missing(record).items():
            line += f" {field}={shown(value)}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(_WithFields):
    """One JSON object: time, level, logger, event and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        fields = getattr(record, "tokenmq", None)
        values.update({"event": "message", "text": record.getMessage()} if fields is None else fields)
        values.update(self._missing(record))
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)
