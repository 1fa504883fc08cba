"""Who has a session, how it begins, and how it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tokenmq.broker.events import ClientGone, WorkerGone
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunk,
    Chunks,
    Disconnect,
    DisconnectCode,
    Draining,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Welcome,
    WorkerState,
)

from .stage import Stage, finish, kinds, ready_of, request_id, worker_session


def test_a_client_is_welcomed_with_the_brokers_intervals(stage: Stage) -> None:
    client = stage.stranger_client("ann")
    assert client.says(Hello("ann", "test/1")) == [("ann", Welcome("broker", "test/1", 1.0, 5.0))]


def test_a_client_hears_which_group_the_broker_belongs_to(stages: Callable[..., Stage]) -> None:
    client = stages(group="5f1c").stranger_client("ann")
    assert client.says(Hello("ann", "test/1")) == [("ann", Welcome("broker", "test/1", 1.0, 5.0, "5f1c"))]


def test_a_worker_is_accepted_and_may_wish_for_a_slower_heartbeat(stage: Stage) -> None:
    worker = stage.stranger_worker("w1")
    assert worker.says(ready_of("w1", heartbeat_s=4.0)) == [("w1", Accepted("broker", "test/1", 4.0, 20.0))]
    hasty = stage.stranger_worker("w2")
    assert hasty.says(ready_of("w2", heartbeat_s=0.1)) == [("w2", Accepted("broker", "test/1", 1.0, 5.0))]


def test_strangers_are_sent_to_register_first(stage: Stage) -> None:
    assert kinds(stage.stranger_client().asks(1)) == [("stranger", "DISCONNECT unknown_peer")]
    assert kinds(stage.stranger_client().says(ready_of("x"))) == [("stranger", "DISCONNECT unknown_peer")]
    assert kinds(stage.stranger_worker().beats()) == [("stranger", "DISCONNECT unknown_peer")]
    assert kinds(stage.stranger_worker().says(Hello("x", "y"))) == [("stranger", "DISCONNECT unknown_peer")]
    assert kinds(stage.stranger_worker().garbles()) == [("stranger", "DISCONNECT protocol")]
    assert kinds(stage.stranger_client().garbles(request_id(1))) == [("stranger", "DISCONNECT protocol")]


def test_who_begins_at_the_wrong_socket_is_told_of_the_other(stage: Stage) -> None:
    [(_, worker)] = stage.stranger_client().says(ready_of("x"))
    assert isinstance(worker, Disconnect)
    assert "expected HELLO, got READY; this is a frontend" in worker.message
    assert worker.message.endswith("belong at a broker's backend")
    [(_, client)] = stage.stranger_worker().says(Hello("x", "y"))
    assert isinstance(client, Disconnect)
    assert "expected READY, got HELLO; this is a backend" in client.message
    assert client.message.endswith("belong at a broker's frontend")
    [(_, other)] = stage.stranger_client().beats()
    assert other == Disconnect(
        DisconnectCode.UNKNOWN_PEER, "no session with this peer: expected HELLO, got HEARTBEAT"
    )


def test_a_stranger_that_says_goodbye_is_not_answered(stage: Stage) -> None:
    assert stage.stranger_client().says(Goodbye()) == []
    assert stage.stranger_worker().says(Goodbye()) == []


def test_strangers_that_vanish_are_no_news(stage: Stage) -> None:
    assert stage.stranger_client().vanishes() == []
    assert stage.stranger_worker().vanishes() == []
    assert stage.core.counters.clients_lost == stage.core.counters.workers_lost == 0


@pytest.mark.parametrize(
    "message", [Hello("ann", "test/1"), Draining(), finish(1), Disconnect(DisconnectCode.EXPIRED, "")]
)
def test_a_client_that_breaks_the_protocol_is_cut_off(stage: Stage, message: object) -> None:
    client = stage.client()
    assert kinds(client.says(message)) == [("ann", "DISCONNECT protocol")]  # type: ignore[arg-type]
    assert kinds(client.beats()) == [("ann", "DISCONNECT unknown_peer")]


def test_a_worker_that_breaks_the_protocol_is_cut_off(stage: Stage) -> None:
    assert kinds(stage.worker("w1").says(Hello("w1", "x"))) == [("w1", "DISCONNECT protocol")]
    assert kinds(stage.worker("w2").garbles()) == [("w2", "DISCONNECT protocol")]
    worker = stage.worker("w3")
    assert kinds(worker.changes(incarnation=2)) == [("w3", "DISCONNECT protocol")]
    assert stage.core.counters.workers_lost == 3


def test_a_malformed_request_is_answered_and_the_session_goes_on(stage: Stage) -> None:
    client = stage.client()
    assert client.garbles(request_id(1)) == [("ann", Error(request_id(1), 0, "bad_request", "garbled"))]
    assert client.beats() == []  # it counts as received
    assert kinds(client.garbles()) == [("ann", "DISCONNECT protocol")]


def test_silence_is_answered_with_heartbeats_and_then_with_expiry(stage: Stage) -> None:
    stage.client()
    beats = stage.passes(4.9)
    assert beats == [("ann", Heartbeat(sent)) for sent in (1, 2, 3, 4)]
    assert kinds(stage.passes(0.2)) == [("ann", "DISCONNECT expired")]
    assert stage.core.clients == {}


def test_any_message_is_a_sign_of_life(stage: Stage) -> None:
    client, worker = stage.client(), stage.worker()
    for _ in range(20):
        stage.passes(0.5)
        assert worker.beats() == []
        assert client.queries("models")
    assert len(stage.core.clients) == len(stage.core.registry) == 1


def test_an_answer_stands_for_a_heartbeat(stage: Stage) -> None:
    client = stage.client()
    stage.passes(0.6)
    client.queries("models")
    assert stage.passes(0.9) == []
    assert stage.passes(0.3) == [("ann", Heartbeat(2))]


def test_a_loop_that_was_late_gives_nobody_up_for_it(stage: Stage) -> None:
    stage.client("ann")
    stage.worker("w1")
    stage.passes(1.0)
    assert kinds(stage.passes(60.0, listening=False)) == [("ann", "HEARTBEAT"), ("w1", "HEARTBEAT")]
    assert stage.logged("loop_late")
    assert ("ann", "DISCONNECT expired") in kinds(stage.passes(5.0))


def test_who_was_heard_just_before_a_late_tick_is_given_up_no_later_than_others(stage: Stage) -> None:
    client = stage.client()
    stage.now += 3600.0
    client.beats()
    stage.passes(0.0)
    assert ("ann", "DISCONNECT expired") in kinds(stage.passes(5.5))


def test_a_heartbeat_that_tells_of_lost_messages_ends_the_session(stage: Stage) -> None:
    client, worker = stage.client(), stage.worker()
    assert client.beats() == worker.beats() == []
    client.said += 1
    [(_, disconnect)] = client.beats()
    assert disconnect == Disconnect(DisconnectCode.LOST_MESSAGES, "3 messages were sent, 2 arrived")
    assert kinds(worker.beats(sent=0)) == [("w1", "DISCONNECT lost_messages")]


def test_chunks_count_as_received_whether_or_not_they_are_forwarded(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    route = next(iter(worker_session(stage, "w1").routes))
    assert stage.core.route_chunks(worker.peer, route, stage.now) is stage.core.clients[client.peer]
    worker.said += 1
    assert stage.core.route_chunks(worker.peer, b"?" * 16, stage.now) is None
    assert worker.says(Chunks(b"?" * 16, (Chunk(request_id(1), 1, 0, 0, (1,), "a"),))) == []
    assert worker.beats() == []
    assert stage.core.counters.chunk_messages == stage.core.counters.chunk_messages_dropped == 1
    stage.passes(0.9)
    beat = stage.passes(0.2)
    assert ("ann", Heartbeat(3)) in beat  # WELCOME, STARTED and the chunks
    assert ("w1", Heartbeat(2)) in beat  # ACCEPTED and REQUEST


def test_chunks_of_a_stranger_are_not_routed(stage: Stage) -> None:
    assert stage.core.route_chunks(b"nobody", bytes(16), stage.now) is None


def test_the_newer_incarnation_evicts_the_older(stage: Stage) -> None:
    client = stage.client()
    old = stage.busy_worker("w1", client)
    new = stage.stranger_worker("w1")
    assert kinds(stage.registers(new, incarnation=2)) == [
        ("w1", "DISCONNECT superseded"),
        ("w1", "ACCEPTED"),
        ("ann", "ERROR worker_lost"),
    ]
    assert worker_session(stage, "w1").peer == new.peer
    assert kinds(old.beats()) == [("w1", "DISCONNECT unknown_peer")]
    assert new.beats() == []


def test_an_older_incarnation_is_refused(stage: Stage) -> None:
    stage.worker("w1", incarnation=5)
    late = stage.stranger_worker("w1")
    assert kinds(stage.registers(late, incarnation=4)) == [("w1", "DISCONNECT superseded")]
    assert worker_session(stage, "w1").incarnation == 5


def test_a_worker_that_reconnects_replaces_its_old_session_without_a_word(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    again = stage.stranger_worker("w1")
    assert kinds(stage.registers(again)) == [("w1", "ACCEPTED"), ("ann", "ERROR worker_lost")]


def test_a_worker_that_comes_back_serves_what_waited_for_it(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    client.asks(2)
    again = stage.stranger_worker("w1")
    said = stage.registers(again, incarnation=2)
    assert kinds(said)[1:] == [("w1", "ACCEPTED"), ("ann", "ERROR worker_lost"), ("w1", "REQUEST")]


def test_a_clients_goodbye_cancels_what_it_asked_for(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    assert kinds(client.says(Goodbye())) == [("w1", "CANCEL")]
    assert stage.core.exchange.tally() == {"waiting": 0, "running": 0, "orphaned": 1}
    assert worker.finishes(1) == []
    assert stage.core.exchange.records == {}


def test_a_workers_goodbye_fails_what_it_held(stage: Stage) -> None:
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    [(_, error)] = worker.says(Goodbye())
    message = "worker w1 was lost: it said goodbye"
    assert error == Error(request_id(1), 1, "worker_lost", message, retryable=True, worker="w1")


def test_probes_greet_everybody_on_the_side_where_a_connection_broke(stage: Stage) -> None:
    stage.client()
    stage.worker("w1")
    assert stage.tell(stage.core.probe_clients(stage.now)) == [("ann", Heartbeat(1))]
    assert stage.tell(stage.core.probe_workers(stage.now)) == [("w1", Heartbeat(1))]
    # The news may come before sends fail.
    assert stage.passes(0.02) == [("w1", Heartbeat(2))]
    assert stage.passes(0.06) == [("ann", Heartbeat(2)), ("w1", Heartbeat(3))]
    assert stage.passes(0.5) == []


def test_a_flood_of_broken_connections_is_no_flood_of_probes(stage: Stage) -> None:
    stage.client()
    stage.worker("w1")
    said = []
    for _ in range(1000):
        said += stage.tell(stage.core.probe_clients(stage.now))
        said += stage.tell(stage.core.probe_workers(stage.now))
        said += stage.passes(0.001)
    names = [name for name, _ in said]
    assert 15 <= names.count("ann") <= 22
    assert 30 <= names.count("w1") <= 36


def test_malformed_messages_are_logged_once_a_second_with_their_number(stage: Stage) -> None:
    for _ in range(50):
        stage.stranger_client().garbles()
    stage.passes(1.1)
    stage.stranger_worker().garbles()
    assert [line["count"] for line in stage.logged("malformed_message")] == [1, 50]
    assert stage.core.counters.malformed == 51


def test_a_change_of_state_is_logged_once(stage: Stage) -> None:
    worker = stage.worker("w1")
    for state in (WorkerState.READY, WorkerState.STALLED, WorkerState.STALLED, WorkerState.READY):
        worker.beats(load=Load(state))
    states = [(line["before"], line["state"]) for line in stage.logged("worker_state")]
    assert states == [("ready", "stalled"), ("stalled", "ready")]


def test_a_drained_broker_answers_all_and_says_goodbye(stages: Callable[..., Stage]) -> None:
    stage = stages()
    client = stage.client()
    worker = stage.busy_worker("w1", client)
    client.asks(2)
    assert stage.tell(stage.core.drain(stage.now, 10.0)) == [("ann", Draining())]
    assert kinds(client.asks(3)) == [("ann", "ERROR draining")]
    assert kinds(worker.finishes(1)) == [("ann", "FINISH stop"), ("w1", "REQUEST")]  # what waits is still served
    assert not stage.core.stopped
    assert kinds(worker.finishes(2)) == [("ann", "FINISH stop")]
    assert kinds(stage.passes(0.0)) == [("ann", "GOODBYE"), ("w1", "GOODBYE")]
    assert stage.core.stopped
    assert stage.logged("broker_stopped") == [{"unfinished": 0}]


def test_a_drain_gives_up_when_its_grace_is_over(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    client.asks(2)
    stage.core.drain(stage.now, 0.4)
    assert kinds(stage.passes(0.5)) == [
        ("ann", "ERROR draining"),
        ("w1", "CANCEL"),
        ("ann", "ERROR draining"),
        ("ann", "GOODBYE"),
        ("w1", "GOODBYE"),
    ]
    assert stage.core.stopped


def test_a_drain_without_requests_ends_at_once_and_does_not_wait_for_orphans(stages: Callable[..., Stage]) -> None:
    idle = stages()
    idle.client()
    assert kinds(idle.tell(idle.core.drain(idle.now, 60.0))) == [("ann", "DRAINING"), ("ann", "GOODBYE")]
    left = stages()
    client = left.client()
    left.busy_worker("w1", client)
    client.vanishes()
    assert kinds(left.tell(left.core.drain(left.now, 60.0))) == [("w1", "GOODBYE")]


def test_who_comes_to_a_broker_that_drains_is_told_at_once(stage: Stage) -> None:
    stage.busy_worker("w1", stage.client("ann"))
    stage.core.drain(stage.now, 10.0)
    late = stage.stranger_client("bob")
    said = late.says(Hello("bob", "test/1"))
    assert kinds(said) == [("bob", "WELCOME"), ("bob", "DRAINING")]
    assert kinds(late.asks(2)) == [("bob", "ERROR draining")]


def test_peers_that_stopped_reading_are_cut_off_with_all_that_hangs_on_them(stage: Stage) -> None:
    ann, bob = stage.client("ann"), stage.client("bob")
    worker = stage.busy_worker("w1", ann, number=1)
    other = stage.worker("w2")
    bob.asks(2)
    why = "it has stopped reading: 9 bytes wait"
    assert stage.happens(ClientGone(ann.peer, why, stalled=True)) == [
        ("ann", Disconnect(DisconnectCode.EXPIRED, why)),
        ("w1", Cancel(request_id(1), 1)),
    ]
    said = stage.happens(WorkerGone(other.peer, why, stalled=True))
    assert kinds(said) == [("w2", "DISCONNECT expired"), ("bob", "ERROR worker_lost")]
    assert kinds(ann.beats()) == [("ann", "DISCONNECT unknown_peer")]
    assert worker.finishes(1) == []
    assert stage.happens(ClientGone(ann.peer, why, stalled=True)) == []
    counters = stage.core.counters
    assert (counters.peers_stalled, counters.clients_lost, counters.workers_lost) == (2, 1, 1)


def test_a_second_drain_may_be_more_impatient(stage: Stage) -> None:
    client = stage.client()
    stage.busy_worker("w1", client)
    assert stage.tell(stage.core.drain(stage.now, 60.0)) == [("ann", Draining())]
    said = stage.tell(stage.core.drain(stage.now, 0.0))
    assert kinds(said)[:2] == [("ann", "ERROR draining"), ("w1", "CANCEL")]
    assert len(stage.logged("broker_draining")) == 1
