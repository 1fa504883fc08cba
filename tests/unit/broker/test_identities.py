"""Who is who at a broker with keys: roles, names, administrators, and keys that are taken off the list."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenmq.broker.events import FromClient, FromWorker
from tokenmq.protocol.errors import ErrorCode
from tokenmq.protocol.identity import Allowed, Identity, Role
from tokenmq.protocol.messages import Accepted, Cancel, Disconnect, DisconnectCode, Error, Hello, Welcome

from .stage import ClientPeer, Said, Stage, WorkerPeer, kinds, ready_of, worker_session

ANN = Identity(Role.CLIENT, "ann", "A" * 40)
BOB = Identity(Role.CLIENT, "bob", "B" * 40)
ROOT = Identity(Role.ADMIN, "root", "R" * 40)
GPU1 = Identity(Role.WORKER, "gpu1", "G" * 40)
GPU2 = Identity(Role.WORKER, "gpu2", "H" * 40)
ALL = (ANN, BOB, ROOT, GPU1, GPU2)


def allowed(*identities: Identity) -> Allowed:
    return Allowed({identity.key: identity for identity in identities})


@pytest.fixture
def stage(stages: Callable[..., Stage]) -> Stage:
    return stages(curve="keys")


def says_hello(stage: Stage, identity: Identity | None, name: str = "self") -> tuple[ClientPeer, list[Said]]:
    client = stage.stranger_client(name)
    client.said += 1
    return client, stage.happens(FromClient(client.peer, Hello(name, "test/1"), None, identity))


def says_ready(
    stage: Stage, identity: Identity | None, name: str = "w1", **fields: int
) -> tuple[WorkerPeer, list[Said]]:
    worker = stage.stranger_worker(name)
    worker.said += 1
    worker.ready = ready_of(name, **fields)
    return worker, stage.happens(FromWorker(worker.peer, worker.ready, None, identity))


def comes(stage: Stage, identity: Identity, name: str = "self") -> ClientPeer:
    client, said = says_hello(stage, identity, name)
    assert isinstance(said[0][1], Welcome)
    return client


def refusal(said: list[Said]) -> Disconnect:
    [(_, message)] = said
    assert isinstance(message, Disconnect)
    assert message.code is DisconnectCode.FORBIDDEN
    return message


@pytest.mark.parametrize("identity", [ANN, ROOT, GPU1, None])
def test_only_clients_and_admins_come_in_at_the_frontend(stage: Stage, identity: Identity | None) -> None:
    _, said = says_hello(stage, identity)
    if identity in (ANN, ROOT):
        assert isinstance(said[0][1], Welcome)
    else:
        found = "the key of a worker" if identity else "unknown or revoked"
        assert found in refusal(said).message
        assert "expected the key of a client or an admin" in refusal(said).message
    assert len(stage.core.clients) == (identity in (ANN, ROOT))


@pytest.mark.parametrize("identity", [ANN, ROOT, GPU1, None])
def test_only_workers_come_in_at_the_backend(stage: Stage, identity: Identity | None) -> None:
    _, said = says_ready(stage, identity)
    if identity is GPU1:
        assert isinstance(said[0][1], Accepted)
    else:
        assert "expected the key of a worker" in refusal(said).message
    assert len(stage.core.registry) == (identity is GPU1)


def test_a_session_is_called_what_its_key_is_called(stage: Stage) -> None:
    client = comes(stage, ANN, name="bob")
    session = stage.core.clients[client.peer]
    assert (session.name, session.share) == ("ann", "ann")
    says_ready(stage, GPU1)
    assert stage.logged("worker_registered")[0]["key"] == "gpu1"


def test_who_has_no_name_is_never_called_by_its_routing_id(stages: Callable[..., Stage]) -> None:
    stage = stages()
    client = stage.client("")
    share = stage.core.clients[client.peer].share
    assert share == "#1"
    assert client.peer.hex() not in share


def test_only_an_admin_may_change_things(stage: Stage) -> None:
    ann, root = comes(stage, ANN), comes(stage, ROOT)
    refused = ann.queries("set_policy", policy="lottery")
    assert isinstance(refused, Error)
    assert refused.code == ErrorCode.FORBIDDEN.value
    assert "--role admin" in refused.message
    assert stage.core.exchange.chooser.policy_name != "lottery"
    root.queries("set_policy", policy="lottery")
    assert stage.core.exchange.chooser.policy_name == "lottery"
    assert stage.logged("ordered") == [{"what": "set_policy", "by": "root", "policy": "lottery"}]
    assert isinstance(ann.queries("status"), dict)


def test_a_workers_name_is_its_keys(stage: Stage) -> None:
    says_ready(stage, GPU1)
    taken = refusal(says_ready(stage, GPU2, incarnation=2)[1])
    assert "the name w1 belongs to a worker with another key" in taken.message
    assert worker_session(stage, "w1").identity is GPU1
    # With the same key it is as ever: the later start counts.
    again, said = says_ready(stage, GPU1, incarnation=2)
    assert kinds(said) == [("w1", "DISCONNECT superseded"), ("w1", "ACCEPTED")]
    assert worker_session(stage, "w1").peer == again.peer


def test_a_revoked_key_ends_its_sessions_and_no_others(stage: Stage) -> None:
    ann, bob = comes(stage, ANN, "ann"), comes(stage, BOB, "bob")
    worker, _ = says_ready(stage, GPU1, slots=2)
    ann.asks(1)
    bob.asks(2)
    said = stage.tell(stage.core.allow(allowed(BOB, ROOT, GPU1, GPU2), stage.now))
    assert kinds(said) == [("ann", "DISCONNECT forbidden"), ("w1", "CANCEL")]
    assert isinstance(said[1][1], Cancel)
    assert stage.core.clients.keys() == {bob.peer}
    said = stage.tell(stage.core.allow(allowed(BOB, ROOT, GPU2), stage.now))
    assert kinds(said) == [("w1", "DISCONNECT forbidden"), ("bob", "ERROR worker_lost")]
    assert len(stage.core.registry) == 0
    assert worker.peer not in stage.core.registry.by_peer


def test_a_key_with_another_role_or_name_is_another_one(stage: Stage) -> None:
    ann, bob = comes(stage, ANN, "ann"), comes(stage, BOB, "bob")
    promoted = Identity(Role.ADMIN, ANN.name, ANN.key)
    renamed = Identity(Role.CLIENT, "robert", BOB.key)
    said = stage.tell(stage.core.allow(allowed(promoted, renamed), stage.now))
    assert kinds(said) == [("ann", "DISCONNECT forbidden"), ("bob", "DISCONNECT forbidden")]
    assert not stage.core.clients
    assert ann.peer != bob.peer


def test_nothing_happens_while_the_list_stays_as_it_is(stage: Stage) -> None:
    comes(stage, ANN)
    says_ready(stage, GPU1)
    assert stage.core.allow(allowed(*ALL), stage.now) == []
