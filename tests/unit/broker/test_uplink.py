"""Brokers below brokers: what READY tells, how requests go down and tokens come up, and who is lost with whom."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.events import FromWorker
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.errors import ErrorCode
from tokenmq.protocol.limits import MAX_HOPS
from tokenmq.protocol.links import Connected, Received, Refused, Send, Shut
from tokenmq.protocol.log import Log
from tokenmq.protocol.messages import (
    Accepted,
    Cancel,
    Chunks,
    Credit,
    Disconnect,
    DisconnectCode,
    Drain,
    Draining,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Goodbye,
    Heartbeat,
    Load,
    Message,
    ModelInfo,
    Parked,
    Query,
    Ready,
    Reply,
    Request,
    Started,
    WorkerState,
)
from tokenmq.protocol.refusal import Refusal
from tokenmq.transport.endpoints import EndpointError

from .stage import request_id
from .tree import ClientPeer, Tree, WorkerPeer, endpoint, route_of


@pytest.fixture
def tree() -> Tree:
    return Tree()


def three_levels(tree: Tree) -> tuple[ClientPeer, WorkerPeer]:
    """Build root - mid - leaf with one worker at the leaf; return a client of the root, and the worker."""
    tree.broker("root")
    tree.broker("mid", "root")
    tree.broker("leaf", "mid")
    worker = tree.worker("leaf", "gpu", slots=2)
    return tree.client("root"), worker


def registered(now: float) -> BrokerCore:
    """Return a broker that a parent has just accepted."""
    core = BrokerCore(BrokerSettings(name="mid", uplinks=(endpoint("root"),)), software="test/1", now=now)
    core.tick(now)
    core.handle(Connected(endpoint("root")), now)
    core.handle(Received(endpoint("root"), Accepted("root", "test/1", 1.0, 5.0)), now)
    return core


def rests(tree: Tree) -> bool:
    """Tell whether no broker holds anything of any request."""
    return all(
        not core.exchange.records
        and not core.uplink.guests()
        and not any(worker.in_flight or worker.routes for worker in core.registry)
        for core in tree.cores.values()
    )


def child_of(tree: Tree, parent: str, child: str) -> WorkerState:
    return tree.cores[parent].registry.by_name[child].state


# Registration.


def test_a_broker_registers_before_it_has_workers_and_is_ready_when_it_has(tree: Tree) -> None:
    tree.broker("root")
    tree.broker("mid", "root")
    assert child_of(tree, "root", "mid") is WorkerState.LOADING
    tree.worker("mid", "gpu", "a", "b", slots=3)
    child = tree.cores["root"].registry.by_name["mid"]
    assert child.state is WorkerState.READY
    assert (child.ready.slots, child.ready.brokers) == (3, ("mid-2",))
    assert tree.cores["root"].registry.models() == ["a", "b"]


def test_a_broker_above_that_wants_keys_is_told_with_this_commands_options() -> None:
    core = BrokerCore(BrokerSettings(name="mid", uplinks=(endpoint("root"),)), software="test/1", now=0.0)
    core.tick(0.0)
    logs = [each for each in core.handle(Refused(endpoint("root"), Refusal.MISMATCH), 0.0) if isinstance(each, Log)]
    (told,) = [log.fields["reason"] for log in logs if log.event == "connection_refused"]
    assert "give --uplink-server-key and --uplink-key" in told


def test_what_changes_below_is_told_through_every_level(tree: Tree) -> None:
    _, worker = three_levels(tree)
    root = tree.cores["root"].registry.by_name["mid"]
    assert root.ready.brokers == ("mid-2", "leaf-3")
    assert root.ready.slots == 2
    other = tree.worker("mid", "other", "b", slots=5)
    assert (root.ready.slots, tree.cores["root"].registry.models()) == (7, ["b", "m"])
    worker.goes()
    tree.passes(0.2)
    assert (root.ready.slots, tree.cores["root"].registry.models()) == (5, ["b"])
    other.goes()
    tree.passes(0.2)
    assert root.state is WorkerState.LOADING


def test_many_changes_at_once_are_told_in_one_ready(tree: Tree) -> None:
    tree.broker("root")
    mid = tree.broker("mid", "root")
    tree.worker("mid", "w0")
    told = tree.carried["mid", "root"]
    told.clear()
    first = mid.registry.by_name["w0"].ready
    for number in range(1, 20):
        WorkerPeer(tree, f"w{number}", "mid", bytes([number]) * 5).says(replace(first, worker=f"w{number}"))
        tree.passes(0.002)
    tree.passes(0.2)
    readies = [message for message in told if isinstance(message, Ready)]
    assert len(readies) <= 2
    assert readies[-1].slots == 20


def test_a_worker_that_falls_silent_is_told_of_at_once() -> None:
    core = registered(now=0.0)
    ready = Ready("gpu", 1, "test/1", (ModelInfo("m"),), 1, "synthetic", Load())
    core.handle(FromWorker(b"gpu", ready), 0.0)
    now, beats, lost_at, told = 0.0, 1, math.inf, False
    while not told:
        assert now < 6.0
        now = core.next_deadline()
        if now >= beats + 0.6:
            # The parent is heard some time before the worker has been silent for too long.
            beats += 1
            core.handle(Received(endpoint("root"), Heartbeat(beats - 1)), now)
        said = [action.message for action in core.tick(now) if isinstance(action, Send)]
        if not core.registry.models():
            lost_at = min(lost_at, now)
            told = any(isinstance(message, Ready) and not message.models for message in said)
    assert now <= lost_at + 0.1


def test_a_broker_that_changes_nothing_says_no_more_than_heartbeats(tree: Tree) -> None:
    three_levels(tree)
    for messages in tree.carried.values():
        messages.clear()
    tree.passes(10.0)
    said = [message for messages in tree.carried.values() for message in messages]
    assert {type(message) for message in said} == {Heartbeat}
    # Two links, two ends, one a second, and half again for those that come early.
    assert len(said) <= 60


def test_load_has_what_everybody_has_there(tree: Tree) -> None:
    client, _ = three_levels(tree)
    own = tree.client("leaf", "own")
    client.asks(1)
    own.asks(2)
    own.asks(3)
    tree.passes(0.2)
    load = tree.cores["mid"].registry.by_name["leaf"].reported
    assert (load.running, load.waiting, load.held) == (2, 1, 1)
    assert tree.cores["root"].registry.by_name["mid"].others == 2


def test_a_broker_that_was_not_called_in_time_gives_no_parent_up() -> None:
    core = registered(now=0.0)
    # Nobody listened for so long; and then it is the parent's turn.
    assert not [action for action in core.tick(20.0) if isinstance(action, Shut)]
    now = 20.0
    while not (shut := [action for action in core.tick(now) if isinstance(action, Shut)]):
        now = core.next_deadline()
    assert shut == [Shut(endpoint("root"))]
    assert now < 30.0


def test_what_others_have_there_is_told_before_the_heartbeat(tree: Tree) -> None:
    three_levels(tree)
    tree.passes(3.0)
    at = tree.now
    tree.client("leaf", "own").asks(1)
    while not tree.cores["root"].registry.by_name["mid"].others:
        tree.passes(0.01)
        assert tree.now < at + 0.3


def test_brokers_get_requests_by_what_works_them_off(tree: Tree) -> None:
    tree.broker("root")
    for name, workers in (("small", 1), ("large", 3)):
        tree.broker(name, "root")
        for number in range(workers):
            tree.worker(name, f"{name}-{number}", slots=8, speed=10.0)
    client = tree.client("root")
    for number in range(8):
        client.asks(number)
    loads = {worker.name: worker.load for worker in tree.cores["root"].registry}
    assert loads == {"small": 2, "large": 6}
    assert {worker.load for worker in tree.cores["large"].registry} == {2}


# The way of a request.


def test_tokens_come_up_through_all_brokers_and_credit_goes_down(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(1, credit=2)
    request = worker.take(Request)
    assert request.envelope.path == ("root-1", "mid-2")
    assert request.payload == b"p"
    assert [started.worker for started in client.takes(Started)] == ["mid", "mid/leaf", "mid/leaf/gpu"]
    worker.brings(10, 11, to=route_of(request))
    [chunk] = client.take(Chunks).chunks
    assert (chunk.request_id, chunk.token_ids) == (request_id(1), (10, 11))
    tree.passes(3.0)  # heartbeats tell how many messages were sent, these among them
    client.grants(4)
    assert worker.take(Credit) == Credit(request_id(1), 1, 4)
    worker.finishes()
    finish = client.take(Finish)
    assert (finish.worker, finish.reason) == ("mid/leaf/gpu", FinishReason.STOP)
    assert finish.timings.decode_s == 1.0
    assert rests(tree)


def test_nobody_but_the_worker_looks_into_a_chunk(tree: Tree) -> None:
    client, worker = three_levels(tree)
    # Brokers number their clients: so each has another number for this one.
    for name, others in (("mid", 1), ("leaf", 2)):
        for _ in range(others):
            tree.client(name)
    client.asks()
    route = route_of(worker.take(Request))
    before = {name: core.counters.chunk_messages for name, core in tree.cores.items()}
    worker.brings(10, to=route)
    assert {name: core.counters.chunk_messages - before[name] for name, core in tree.cores.items()} == {
        "root": 1, "mid": 1, "leaf": 1
    }  # fmt: skip
    # Each hop has a route of its own, and the header is all that changes.
    routes = [message.route for pair in (("leaf", "mid"), ("mid", "root")) for message in tree.carried[pair]
              if isinstance(message, Chunks)]  # fmt: skip
    assert len({route, *routes}) == 3


def test_two_clients_of_a_parent_are_two_here(tree: Tree) -> None:
    first, worker = three_levels(tree)
    second = tree.client("root", "bob")
    first.asks(1)
    second.asks(2)
    ann, bob = worker.takes(Request)
    assert route_of(ann) != route_of(bob)
    worker.brings(7, to=route_of(bob), number=2)
    assert not first.takes(Chunks)
    assert second.take(Chunks).chunks[0].token_ids == (7,)
    shares = {record.share for record in tree.cores["leaf"].exchange.records.values()}
    assert len(shares) == 2


def test_cancel_goes_down_and_frees_the_slots(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks()
    client.cancels()
    assert worker.take(Cancel) == Cancel(request_id(1), 1)
    worker.finishes(reason=FinishReason.CANCELLED)
    assert client.take(Finish).reason is FinishReason.CANCELLED
    assert rests(tree)


def test_what_waits_below_is_cancelled_there(tree: Tree) -> None:
    client, worker = three_levels(tree)
    own = tree.client("leaf", "own")
    own.asks(1)
    own.asks(2)
    # Sent before the root hears that the slots are taken.
    client.asks(3, credit=1)
    assert len(worker.takes(Request)) == 2
    client.grants(5, number=3)
    client.cancels(3)
    finish = client.take(Finish)
    assert (finish.reason, finish.worker) == (FinishReason.CANCELLED, "mid/leaf")
    own.cancels(1)
    own.cancels(2)
    worker.finishes(1, reason=FinishReason.CANCELLED)
    worker.finishes(2, reason=FinishReason.CANCELLED)
    assert rests(tree)


def test_credit_that_comes_while_it_waits_below_goes_with_the_request(tree: Tree) -> None:
    client, worker = three_levels(tree)
    own = tree.client("leaf", "own")
    own.asks(1)
    own.asks(2)
    client.asks(3, credit=1)
    client.grants(5, number=3)
    worker.takes(Request)
    worker.finishes(1)
    assert worker.take(Request).envelope.credit == 5


def test_a_parked_stream_takes_no_slot_on_any_level(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks()
    worker.says(Parked(request_id(1), 1))
    for name, child in (("root", "mid"), ("mid", "leaf"), ("leaf", "gpu")):
        session = tree.cores[name].registry.by_name[child]
        assert (session.parked, session.load) == (1, 0), name
    assert not client.takes(Parked)
    tree.passes(2.0)
    assert tree.cores["root"].registry.by_name["mid"].load == 0
    tree.client("leaf", "own").asks(2)
    tree.passes(2.0)
    assert tree.cores["mid"].registry.by_name["leaf"].others == 1
    worker.finishes()
    assert client.take(Finish).worker == "mid/leaf/gpu"


def test_errors_name_the_worker_by_its_path(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks()
    worker.fails()
    error = client.take(Error)
    assert (error.code, error.worker, error.retryable) == ("engine_failed", "mid/leaf/gpu", True)
    assert rests(tree)


def test_an_error_of_a_broker_itself_has_its_name(tree: Tree) -> None:
    client, _ = three_levels(tree)
    own = tree.client("leaf", "own")
    own.asks(1)
    own.asks(2)
    client.asks(3, queue_s=0.5)
    tree.passes(1.0)
    error = client.take(Error)
    assert (error.code, error.worker) == (ErrorCode.QUEUE_TIMEOUT.value, "mid/leaf")


def test_time_in_queues_adds_up(tree: Tree) -> None:
    client, worker = three_levels(tree)
    own = tree.client("leaf", "own")
    own.asks(1)
    own.asks(2)
    client.asks(3)
    tree.passes(0.5)
    worker.finishes(1)
    worker.finishes(3)
    assert client.take(Finish).timings.broker_queue_s == pytest.approx(0.5)


def test_decisions_of_all_brokers_come_with_it_the_first_in_front(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(explain=True)
    worker.finishes()
    routing = client.take(Finish).timings.routing
    assert [(decision.broker, decision.worker) for decision in routing] == [
        ("root", "mid"), ("mid", "mid/leaf"), ("leaf", "mid/leaf/gpu")
    ]  # fmt: skip
    assert routing[-1].considered[0].worker == "mid/leaf/gpu"


def test_a_deadline_goes_down_with_what_is_left_of_it(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(deadline_s=3.0)
    assert worker.take(Request).envelope.deadline_s == pytest.approx(3.0)
    tree.passes(4.0)
    assert client.take(Error).code == ErrorCode.DEADLINE.value
    worker.take(Cancel)
    worker.finishes(reason=FinishReason.CANCELLED)
    assert rests(tree)


def test_an_attempt_that_follows_is_another_request_below(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(1)
    client.asks(1, attempt=2)
    assert worker.take(Cancel).attempt == 1
    assert [request.envelope.attempt for request in worker.takes(Request)] == [1, 2]
    worker.finishes(attempt=1, reason=FinishReason.CANCELLED)
    assert not client.takes(Finish)
    worker.finishes(attempt=2)
    assert client.take(Finish).attempt == 2
    assert rests(tree)


def test_a_hedge_runs_beside_the_first_attempt_below(tree: Tree) -> None:
    client, slow = three_levels(tree)
    quick = tree.worker("leaf", "quick")
    client.asks(1)
    first, second = (slow, quick) if slow.takes(Request) else (quick, slow)
    client.asks(1, attempt=2, hedge=True, avoid=(f"mid/leaf/{first.name}",))
    assert second.take(Request).envelope.attempt == 2
    assert not first.takes(Cancel)
    second.finishes(attempt=2)
    first.finishes(attempt=1)
    assert [finish.attempt for finish in client.takes(Finish)] == [2, 1]
    assert rests(tree)


# Whom a request avoids.


def test_a_worker_that_failed_is_avoided_where_it_is_known(tree: Tree) -> None:
    client, gpu = three_levels(tree)
    other = tree.worker("leaf", "other")
    client.asks(1, attempt=2, avoid=("mid/leaf/gpu",))
    assert not gpu.takes(Request)
    assert other.take(Request).envelope.avoid == ()
    other.finishes(attempt=2)
    client.asks(2, avoid=("mid/leaf/other", "gpu", "leaf/gpu"))
    assert gpu.takes(Request)


def test_a_broker_is_avoided_by_its_own_name(tree: Tree) -> None:
    client, gpu = three_levels(tree)
    other = tree.worker("root", "other")
    client.asks(1, avoid=("mid",))
    assert not gpu.takes(Request)
    assert other.takes(Request)


def test_the_attempt_that_follows_a_silent_worker_avoids_it_and_not_its_broker(tree: Tree) -> None:
    client, gpu = three_levels(tree)
    other = tree.worker("leaf", "other", slots=2)
    client.asks(1)
    first, second = (gpu, other) if gpu.takes(Request) else (other, gpu)
    client.asks(1, attempt=2)
    assert second.takes(Request)
    assert not first.takes(Request)


def test_failures_behind_a_broker_are_not_the_brokers(tree: Tree) -> None:
    client, worker = three_levels(tree)
    for number in range(1, 6):
        client.asks(number)
        worker.fails(number=number)
    # The leaf has suspended its worker; nobody has suspended the leaf.
    assert tree.cores["leaf"].registry.by_name["gpu"].breaker.state.value == "open"
    assert tree.cores["mid"].registry.by_name["leaf"].breaker.state.value == "closed"


# Who is lost with whom.


def test_a_lost_worker_is_an_error_that_names_it(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks()
    worker.goes()
    error = client.take(Error)
    assert (error.code, error.worker, error.retryable) == ("worker_lost", "mid/leaf/gpu", True)
    assert rests(tree)


def test_a_lost_broker_in_the_middle_fails_what_went_through_it_and_cancels_it_below(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks()
    tree.kill("mid")
    error = client.take(Error)
    assert (error.code, error.worker, error.retryable) == ("worker_lost", "mid", True)
    assert worker.take(Cancel).id == request_id(1)
    worker.finishes(reason=FinishReason.CANCELLED)
    assert rests(tree)


def test_a_broker_that_was_lost_comes_back_with_all_below_it(tree: Tree) -> None:
    client, worker = three_levels(tree)
    tree.kill("mid")
    tree.passes(0.1)
    client.asks(1)
    assert client.take(Error).code == ErrorCode.NO_WORKER.value
    tree.broker("mid", "root")
    tree.passes(5.0)
    client.asks(2)
    assert worker.take(Request).id == request_id(2)


def test_a_lost_root_cancels_all_that_came_from_it(tree: Tree) -> None:
    client, worker = three_levels(tree)
    own = tree.client("mid", "own")
    client.asks(1)
    own.asks(2)
    ours = route_of(worker.takes(Request)[1])
    tree.kill("root")
    assert worker.take(Cancel).id == request_id(1)
    worker.brings(5, to=ours, number=2)
    assert own.take(Chunks).chunks[0].token_ids == (5,)
    worker.finishes(1, reason=FinishReason.CANCELLED)
    worker.finishes(2)
    assert own.take(Finish).worker == "leaf/gpu"
    assert rests(tree)


def test_tokens_that_are_late_for_a_session_do_not_come_into_the_next(tree: Tree) -> None:
    tree.broker("root")
    tree.broker("mid", "root")
    worker = tree.worker("mid", "gpu")
    client = tree.client("root")
    client.asks(1, deadline_s=1.0)
    route = route_of(worker.take(Request))
    # It runs past its deadline, so that nobody waits for it; then the parent is gone, and another one comes.
    tree.passes(2.0)
    tree.kill("root")
    tree.broker("root")
    tree.passes(5.0)
    assert child_of(tree, "root", "mid") is WorkerState.READY
    tree.carried["mid", "root"].clear()
    worker.brings(5, to=route)
    assert not [message for message in tree.carried["mid", "root"] if isinstance(message, Chunks)]


def test_a_client_that_leaves_cancels_through_all_levels(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks()
    client.goes()
    worker.take(Cancel)
    worker.finishes(reason=FinishReason.CANCELLED)
    assert rests(tree)


def test_two_parents_have_their_own_sessions(tree: Tree) -> None:
    tree.broker("one")
    tree.broker("two")
    tree.broker("mid", "one", "two")
    worker = tree.worker("mid", "gpu", slots=2)
    first, second = tree.client("one"), tree.client("two")
    first.asks(1)
    second.asks(2)
    routes = {request.id: route_of(request) for request in worker.takes(Request)}
    tree.passes(0.2)
    assert tree.cores["one"].registry.by_name["mid"].others == 1
    assert tree.cores["one"].registry.by_name["mid"].free == 0
    # A parent cannot touch what came through the other one.
    tell(tree, "two", "mid", Cancel(request_id(1), 1))
    tell(tree, "two", "mid", Credit(request_id(1), 1, 100))
    assert not worker.takes(Cancel)
    assert not worker.takes(Credit)
    tree.kill("one")
    assert worker.take(Cancel).id == request_id(1)
    worker.brings(4, to=routes[request_id(2)], number=2)
    assert second.take(Chunks)


def test_the_same_broker_through_two_others_is_one(tree: Tree) -> None:
    tree.broker("root")
    tree.broker("left", "root")
    tree.broker("right", "root")
    tree.broker("leaf", "left", "right")
    worker = tree.worker("leaf", "gpu", slots=2)
    tree.passes(0.5)
    client = tree.client("root")
    client.asks(1)
    worker.take(Request)
    way = client.takes(Started)[-1].worker.split("/")[0]
    tree.kill(way)
    assert client.take(Error).worker == way
    client.asks(1, attempt=2, avoid=(way,))
    worker.take(Cancel)
    assert worker.take(Request).envelope.attempt == 2
    other = client.takes(Started)[-1].worker
    assert other == ("right/leaf/gpu" if way == "left" else "left/leaf/gpu")
    worker.finishes(attempt=1, reason=FinishReason.CANCELLED)
    worker.finishes(attempt=2)
    assert client.take(Finish).worker == other
    assert rests(tree)


# Loops.


def test_two_brokers_below_each_other_are_parted_with_a_warning_and_no_storm(tree: Tree) -> None:
    tree.broker("a", "b")
    tree.broker("b", "a")
    tree.passes(120.0)
    warned = tree.logged("a", "uplink_loop") + tree.logged("b", "uplink_loop")
    assert warned
    assert "--uplink" in warned[0]["doing"]
    told = [log for name in "ab" for log in tree.logged(name, "broker_lost") if log["reason"].startswith("loop")]
    assert told
    assert len(told) < 30
    states = [tree.cores[name].registry.by_name.get(other) is not None for name, other in ("ab", "ba")]
    assert states.count(True) <= 1
    disconnects = [message for messages in tree.carried.values() for message in messages
                   if isinstance(message, Disconnect)]  # fmt: skip
    assert {message.code for message in disconnects} == {DisconnectCode.LOOP}


def test_a_loop_of_three_is_seen_by_the_one_that_closes_it(tree: Tree) -> None:
    tree.broker("a", "c")
    tree.broker("b", "a")
    tree.broker("c", "b")
    tree.passes(30.0)
    links = [(parent, child) for parent in "abc" for child in "abc"
             if child in tree.cores[parent].registry.by_name]  # fmt: skip
    assert len(links) <= 2
    assert any(tree.logged(name, "uplink_loop") for name in "abc")


def test_a_broker_that_is_its_own_parent_is_told(tree: Tree) -> None:
    tree.broker("a", "a")
    tree.passes(10.0)
    assert tree.logged("a", "uplink_loop")
    assert "a" not in tree.cores["a"].registry.by_name


def test_a_request_that_has_passed_this_broker_is_refused(tree: Tree) -> None:
    core = tree.broker("root")
    tree.worker("root", "gpu")
    client = tree.client("root")
    client.asks(1, path=("other", core.id))
    error = client.take(Error)
    assert (error.code, error.retryable) == (ErrorCode.ROUTING_LOOP.value, False)
    client.asks(2, path=tuple(f"b{number}" for number in range(MAX_HOPS)))
    assert client.take(Error).code == ErrorCode.ROUTING_LOOP.value
    client.asks(3, path=tuple(f"b{number}" for number in range(MAX_HOPS - 1)))
    assert not client.takes(Error)


# Leaving.


def test_sigterm_of_a_broker_below_ends_what_runs_and_says_goodbye(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(1)
    leaf = tree.cores["leaf"]
    tree._perform("leaf", leaf.drain(tree.now, 30.0))
    tree.run()
    assert child_of(tree, "mid", "leaf") is WorkerState.DRAINING
    assert [type(message) for message in tree.carried["leaf", "mid"] if isinstance(message, (Draining, Goodbye))] == [
        Draining
    ]
    tree.worker("leaf", "late")
    assert not after_draining(tree, "leaf", "mid", Ready)
    worker.finishes(1)
    tree.passes(0.2)
    assert client.take(Finish).worker == "mid/leaf/gpu"
    assert leaf.stopped
    assert isinstance(tree.carried["leaf", "mid"][-1], Goodbye)
    assert "leaf" not in tree.cores["mid"].registry.by_name


def test_what_has_not_ended_when_a_broker_stops_is_given_back(tree: Tree) -> None:
    client, _ = three_levels(tree)
    client.asks(1)
    leaf = tree.cores["leaf"]
    tree._perform("leaf", leaf.drain(tree.now, 1.0))
    tree.passes(2.0)
    error = client.take(Error)
    assert (error.code, error.worker, error.retryable) == ("draining", "mid/leaf/gpu", True)
    assert leaf.stopped


def test_drain_of_a_parent_leaves_that_parent_only(tree: Tree) -> None:
    tree.broker("one")
    tree.broker("two")
    mid = tree.broker("mid", "one", "two")
    worker = tree.worker("mid", "gpu", slots=4)
    first, second, own = tree.client("one"), tree.client("two"), tree.client("mid", "own")
    first.asks(1)
    worker.takes(Request)
    tell(tree, "one", "mid", Drain(60.0))
    assert child_of(tree, "one", "mid") is WorkerState.DRAINING
    assert child_of(tree, "two", "mid") is WorkerState.READY
    tree.worker("mid", "another")  # what changes now is no news for the one that is left
    assert child_of(tree, "one", "mid") is WorkerState.DRAINING
    assert not after_draining(tree, "mid", "one", Ready)
    assert tree.cores["two"].registry.by_name["mid"].slots == 5
    second.asks(2)
    own.asks(3)
    worker.finishes(1)
    tree.passes(0.2)
    assert first.take(Finish)
    assert "mid" not in tree.cores["one"].registry.by_name
    tree.passes(120.0)
    assert "mid" not in tree.cores["one"].registry.by_name
    assert "mid" in tree.cores["two"].registry.by_name
    assert not mid.exchange.draining


def test_drain_of_a_parent_gives_back_what_has_not_ended_in_time(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(1)
    tell(tree, "root", "mid", Drain(60.0))
    tell(tree, "root", "mid", Drain(1.0))
    tell(tree, "root", "mid", Drain(90.0))
    tree.passes(2.0)
    error = client.take(Error)
    assert (error.code, error.worker, error.retryable) == ("draining", "mid/leaf", True)
    assert len(tree.logged("mid", "uplink_leaving")) == 1
    assert not after_draining(tree, "mid", "root", Draining)
    [left] = tree.logged("mid", "uplink_left")
    assert (left["unfinished"], left["doing"]) == (1, "start this broker anew to come back")
    assert worker.take(Cancel).id == request_id(1)
    assert "mid" not in tree.cores["root"].registry.by_name


def test_a_drain_that_is_undone_brings_the_broker_back(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(1)
    tell(tree, "root", "mid", Drain(60.0))
    tell(tree, "root", "mid", Drain(undo=True))
    assert child_of(tree, "root", "mid") is WorkerState.READY
    client.asks(2)
    assert len(worker.takes(Request)) == 2
    tell(tree, "root", "mid", Drain(undo=True))  # nothing to undo: nobody minds
    assert child_of(tree, "root", "mid") is WorkerState.READY


def test_a_request_that_was_on_its_way_when_the_broker_left_is_refused(tree: Tree) -> None:
    client, worker = three_levels(tree)
    client.asks(1)
    worker.take(Request)
    tell(tree, "root", "mid", Drain(60.0))
    late = Request(request_id(2), Envelope("m", 1, 8, route=b"r" * 16), b"p")
    tell(tree, "root", "mid", late)
    assert not worker.takes(Request)
    refusal = tree.carried["mid", "root"][-1]
    assert isinstance(refusal, Error)
    assert (refusal.id, refusal.code, refusal.retryable) == (late.id, ErrorCode.DRAINING.value, True)


def test_a_request_without_a_route_is_refused(tree: Tree) -> None:
    _, worker = three_levels(tree)
    tell(tree, "root", "mid", Request(request_id(2), Envelope("m", 1, 8), b"p"))
    assert not worker.takes(Request)
    refusal = tree.carried["mid", "root"][-1]
    assert isinstance(refusal, Error)
    assert refusal.code == ErrorCode.BAD_REQUEST.value


def test_a_broker_of_the_same_name_takes_the_place_and_the_first_stays_away(tree: Tree) -> None:
    tree.broker("root")
    tree.broker("mid", "root")
    old = tree.cores.pop("mid")
    tree.cores["old"] = old
    tree.logs["old"] = []
    id = tree._links.pop(("mid", "root"))
    tree._links["old", "root"] = id
    tree._children["root", id] = "old"
    tree.carried["root", "old"] = []
    tree.broker("mid", "root")
    tree.passes(60.0)
    assert tree.cores["root"].registry.by_name["mid"].ready.brokers == (tree.cores["mid"].id,)
    assert tree.logged("old", "uplinks_closed")


# Questions.


def test_a_parent_may_ask_as_an_operator_does(tree: Tree) -> None:
    client, _ = three_levels(tree)
    rows = client.queries("workers", tree=True)
    assert [(row["name"], row["depth"]) for row in rows] == [("mid", 0), ("mid/leaf", 1), ("mid/leaf/gpu", 2)]
    status = client.queries("status", tree=True)
    assert (status["tree"]["workers"], status["tree"]["slots"]) == (1, 2)
    assert len(status["tree"]["brokers"]) == 3


def test_an_order_reaches_a_worker_behind_two_brokers(tree: Tree) -> None:
    client, worker = three_levels(tree)
    assert client.queries("drain", worker="mid/leaf/gpu", grace_s=3.0)["worker"] == "mid/leaf/gpu"
    assert worker.take(Drain).grace_s == 3.0
    assert "no worker 'nobody'" in client.queries("drain", worker="mid/leaf/nobody").message


def test_an_answer_that_is_late_for_a_session_does_not_come_into_the_next(tree: Tree) -> None:
    tree.broker("root")
    tree.broker("mid", "root")
    silent = tree.worker("mid", "silent")
    silent.says(replace(tree.cores["mid"].registry.by_name["silent"].ready, brokers=("silent-id",)))
    client = tree.client("root")
    client.says(Query(request_id(9), "workers", {"tree": True, "within_s": 10.0}))
    assert silent.take(Query).method == "workers"
    tree.kill("root")
    tree.broker("root")
    tree.passes(15.0)
    assert child_of(tree, "root", "mid") is WorkerState.READY
    assert not [message for message in tree.carried["mid", "root"] if isinstance(message, Reply)]


# Settings.


def test_a_broker_below_another_needs_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match="--name"):
        BrokerSettings(uplinks=(endpoint("root"),))


@pytest.mark.parametrize("uplink", ["tcp://*:5556", "root:5556", "tcp://root:0"])
def test_an_uplink_names_one_host_and_port(uplink: str) -> None:
    with pytest.raises(EndpointError):
        BrokerSettings(name="mid", uplinks=(uplink,))


def test_an_uplink_is_given_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        BrokerSettings(name="mid", uplinks=(endpoint("root"), endpoint("root")))


def after_draining(tree: Tree, child: str, parent: str, kind: type[Message]) -> list[Message]:
    """Return what a broker has said of this kind since it said that it drains."""
    said = tree.carried[child, parent]
    begun = [isinstance(message, Draining) for message in said].index(True)
    return [message for message in said[begun + 1 :] if isinstance(message, kind)]


def tell(tree: Tree, parent: str, child: str, message: Message) -> None:
    """Have a broker say something to another one below it."""
    core = tree.cores[parent]
    core._outbox.to_worker(core.registry.by_name[child], message)
    tree._perform(parent, core._outbox.take())
    tree.run()
