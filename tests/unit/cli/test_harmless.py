"""What others write does not drive the terminal of who reads it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tokenmq.cli.lifecycle import fail
from tokenmq.cli.tables import table

ESCAPES = "a\x1b]0;title\x07b\x9bc\rd"
SHOWN = r"a\x1b]0;title\x07b\x9bc\rd"
PROGRAM = """
from tokenmq.cli.printing import print_stream
from tokenmq.protocol.messages import Chunk

class Stream:
    timings = None
    def __iter__(self):
        yield Chunk(b"i" * 16, 1, 0, 0, (1,), {text!r})

print_stream(Stream(), as_json=False)
"""


def printed(text: str, *, terminal: bool) -> str:
    """Return what a stream with this text looks like on a terminal, or in a pipe."""
    command = [sys.executable, "-c", PROGRAM.format(text=text)]
    if not terminal:
        return subprocess.run(command, capture_output=True, timeout=30, check=True).stdout.decode()
    ours, theirs = pty.openpty()
    try:
        subprocess.run(command, stdout=theirs, timeout=30, check=True)
        return os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_gets_no_escapes_of_a_models() -> None:
    assert printed(f"{ESCAPES}\n\te", terminal=True).replace("\r\n", "\n") == f"{SHOWN}\n\te\n"


def test_a_pipe_gets_the_text_as_it_is() -> None:
    assert printed(ESCAPES, terminal=False) == f"{ESCAPES}\n"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fail(f"{ESCAPES}\nerror: another one")
    assert capsys.readouterr().err == f"error: {SHOWN}\\nerror: another one\n"


def test_a_table_has_a_line_for_each_row() -> None:
    shown = table([{"name": "w\n1", "models": [ESCAPES, "m"]}], ("name", "models"))
    assert shown.splitlines()[1].split() == [r"w\n1", f"{SHOWN},m"]
