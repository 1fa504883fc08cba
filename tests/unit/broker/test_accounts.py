"""What happens to who asks for more than he may: refusals, the end of the session, and time outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tokenmq.broker.accounts import FORGET_S, MAX_PENALTY_S, Accounts, ClientAccount
from tokenmq.broker.events import BadClient, BadWorker, FromClient, FromWorker
from tokenmq.broker.limits import Limits
from tokenmq.broker.registry import READY_BURST
from tokenmq.protocol.codec import encode
from tokenmq.protocol.errors import ErrorCode, ProtocolError
from tokenmq.protocol.identity import Allowed, Identity, Role
from tokenmq.protocol.messages import (
    Chunk,
    Chunks,
    Disconnect,
    DisconnectCode,
    Error,
    FinishReason,
    Heartbeat,
    Hello,
    ModelInfo,
    Query,
    Welcome,
)

from .stage import ClientPeer, Said, Stage, kinds, request_id

ANN = Identity(Role.CLIENT, "ann", "A" * 40)


def make(stages: Callable[..., Stage], **limits: Any) -> Stage:
    return stages(limits=Limits(**limits))


def refused(said: list[Said]) -> Error:
    [(_, message)] = said
    assert isinstance(message, Error)
    assert message.code == ErrorCode.RATE_LIMITED.value
    assert message.retryable
    assert message.retry_after_s is not None
    assert message.retry_after_s > 0
    return message


def cut_off(said: list[Said]) -> Disconnect:
    message = said[0][1]
    assert isinstance(message, Disconnect)
    assert message.code is DisconnectCode.RATE_LIMITED
    return message


def test_requests_beyond_the_rate_are_refused_and_told_when_to_come_back(stages: Callable[..., Stage]) -> None:
    stage = make(stages, requests_per_s=2)
    stage.worker("w1", slots=9)
    client = stage.client()
    assert [kinds(client.asks(number)) for number in (1, 2)] == [[("w1", "REQUEST")]] * 2
    answer = refused(client.asks(3))
    assert (answer.id, answer.attempt) == (request_id(3), 1)
    assert "more than 2 requests a second" in answer.message
    assert answer.retry_after_s is not None
    stage.passes(answer.retry_after_s)
    assert kinds(client.asks(3)) == [("w1", "REQUEST")]
    assert stage.core.counters.rate_limited == 1


def test_requests_and_bytes_that_are_open_are_bounded(stages: Callable[..., Stage]) -> None:
    stage = make(stages, open_requests=3, queued_bytes=100)
    client, other = stage.client("ann"), stage.client("bob")
    worker = stage.busy_worker("w1", client)
    account = stage.core.clients[client.peer].account
    assert client.asks(2, payload=b"x" * 90) == []
    refusal = refused(client.asks(3, payload=b"x" * 11))
    assert "more than 100 bytes of its requests wait already" in refusal.message
    assert client.asks(3, payload=b"x" * 10) == []
    assert (account.open, account.queued_bytes) == (3, 100)
    assert "more than 3 requests open at a time" in refused(client.asks(4, payload=b"")).message
    assert other.asks(5, payload=b"x" * 500) == [], "one alone always fits"
    worker.finishes(1)
    worker.finishes(5)  # it was Bob's turn first
    assert (account.open, account.queued_bytes) == (2, 10)
    client.cancels(2)
    assert account.open == 2, "its worker has not said that it has ended"
    client.cancels(3)
    assert (account.open, account.queued_bytes) == (1, 0)
    worker.finishes(2, reason=FinishReason.CANCELLED)
    assert account.open == 0
    client.asks(6)
    client.vanishes()
    assert (account.open, account.queued_bytes) == (0, 0)


def test_a_request_that_is_too_large_is_wrong_and_not_early(stages: Callable[..., Stage]) -> None:
    stage = make(stages, message_bytes=100, attachments=1)
    stage.worker("w1", slots=9)
    client = stage.client()
    for fields in ({"payload": b"x" * 101}, {"payload": b"", "attachments": (b"", b"")}):
        [(_, answer)] = client.asks(1, **fields)  # type: ignore[arg-type]
        assert isinstance(answer, Error)
        assert (answer.code, answer.retryable) == ("bad_request", False)
        assert "this broker takes at most" in answer.message
    assert kinds(client.asks(2, payload=b"x" * 60, attachments=(b"x" * 40,))) == [("w1", "REQUEST")]


def test_questions_are_bounded(stages: Callable[..., Stage]) -> None:
    stage = make(stages, queries_per_s=1)
    client = stage.client()
    answers = [client.says(Query(request_id(9), "models"))[0][1] for _ in range(6)]
    assert [answer.command.name for answer in answers] == ["REPLY"] * 5 + ["ERROR"]
    assert "more than 1 questions a second" in refused([("", answers[-1])]).message


def test_who_goes_on_after_refusals_loses_the_session(stages: Callable[..., Stage]) -> None:
    stage = make(stages, open_requests=1, refusals_per_s=1)
    stage.worker("w1", slots=9)
    client = stage.client()
    client.asks(1)
    for number in range(2, 12):
        refused(client.asks(number, payload=b""))
    said = client.asks(12, payload=b"")
    assert "it goes on after many refusals" in cut_off(said).message
    assert kinds(said)[1:] == [("w1", "CANCEL")]
    assert client.peer not in stage.core.clients
    assert stage.core.counters.cut_off == 1


def test_malformed_requests_are_refusals(stages: Callable[..., Stage]) -> None:
    stage = make(stages, refusals_per_s=1)
    client = stage.client()

    def garbles(size_bytes: int) -> list[Said]:
        error = ProtocolError("garbled", subject=request_id(1))
        return stage.happens(BadClient(client.peer, error, size_bytes))

    assert [kinds(garbles(0)) for _ in range(5)] == [[("ann", "ERROR bad_request")]] * 5
    garbles(4 * 256 * 1024)
    assert kinds(garbles(0)) == [("ann", "DISCONNECT rate_limited")], "what is large counts for more"


def test_messages_that_cannot_be_refused_end_the_session(stages: Callable[..., Stage]) -> None:
    stage = make(stages, messages_per_s=10)
    client = stage.client()
    for _ in range(10):
        assert client.grants(1, 5) == []
    assert "more than 10 messages a second" in cut_off(client.grants(1, 5)).message


@pytest.mark.parametrize("kind", ["messages", "chunks"])
def test_workers_are_bounded_too(stages: Callable[..., Stage], kind: str) -> None:
    stage = make(stages, worker_messages_per_s=10, stray_chunks_per_s=1)
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    for _ in range(10):
        if kind == "messages":
            assert worker.finishes(77) == []
        else:
            assert worker.says(Chunks(b"?" * 16, (Chunk(request_id(1), 1, 0, 0, (1,), "a"),))) == []
    last = worker.finishes(77) if kind == "messages" else worker.says(Chunks(b"?" * 16, ()))
    assert kinds(last) == [("w1", "DISCONNECT rate_limited"), ("ann", "ERROR worker_lost")]
    assert stage.core.counters.late_answers == (10 if kind == "messages" else 0)
    assert stage.core.counters.chunk_messages_dropped == (0 if kind == "messages" else 11)


# --- keys -----------------------------------------------------------------------------------------------------------


def keyed(stage: Stage, identity: Identity = ANN) -> tuple[ClientPeer, list[Said]]:
    client = stage.stranger_client(identity.name)
    client.said += 1
    return client, stage.happens(FromClient(client.peer, Hello("self", "test/1"), None, identity))


def test_connections_of_one_key_share_its_limits(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys", limits=Limits(open_requests=1, requests_per_s=3))
    worker = stage.stranger_worker("w1")
    stage.happens(FromWorker(worker.peer, worker.ready, None, Identity(Role.WORKER, "gpu", "G" * 40)))
    (first, _), (second, _) = keyed(stage), keyed(stage)
    assert kinds(first.asks(1)) == [("w1", "REQUEST")]
    assert "1 requests open" in refused(second.asks(2)).message
    first.vanishes()
    assert kinds(second.asks(2)) in ([], [("w1", "REQUEST")]), "what has gone is not open"
    assert stage.core.clients[second.peer].account.open == 1


def test_a_key_that_was_cut_off_stays_outside_for_a_while_longer_each_time(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys", limits=Limits(messages_per_s=1, penalty_s=10), heartbeat_s=1000.0, expiry_s=5000.0)
    for seconds in (10.0, 20.0, 40.0):
        client, said = keyed(stage)
        assert isinstance(said[0][1], Welcome)
        client.says(Heartbeat(client.said))
        cut_off(client.says(Heartbeat(client.said)))
        stage.now += seconds - 0.5
        assert "let in again in 0.5 s" in cut_off(keyed(stage)[1]).message
        stage.now += 1.0


def test_sessions_that_end_together_are_one_offence() -> None:
    accounts = Accounts(ClientAccount, Limits(penalty_s=10.0))
    for _ in range(9):
        accounts.punish(ANN, 0.0)
    assert accounts.outside_s(ANN, 0.0) == 10.0


def test_penalties_have_a_bound_and_are_forgotten() -> None:
    accounts = Accounts(ClientAccount, Limits(penalty_s=100.0))
    now = 0.0
    for expected in (100.0, 200.0, MAX_PENALTY_S, MAX_PENALTY_S):
        accounts.punish(ANN, now)
        assert accounts.outside_s(ANN, now) == expected
        now += expected
        assert accounts.outside_s(ANN, now) == 0
    now += FORGET_S
    accounts.punish(ANN, now)
    assert accounts.outside_s(ANN, now) == 100.0
    accounts.keep(Allowed({}))
    assert accounts.outside_s(ANN, now) == 0
    accounts.punish(None, now)
    assert accounts.outside_s(None, now) == 0
    assert accounts.of(None) is not accounts.of(None)
    assert accounts.of(ANN) is accounts.of(ANN)


def test_no_penalty_lets_a_key_in_at_once() -> None:
    accounts = Accounts(ClientAccount, Limits(penalty_s=0))
    accounts.punish(ANN, 0.0)
    assert accounts.outside_s(ANN, 0.0) == 0


def test_a_key_that_brings_garbage_again_and_again_stays_outside(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys")
    for _ in range(100):
        client, said = keyed(stage)
        if not isinstance(said[0][1], Welcome):
            break
        codes = kinds(client.garbles())
        assert codes in ([("ann", "DISCONNECT protocol")], [("ann", "DISCONNECT rate_limited")])
    assert "let in again in" in cut_off(said).message
    assert stage.core.counters.cut_off == 1


def test_messages_that_keep_all_waiting_count_for_more(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys")
    heard = []
    for _ in range(3):
        client, _ = keyed(stage)
        heard += kinds(stage.happens(BadClient(client.peer, ProtocolError("too many frames"), 1 << 40)))
    assert heard == [("ann", "DISCONNECT protocol")] * 2 + [("ann", "DISCONNECT rate_limited")]
    assert "let in again in" in cut_off(keyed(stage)[1]).message
    stage.passes(30.0)
    assert kinds(keyed(stage)[1]) == [("ann", "WELCOME")]


def test_a_key_that_begins_session_after_session_has_to_wait(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys", limits=Limits(connections_per_peer=0))
    welcomed = 0
    while isinstance((said := keyed(stage)[1])[0][1], Welcome):
        welcomed += 1
    assert welcomed == 8192
    assert "begins too many sessions: try again in" in cut_off(said).message
    stage.now += 1.0
    assert isinstance(keyed(stage)[1][0][1], Welcome)


def test_workers_with_one_key_tell_of_so_many_models(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys")
    identity = Identity(Role.WORKER, "gpu", "G" * 40)
    models = tuple(ModelInfo(f"m{number}") for number in range(1000))
    said: list[Said] = []
    for number in range(201):
        worker = stage.stranger_worker(f"w{number}")
        said = stage.happens(FromWorker(worker.peer, replace(worker.ready, models=models), None, identity))
    assert "try again in" in cut_off(said).message
    assert len(stage.core.registry) == 200


def test_a_key_has_so_many_sessions(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys", limits=Limits(connections_per_peer=2))
    first, _ = keyed(stage)
    keyed(stage)
    assert "too many connections with this key: at most 2" in cut_off(keyed(stage)[1]).message
    first.vanishes()
    assert kinds(keyed(stage)[1]) == [("ann", "WELCOME")]


def test_of_many_sessions_with_one_key_only_the_one_that_goes_on_is_cut(stages: Callable[..., Stage]) -> None:
    stage = stages(curve="keys", limits=Limits(open_requests=1, refusals_per_s=1))
    worker = stage.stranger_worker("w1")
    stage.happens(FromWorker(worker.peer, worker.ready, None, Identity(Role.WORKER, "gpu", "G" * 40)))
    clients = [keyed(stage)[0] for _ in range(20)]
    clients[0].asks(1)
    for number, client in enumerate(clients):
        refused(client.asks(100 + number, payload=b""))
    assert stage.core.counters.cut_off == 0


def test_chunks_for_a_client_that_has_just_gone_are_honest(stages: Callable[..., Stage]) -> None:
    stage = make(stages, stray_chunks_per_s=1)
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    [route] = stage.core.registry.by_name["w1"].routes
    client.vanishes()
    for _ in range(100):
        assert stage.core.route_chunks(worker.peer, route, stage.now) is None
        assert worker.says(Chunks(route, (Chunk(request_id(1), 1, 0, 0, (1,), "a"),))) == []
    assert stage.core.counters.chunk_messages_dropped == 100


def test_credit_that_says_nothing_new_ends_at_the_broker(stages: Callable[..., Stage]) -> None:
    stage = stages()
    client = stage.client()
    stage.busy_worker("w1", client)
    assert client.grants(1, 8) == client.grants(1, 3) == []
    assert kinds(client.grants(1, 9)) == [("w1", "CREDIT")]
    assert client.grants(1, 9) == []


def test_what_a_worker_serves_is_not_read_again_and_again(stages: Callable[..., Stage]) -> None:
    stage = stages()
    worker = stage.worker("w1")
    ready = encode(replace(worker.ready, models=tuple(ModelInfo(f"model {number}") for number in range(1000))))[0]
    read = 0
    while not (why := stage.core.workers.too_much(worker.peer, ready, stage.now)):
        read += 1
    assert "READY of many models a second" in why
    assert read == READY_BURST
    assert stage.core.workers.too_much(worker.peer, encode(Heartbeat(1))[0], stage.now) == ""
    assert stage.core.workers.too_much(b"nobody", ready, stage.now) == ""
    said = stage.happens(BadWorker(worker.peer, ProtocolError(why), 1 << 40))
    assert kinds(said)[0] in (("w1", "DISCONNECT protocol"), ("w1", "DISCONNECT rate_limited"))
