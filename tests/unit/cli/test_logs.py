"""Lines of the log: events take a short way into them, and look as if they had taken the long one."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tokenmq.cli import logs
from tokenmq.protocol.log import EventHandler, Log, write

LOGGER = logging.getLogger("tokenmq.broker")
EVENTS = [
    Log("broker_stopped"),
    Log("request_finished", {"model": "m", "tokens": 3, "s": 0.123456789, "done": True}, bytes(range(16))),
    Log("worker_left", {"worker": 'w 1="x"', "why": "", "none": None, "text": "海\n\x07"}, level=logging.WARNING),
    Log("policy_failed", {"why": "x" * 300, "shard": "own"}, level=logging.ERROR),
]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    handlers, level, own = logging.root.handlers[:], logging.root.level, logging.getLogger("tokenmq").level
    yield
    logging.captureWarnings(False)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("tokenmq").setLevel(own)


def configured(log_format: str, level: str, **fields: Any) -> io.StringIO:
    """Configure the log, and return what it is written to."""
    logs.configure(log_format, level, **fields)
    (handler,) = logging.root.handlers
    assert isinstance(handler, EventHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    return stream


def lines(log_format: str, **fields: Any) -> tuple[list[str], list[str]]:
    """Return what events look like by the short way, and by the long one."""
    stderr = configured(log_format, "debug", **fields)
    for log in EVENTS:
        write(LOGGER, log)
    short = stderr.getvalue().splitlines()
    stderr.seek(0)
    stderr.truncate()
    logging.root.addHandler(logging.NullHandler())  # somebody else listens, too: no short way
    for log in EVENTS:
        write(LOGGER, log)
    return short, stderr.getvalue().splitlines()


@pytest.mark.parametrize("fields", [{}, {"worker": "w1", "shard": "b.1"}])
def test_text_is_the_same_by_both_ways(fields: dict[str, Any]) -> None:
    short, long = lines("text", **fields)
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
    assert len(short) == len(EVENTS)
    assert all(form.match(line) for line in [*short, *long])
    assert [form.sub("", line) for line in short] == [form.sub("", line) for line in long]
    assert f"request={bytes(range(16)).hex()} model=m tokens=3 s=0.123457 done=True" in short[1]


@pytest.mark.parametrize("fields", [{}, {"worker": "w1", "shard": "b.1"}])
def test_json_is_the_same_by_both_ways(fields: dict[str, Any]) -> None:
    short, long = ([json.loads(line) for line in each] for each in lines("json", **fields))
    assert len(short) == len(EVENTS)
    assert [{**line, "time": ""} for line in short] == [{**line, "time": ""} for line in long]
    assert all(re.fullmatch(r"[\dT:.-]+Z", line["time"]) for line in short)


def test_what_is_below_the_level_is_not_written() -> None:
    stderr = configured("text", "warning")
    for log in EVENTS:
        write(LOGGER, log)
    assert len(stderr.getvalue().splitlines()) == 2


def test_a_closed_pipe_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, _text: str) -> int:
            raise BrokenPipeError

    logs.configure("text", "info")
    (handler,) = logging.root.handlers
    assert isinstance(handler, EventHandler)
    handler.setStream(Closed())
    monkeypatch.setattr(logging, "raiseExceptions", False)
    write(LOGGER, EVENTS[0])


#: What somebody might call his worker, his model or his error, so that it looks like a line of the log, or clears the
#: screen of whoever reads it.
FORGED = [
    "w1\n2026-11-21T04:52:16.123Z info broker worker_registered worker=good",
    "w1\r\x1b[2J\x1b[1;1H",
    "w1\x9b2J\x07\x7f",
    "w1\u2028info\u2029\x85\x0b\x0c\x1c\x1e",
    "w1\u202egnp.exe\u2066\u200b",
    "w1 worker=good level=error",
    'w1", "event": "worker_registered", "x": "',
    "w1\ud800 \udfff",
]


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("forged", FORGED)
def test_what_others_send_stays_within_its_line(log_format: str, forged: str) -> None:
    stderr = configured(log_format, "debug", worker="own")
    event = Log("worker_left", {"name": forged, "names": [forged], "of": {"name": forged}}, b"\0" * 16)
    write(LOGGER, event)
    logging.getLogger("another.library").warning("it was %s", forged)
    logging.root.addHandler(logging.NullHandler())
    write(LOGGER, event)
    written = stderr.getvalue()
    written.encode()  # no lone surrogate, on which the stream would fail
    assert written.endswith("\n")
    each = written[:-1].split("\n")
    assert len(each) == 3
    assert all(line.isprintable() for line in each)
    for line in (each[0], each[2]):
        if log_format == "json":
            told = json.loads(line)
            assert (told["event"], told["name"], told["names"]) == ("worker_left", forged, [forged])
        else:
            assert " name='" in line or ' name="' in line or " name=w1" in line
            assert line.count(" worker=own") == 1
            assert not re.search(r" worker=good(?![^']*')", line)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_cannot_be_taken_for_other_lines(log_format: str) -> None:
    stderr = configured(log_format, "info")
    try:
        raise ValueError("bad\n2026-11-21T04:52:16.123Z info broker worker_registered worker=good\n\x1b[2J")
    except ValueError:
        LOGGER.exception("it failed")
    first, *others = stderr.getvalue()[:-1].split("\n")
    assert "it failed" in first
    assert all(line.isprintable() for line in (first, *others))
    assert all(line.startswith("  ") for line in others)
    assert bool(others) is (log_format == "text")
