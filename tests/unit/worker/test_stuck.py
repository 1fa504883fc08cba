"""WorkerCore with an engine whose step does not end: it ends itself, so that its supervisor starts it again."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.messages import Error, Heartbeat
from tokenmq.worker.events import EXIT_FAILED, Drain, EngineProgress, Stop


def lines(story: Any, event: str) -> list[Any]:
    return [log.fields for log in story.logs if log.event == event]


def stuck(say: Any, **values: Any) -> Any:
    """A worker with a request, in whose engine a step has just begun."""
    story = say.story(**values)
    story.start()
    story.join()
    story.loaded()
    story.take(say.request(1))
    story.tell(EngineProgress(5, story.now))
    return story


def test_a_step_that_never_ends_ends_the_worker_for_its_supervisor(say: Any) -> None:
    story = stuck(say, stall_after_s=2.0, restart_after_s=4.0)
    story.tick(2.0)
    assert story.core.next_deadline() <= story.now + 2.0
    assert not [order for order in story.tick(1.9) if isinstance(order, Stop)]
    orders = story.tick(0.1)
    assert [(error.id, error.retryable) for error in say.messages(orders, Error)] == [(say.id(1), True)]
    assert orders[-1] == Stop(EXIT_FAILED, "engine_stuck")
    assert lines(story, "engine_stuck") == [{"step_age_s": 4.0, "restart_after_s": 4.0}]


@pytest.mark.parametrize(
    ("values", "drains"), [({"restart_after_s": 0.0}, False), ({"restart_after_s": 4.0, "grace_s": 900.0}, True)]
)
def test_a_step_may_last_as_long_as_it_likes(say: Any, values: dict[str, float], drains: bool) -> None:
    story = stuck(say, stall_after_s=2.0, **values)
    if drains:
        story.tell(Drain())
    for _ in range(800):
        story.hear(Heartbeat(story.core._membership.sessions[say.broker].received))
        assert not [order for order in story.tick(1.0) if isinstance(order, Stop)]
