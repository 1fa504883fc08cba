"""The processes of a worker with `--tensor-parallel` that have another one before them."""

from __future__ import annotations

import logging
import signal
from typing import Any, NoReturn

from ..protocol.log import Log, write
from ..worker.engines.base import EngineLoadError
from ..worker.events import EXIT_CANNOT_START, EXIT_FAILED
from ..worker.server import LOGGER
from .lifecycle import fail, leave


def follow(engine: Any) -> NoReturn:
    """Compute this process's part of a worker's model until rank 0 ends, then exit."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 drains, and needs this process until it has
    try:
        engine.follow()
    except EngineLoadError as error:
        fail(str(error), EXIT_CANNOT_START)
    except Exception as error:  # noqa: BLE001 (of torch and its backends, of many kinds)
        write(LOGGER, Log("follower_failed", {"error": str(error)}, level=logging.ERROR))
        leave(EXIT_FAILED)
    leave(0)
