"""What is worth a line in the log, as a value: the pure cores return it, the servers write it.

Much of what is logged was sent by others: names, reasons, errors. None of it may look like a line of its own, or
reach the terminal as a command: whatever has no shape of its own on paper is written as an escape.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TextIO

from .values import value


@value
class Log:
    """One event.

    Attributes:
        event: its name, words joined by underscores: `worker_registered`.
        fields: what belongs to it: plain values. No prompt and no text but where --log-prompts asks for it.
        request_id: the request that it is about.
        level: a level of the logging module.
    """

    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    request_id: bytes | None = None
    level: int = logging.INFO


# At run time only Python 3.11 and later know the parameter.
if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler


class EventHandler(_StreamHandler):
    """A handler that also takes events as they are: what becomes of each request is a line, and must cost little.

    Through a LogRecord an event takes 25 us, straight into its line 5.
    """

    def event(self, name: str, log: Log) -> None:
        """Write an event of the logger of this name."""
        raise NotImplementedError


def write(logger: logging.Logger, log: Log) -> None:
    """Hand the event to a logger; the record's `tokenmq` attribute holds event, request id and fields.

    Where an EventHandler is all that would get the record, it gets the event instead.
    """
    if not logger.isEnabledFor(log.level):
        return
    handlers = logging.root.handlers
    if len(handlers) == 1 and isinstance(handlers[0], EventHandler) and _only_root_listens(logger):
        handlers[0].event(logger.name, log)
        return
    values = dict(log.fields)
    if log.request_id is not None:
        values = {"request": log.request_id.hex(), **values}
    line = " ".join([log.event, *(f"{name}={shown(value)}" for name, value in values.items())])
    logger.log(log.level, line, extra={"tokenmq": {"event": log.event, **values}})


def _only_root_listens(logger: logging.Logger) -> bool:
    """Tell whether no handler but the root's would get a record of this logger."""
    here: logging.Logger | None = logger
    while here is not None and here is not logging.root:
        if not here.propagate or any(type(handler) is not logging.NullHandler for handler in here.handlers):
            return False
        here = here.parent
    return True


def printable(text: str) -> str:
    """Return the text with escapes for its line ends, controls, marks of direction and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """Return a field's value as it stands in a line: floats short, in quotes what would not be read as one word."""
    kind = type(value)
    if kind is float:
        return f"{value:.6g}"
    return str(value) if kind is int else _quoted(str(value))


@lru_cache(1024)  # names of models, workers, clients, reasons: the same ones again and again
def _quoted(text: str) -> str:
    return repr(text) if not text or any(not c.isprintable() or c in ' "=' for c in text) else text
