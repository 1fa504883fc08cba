"""How log events look: one line each, on standard error, for people (`text`) or for machines (`json`)."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from ..protocol.log import EventHandler, Log, printable, shown

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_LEVEL_NAMES = {getattr(logging, level.upper()): level for level in LEVELS}


def configure(log_format: str, level: str, **fields: Any) -> None:
    """Send the log of tokenmq, and warnings of everything else, to standard error in this form.

    Args:
        log_format: one of FORMATS.
        level: one of LEVELS.
        fields: what every line tells, such as whose it is where several processes write to one place.
    """
    handler = _Lines(log_format == "json", fields)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tokenmq").setLevel(level.upper())
    logging.captureWarnings(True)


def _dumped(values: Mapping[str, Any]) -> str:
    """Return a JSON object on one line; what is not printable is escaped, also beyond what JSON asks for."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _time(record: logging.LogRecord) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{stamp}.{int(record.msecs):03d}Z"


class _Lines(EventHandler):
    """Events, and records of other libraries, as lines on standard error."""

    def __init__(self, as_json: bool, fields: Mapping[str, Any]) -> None:
        super().__init__(sys.stderr)
        self.setFormatter((_Json if as_json else _Text)(fields))
        self._as_json = as_json
        self._fields = fields
        self._second = 0
        self._stamp = ""

    def event(self, name: str, log: Log) -> None:
        """Write an event, in one call, so that lines of several threads do not mix."""
        name, level = name.removeprefix("tokenmq."), _LEVEL_NAMES[log.level]
        try:
            self.stream.write(self._json(name, level, log) if self._as_json else self._text(name, level, log))
            self.stream.flush()
        except Exception:  # noqa: BLE001 (as in logging itself: a log that cannot be written ends nobody)
            self.handleError(logging.LogRecord(name, log.level, "", 0, log.event, None, None))

    def _text(self, name: str, level: str, log: Log) -> str:
        line = f"{self._time()} {level} {name} {log.event}"
        if log.request_id is not None:
            line += f" request={log.request_id.hex()}"
        for field, value in log.fields.items():
            line += f" {field}={shown(value)}"
        for field, value in self._fields.items():
            if field not in log.fields:
                line += f" {field}={shown(value)}"
        return line + "\n"

    def _json(self, name: str, level: str, log: Log) -> str:
        values: dict[str, Any] = {"time": self._time(), "level": level, "logger": f"tokenmq.{name}"}
        values["event"] = log.event
        if log.request_id is not None:
            values["request"] = log.request_id.hex()
        values.update(log.fields)
        values.update((field, value) for field, value in self._fields.items() if field not in log.fields)
        return _dumped(values) + "\n"

    def _time(self) -> str:
        """Return the time as in `_time`; its date is made once a second."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second, self._stamp = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp}.{int((now - second) * 1000):03d}Z"


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
        message = printable(" ".join(record.getMessage().splitlines()))  # of other libraries: ours is so anyway
        line = f"{_time(record)} {record.levelname.lower()} {name} {message}"
        for field, value in self._missing(record).items():
            line += f" {field}={shown(value)}"
        if record.exc_info:
            # Indented: whatever its text has, no line of it can be taken for one of the log.
            told = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n  {printable(one)}" for one in told)
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
        return _dumped(values)
