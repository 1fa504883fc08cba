"""An engine in a real engine thread, and a server for it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tokenmq.protocol.messages import ModelInfo
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engine_thread import EngineThread
from tokenmq.worker.engines.base import Done, Failed, Job, Output, Tokens
from tokenmq.worker.engines.openai.engine import OpenAIEngine
from tokenmq.worker.events import CancelJob, Changed, EngineDied, EngineFailed, EngineLoaded, EngineOutputs, Submit

from .server import FakeServer

#: The longest that any wait lasts before it fails.
WAIT_S = 20.0


class Rig:
    """An engine in its thread, spoken to as the worker speaks to it."""

    def __init__(self, base_url: str, **options: Any) -> None:
        self.engine = OpenAIEngine(**{"name": "m", "model": "big", "base_url": base_url, **options})
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.changes: queue.SimpleQueue[Changed] = queue.SimpleQueue()
        self.thread = EngineThread(self.engine, self._deliver)
        self.outputs: dict[int, list[Output]] = {}
        self.thread.start()

    def _deliver(self, event: Any) -> None:
        (self.changes if isinstance(event, Changed) else self.events).put(event)

    def loaded(self) -> tuple[ModelInfo, ...]:
        """Wait until it is loaded, or the reason why not is raised."""
        event = self.events.get(timeout=WAIT_S)
        if isinstance(event, EngineDied):
            raise RuntimeError(event.message)
        assert isinstance(event, EngineLoaded)
        return event.models

    def submit(self, ticket: int = 1, *, attachments: tuple[bytes, ...] = (), **values: Any) -> None:
        names = Generation.__dataclass_fields__
        given = {name: values.pop(name) for name in list(values) if name in names}
        if not given.keys() & {"prompt", "token_ids", "messages", "texts"}:
            given["prompt"] = "The sea is"
        generation = Generation(sampling=Sampling(**values), **given)
        self.thread.post(Submit(Job(ticket, "m", generation, attachments)))

    def cancel(self, ticket: int) -> None:
        self.thread.post(CancelJob(ticket))

    def until(self, ticket: int, wanted: Callable[[Output], bool]) -> list[Output]:
        """Wait until an output of the ticket is as wanted; return all that it had so far."""
        mine = self.outputs.setdefault(ticket, [])
        while not any(map(wanted, mine)):
            event = self.events.get(timeout=WAIT_S)
            assert not isinstance(event, (EngineFailed, EngineDied)), event
            assert isinstance(event, EngineOutputs)
            for output in event.outputs:
                self.outputs.setdefault(output.ticket, []).append(output)
        return mine

    def run(self, ticket: int = 1, **values: Any) -> list[Output]:
        """Submit a job and return all that came of it."""
        self.submit(ticket, **values)
        return self.ended(ticket)

    def ended(self, ticket: int = 1) -> list[Output]:
        found = self.until(ticket, lambda output: isinstance(output, (Done, Failed)))
        assert isinstance(found[-1], (Done, Failed)), found
        brought = sum(len(output.token_ids) for output in found if isinstance(output, Tokens))
        if isinstance(found[-1], Done):
            assert found[-1].completion_tokens == brought, "a reader would take the stream for broken"
        return found


def text(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs if isinstance(output, Tokens))


def ids(outputs: list[Output]) -> list[int]:
    return [token for output in outputs if isinstance(output, Tokens) for token in output.token_ids]


def failure(outputs: list[Output]) -> Failed:
    assert isinstance(outputs[-1], Failed), outputs
    return outputs[-1]


def done(outputs: list[Output]) -> Done:
    assert isinstance(outputs[-1], Done), outputs
    return outputs[-1]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    made = FakeServer()
    yield made
    made.stop()


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(base_url: str, **options: Any) -> Rig:
        rigs.append(Rig(base_url, **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        assert rig.thread.stop(WAIT_S)


@pytest.fixture
def rig(server: FakeServer, make_rig: Callable[..., Rig]) -> Rig:
    """An engine that has found the server."""
    made = make_rig(server.url)
    made.loaded()
    return made
