"""What WorkerCore is told (events) and what it orders (actions), as values.

What concerns its sockets is in `protocol/links.py`. Times are seconds of one monotonic clock, the one of `handle` and
`tick`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..protocol.links import LinkAction, LinkEvent
from ..protocol.log import Log
from ..protocol.messages import ModelInfo
from .engines.base import EngineStats, Job, Output
from .rates import Rates

# --- events ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineLoaded:
    """The engine serves these models now; loading took `seconds`."""

    models: tuple[ModelInfo, ...]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineOutputs:
    """What one step (or submit, or cancel) brought, or several in order; `stats` is the newest."""

    outputs: Sequence[Output]
    stats: EngineStats = field(default_factory=EngineStats)


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """A step raised and the engine was reset: the jobs with these tickets are lost. It takes new ones."""

    message: str
    tickets: frozenset[int]


@dataclass(frozen=True, slots=True)
class EngineDied:
    """There is no engine: its model cannot be loaded, or it could not be reset. `message` tells a person why."""

    message: str


@dataclass(frozen=True, slots=True)
class Changed:
    """From now on the worker serves these models, with these slots, at this speed; None for what stays as it is."""

    models: tuple[ModelInfo, ...] | None = None
    slots: int | None = None
    speed: float | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what is held, then stop; after `grace_s` seconds (None: as in the settings) give the rest back.

    It comes from the worker's own side: no broker can take it back.
    """

    grace_s: float | None = None


#: How a worker's process ends when something broke while it ran. Starting it again helps as a rule.
EXIT_FAILED = 1
#: How it ends when it could not begin: wrong options (click's code is the same), or a model that does not load.
EXIT_CANNOT_START = 2

Event: TypeAlias = (
    LinkEvent | EngineLoaded | EngineOutputs | EngineProgress | EngineFailed | EngineDied | Changed | Drain
)

# --- actions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """Hand this job to the engine."""

    job: Job


@dataclass(frozen=True, slots=True)
class CancelJob:
    """Have the engine end the job with this ticket."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Resize:
    """Have the engine run so many jobs at a time."""

    slots: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The worker is done: exit with this code."""

    exit_code: int
    reason: str


EngineAction: TypeAlias = Submit | CancelJob | Resize
Action: TypeAlias = LinkAction | EngineAction | Stop | Log
