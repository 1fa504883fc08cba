"""Where the commands begin: from here on Ctrl-C ends them without a traceback, also while they are only imported.

Python makes SIGINT a KeyboardInterrupt, which nobody would catch in the first tenths of a second, and which comes out
of native code that is just being loaded as any other error. So until a command is ready to do something better
about it, SIGINT ends the process as SIGTERM does. What comes before this module is Python's own start.
"""

import atexit
import gc
import sys

try:
    import signal  # with what it imports itself, the longest part of the way to `_end_at_interrupt`
except KeyboardInterrupt:
    sys.exit(130)


def broker() -> None:
    """Run zmq-broker."""
    _end_at_interrupt()
    from .broker import main

    main()


def worker() -> None:
    """Run zmq-worker."""
    _end_at_interrupt()
    from .worker import main

    main()


def client() -> None:
    """Run zmq-client."""
    _end_at_interrupt()
    # At its end Python looks for garbage in all that was imported: a tenth of a short command's time, for nothing.
    atexit.register(gc.freeze)
    from .client import main

    main()


def _end_at_interrupt() -> None:
    """Let SIGINT end the process; where it is ignored, as in background jobs of scripts, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
