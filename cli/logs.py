"""How log events look: one line each, on standard error, for people (`text`) or for machines (`json`)."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def configure(log_format: str, level: str) -> None:
    """Send the log of tokenmq, and warnings of everything else, to standard error in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Text())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tokenmq").setLevel(level.upper())
    logging.captureWarnings(True)


def _time(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"


class _Text(logging.Formatter):
    """`2026-11-21T04:52:16.123Z info broker worker_registered worker=w1`."""

    def format(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix("tokenmq.")
        message = " ".join(record.getMessage().splitlines())  # of other libraries: ours has one line anyway
        line = f"{_time(record)} {record.levelname.lower()} {name} {message}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    """One JSON object: time, level, logger, event and the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name}
        fields = getattr(record, "tokenmq", None)
        values.update({"event": "message", "text": record.getMessage()} if fields is None else fields)
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=False, default=str)
