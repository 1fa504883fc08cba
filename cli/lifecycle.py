"""Start and end of a long-running command: signals, exit codes, one line instead of a traceback."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from ..protocol.log import printable

EXIT_FAILED = 1


def fail(message: str, exit_code: int = EXIT_FAILED) -> NoReturn:
    """Print one line to standard error and exit with this code."""
    print(f"error: {printable(message)}", file=sys.stderr)  # others may have written it
    sys.exit(exit_code)


def leave(exit_code: int) -> NoReturn:
    """Exit at once and leave threads where they are.

    The interpreter's own end takes each thread down when it comes back from native code; where that was called from
    C++, as in torch, the process is aborted instead ("terminate called without an active exception").
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def allow_many_files() -> int:
    """Raise the limit of open files as far as this process may, and return it: each connection takes one.

    The usual limit of 1,024 is there for programs that use select(). A broker that reaches it takes no more
    connections, and libzmq tries to without a pause (4.3.5: 100 % of a core).
    """
    if sys.platform == "win32":
        return sys.maxsize  # no such limit
    import resource  # not there on Windows

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS takes no RLIM_INFINITY here
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return _files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def _files(limit: int) -> int:
    """Return a limit of open files; the system's word for none is less than any."""
    return sys.maxsize if limit < 0 else limit


def end_with_supervisor() -> None:
    """Exit at once when standard input ends: it is a pipe that the supervisor holds, so it has died.

    A thread that waits for it sees every way to die, on every system, and from the first moment on.
    """

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 1024):
                pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="tokenmq-lifeline", daemon=True).start()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGINT a KeyboardInterrupt within the block, where it would end the process (`start.py`)."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own end takes no KeyboardInterrupt, either


def on_signals(drain: Callable[[], None], *, supervised: bool = False) -> None:
    """Drain at the first SIGINT or SIGTERM, exit at once at the second.

    Args:
        drain: called once.
        supervised: the second one changes nothing. Service managers send SIGTERM to all processes of a service, so a
            worker gets it from there and from its supervisor; and that one kills where it is to end at once.
    """
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) == 1:
            drain()
        elif not supervised:
            os._exit(128 + number)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
