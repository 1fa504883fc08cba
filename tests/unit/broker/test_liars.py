"""What workers say of themselves and their requests can be anything: what the broker makes of it is a message."""

from __future__ import annotations

import pytest

from tokenmq.broker.events import FromWorker, ToClient
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.limits import MAX_COUNT, MAX_SECONDS
from tokenmq.protocol.messages import (
    Considered,
    Envelope,
    Finish,
    FinishReason,
    Heartbeat,
    Load,
    Request,
    Started,
    Timings,
    Usage,
)

from .stage import Said, Stage, request_id


def passed_on(said: list[Said], kind: type) -> list[object]:
    """Return the messages of a kind, each as it arrives."""
    return [decode(encode(message)) for _, message in said if isinstance(message, kind)]


def test_a_time_that_cannot_be_longer_grows_no_longer() -> None:
    stage = Stage()
    client, worker = stage.client(), stage.worker(slots=1)
    client.asks(1)
    client.asks(2)
    stage.passes(0.5)
    worker.finishes(1)
    timings = Timings(MAX_SECONDS, MAX_SECONDS, MAX_SECONDS, MAX_SECONDS)
    said = worker.says(Finish(request_id(2), 1, FinishReason.STOP, Usage(), timings, "w1"))
    [finish] = passed_on(said, Finish)
    assert isinstance(finish, Finish)
    assert finish.timings.broker_queue_s == MAX_SECONDS


@pytest.mark.parametrize("speed", [1e-6, 1.0])
def test_a_load_that_cannot_be_is_told_as_the_greatest_that_can(speed: float) -> None:
    stage = Stage()
    client, worker = stage.client(), stage.worker(speed=speed)
    worker.says(Heartbeat(worker.said, Load(waiting=MAX_COUNT, held=MAX_COUNT, kv_use=1.0, step_age_s=MAX_SECONDS)))
    client.says(Request(request_id(1), Envelope("m", 1, 8, explain=True), b"p"))
    [finish] = passed_on(worker.finishes(1), Finish)
    assert isinstance(finish, Finish)
    [decision] = finish.timings.routing
    assert decision.considered == (Considered("w1", 0, 1, speed, 1e15),)


def test_a_broker_below_offers_clients_no_endpoint() -> None:
    stage = Stage()
    client = stage.client()
    below = stage.worker("west", brokers=("id of west",))
    client.asks(1)
    offer = Started(request_id(1), 1, "gpu", "tcp://10.0.0.1:22", b"k" * 16)
    actions = stage.core.handle(FromWorker(below.peer, offer), stage.now)
    assert actions == [ToClient(client.peer, Started(request_id(1), 1, "west/gpu"))]
