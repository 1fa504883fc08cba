"""Keys for chunks past the broker: who gets one, that both ends get the same, and that nobody else does."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.messages import Finish, Hello, Request, Started

from .stage import ClientPeer, Said, Stage, WorkerPeer, finish
from .tree import Tree

ENDPOINT = "tcp://10.0.0.7:6000"


def client_of(stage: Stage, name: str, *, direct: bool = True) -> ClientPeer:
    client = stage.stranger_client(name)
    client.says(Hello(name, "test/1", direct=direct))
    return client


def worker_of(stage: Stage, name: str = "w1", **fields: Any) -> WorkerPeer:
    return stage.worker(name, **{"direct": ENDPOINT, "slots": 8, **fields})


def told(said: list[Said]) -> tuple[Request, Started]:
    """Return what worker and client are told of a dispatch."""
    [request] = [message for _, message in said if isinstance(message, Request)]
    [started] = [message for _, message in said if isinstance(message, Started)]
    return request, started


def key_for(client: ClientPeer, number: int) -> bytes:
    request, started = told(client.asks(number))
    assert request.envelope.key is not None
    assert started.key == request.envelope.key
    assert started.direct == ENDPOINT
    return request.envelope.key


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_client_that_asks_and_a_worker_that_offers_get_the_same_key(stage: Stage) -> None:
    worker_of(stage)
    client = client_of(stage, "ann")
    assert key_for(client, 1) == key_for(client, 2)
    assert len(key_for(client, 3)) == 16


@pytest.mark.parametrize(("wants", "offers"), [(False, ENDPOINT), (True, ""), (False, "")])
def test_no_key_where_one_of_them_does_not_want_it(stage: Stage, wants: bool, offers: str) -> None:
    worker_of(stage, direct=offers)
    request, started = told(client_of(stage, "ann", direct=wants).asks(1))
    assert request.envelope.key is None
    assert (started.direct, started.key) == ("", None)


def test_keys_differ_between_clients_workers_sessions_and_brokers(stage: Stage) -> None:
    worker = worker_of(stage)
    keys = [key_for(client_of(stage, "ann"), 1), key_for(client_of(stage, "ann"), 2)]
    worker.vanishes()
    worker_of(stage, "w1")
    keys.append(key_for(client_of(stage, "ann"), 3))
    other = Stage()
    worker_of(other)
    keys.append(key_for(client_of(other, "ann"), 1))
    assert len(set(keys)) == 4


def test_a_client_cannot_bring_a_key_along(stage: Stage) -> None:
    """Else it could name another one's, and have chunks sent to a connection that is not its own."""
    worker_of(stage, direct="")
    client = client_of(stage, "ann")
    request, _ = told(client.asks(1))
    forged = Request(b"f" * 16, request.envelope.__class__("m", 1, 8, key=b"k" * 16), b"p")
    passed, _ = told(client.says(forged))
    assert passed.envelope.key is None


def test_nothing_else_changes_for_the_request(stage: Stage) -> None:
    worker = worker_of(stage)
    client = client_of(stage, "ann")
    key_for(client, 1)
    said = worker.says(finish(1))
    assert [(to, type(message)) for to, message in said] == [("ann", Finish)]


def test_no_keys_below_a_broker_above() -> None:
    tree = Tree()
    tree.broker("root")
    tree.broker("leaf", "root")
    worker = tree.worker("leaf", "gpu", direct=ENDPOINT)
    client = tree.client("root", direct=True)
    client.asks(1)
    assert worker.take(Request).envelope.key is None
    assert all((started.direct, started.key) == ("", None) for started in client.takes(Started))
