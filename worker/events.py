"""What WorkerCore is told (events) and what it orders (actions), as values.

What concerns its sockets is in `protocol/links.py`. Times are seconds of one monotonic clock, the one of `handle` and
`tick`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import TypeAlias

from ..protocol.errors import ProtocolError
from ..protocol.links import LinkAction, LinkEvent
from ..protocol.log import Log
from ..protocol.messages import Message, ModelInfo
from ..protocol.values import value
from .engines.base import EngineStats, Job, Output
from .rates import Rates

# --- events ---------------------------------------------------------------------------------------------------------


@value
class EngineLoaded:
    """The engine serves these models now; loading took `seconds`."""

    models: tuple[ModelInfo, ...]
    seconds: float = 0.0


@value
class EngineOutputs:
    """What one step (or submit, or cancel) brought, or several in order; `stats` is the newest."""

    outputs: Sequence[Output]
    stats: EngineStats = field(default_factory=EngineStats)


@value
class EngineProgress:
    """How the engine is getting on; the caller tells it before each `tick`.

    Attributes:
        steps: steps that have ended since start.
        step_started: when the present step began; None between steps.
        rates: how quickly it works.
    """

    steps: int = 0
    step_started: float | None = None
    rates: Rates = field(default_factory=Rates)


@value
class EngineFailed:
    """A step raised and the engine was reset: the jobs with these tickets are lost. It takes new ones."""

    message: str
    tickets: frozenset[int]


@value
class EngineDied:
    """There is no engine: its model cannot be loaded, or it could not be reset. `message` tells a person why."""

    message: str


@value
class Changed:
    """From now on the worker serves these models, with these slots, at this speed; None for what stays as it is."""

    models: tuple[ModelInfo, ...] | None = None
    slots: int | None = None
    speed: float | None = None


@value
class Drain:
    """Finish what is held, then stop; after `grace_s` seconds (None: as in the settings) give the rest back.

    It comes from the worker's own side: no broker can take it back.
    """

    grace_s: float | None = None


@value
class Came:
    """A message, or what is none, came through the worker's own door by this connection."""

    peer: bytes
    message: Message | ProtocolError


@value
class Deaf:
    """This connection at the worker's own door has not taken a message: it is gone, or its client does not read."""

    peer: bytes
    gone: bool


#: How a worker's process ends when something broke while it ran. Starting it again helps as a rule.
EXIT_FAILED = 1
#: How it ends when it could not begin: wrong options (click's code is the same), or a model that does not load.
EXIT_CANNOT_START = 2

Event: TypeAlias = (
    LinkEvent
    | EngineLoaded
    | EngineOutputs
    | EngineProgress
    | EngineFailed
    | EngineDied
    | Changed
    | Drain
    | Came
    | Deaf
)

# --- actions --------------------------------------------------------------------------------------------------------


@value
class Submit:
    """Hand this job to the engine."""

    job: Job


@value
class CancelJob:
    """Have the engine end the job with this ticket."""

    ticket: int


@value
class Resize:
    """Have the engine run so many jobs at a time."""

    slots: int


@value
class Hand:
    """Send this message by this connection at the worker's own door; tell `Deaf` where it is not taken at once."""

    peer: bytes
    message: Message


@value
class Stop:
    """The worker is done: exit with this code."""

    exit_code: int
    reason: str


EngineAction: TypeAlias = Submit | CancelJob | Resize
Action: TypeAlias = LinkAction | EngineAction | Hand | Stop | Log
