"""WorkerCore and its brokers: registration, heartbeats, every way in which a session ends, and the next one."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from tokenmq.protocol.enlistment import LIMITED_PAUSE_S, MAX_BACKOFF_S, UNREACHED_AGAIN_S, UNREACHED_S
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.links import Connected, Lost, Malformed, Open, Received, Refused, Send, Shut
from tokenmq.protocol.messages import (
    Credit,
    Disconnect,
    DisconnectCode,
    Draining,
    Finish,
    Goodbye,
    Heartbeat,
    Hello,
    ModelInfo,
    Query,
    Ready,
    Reply,
    WorkerState,
)
from tokenmq.protocol.refusal import Refusal
from tokenmq.worker.events import CancelJob, EngineProgress, Stop
from tokenmq.worker.rates import Rates


def test_it_opens_a_socket_and_registers_at_once_while_the_model_loads(fresh: Any, say: Any) -> None:
    assert fresh.start() == [Open(say.broker)]
    [send] = fresh.tell(Connected(say.broker))
    ready = send.message
    assert isinstance(ready, Ready)
    assert (ready.worker, ready.incarnation, ready.slots, ready.engine) == ("w1", 1000, 2, "fake")
    assert ready.models == (ModelInfo("toy"),)
    assert ready.load.state is WorkerState.LOADING
    assert fresh.accepted() == []
    assert [log.event for log in fresh.logs] == ["model_loading", "registered"]


def test_ready_goes_out_again_with_the_models_details_when_loading_is_done(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.join()
    [send] = fresh.loaded("toy", "more")
    assert send.message.models == (ModelInfo("toy", 2048, True), ModelInfo("more", 2048, True))
    assert send.message.load.state is WorkerState.READY
    assert fresh.core.state is WorkerState.READY


def test_without_a_models_name_it_registers_when_loading_is_done(say: Any) -> None:
    story = say.story(models=())
    story.start()
    assert story.tell(Connected(say.broker)) == []
    assert story.tick(30) == []
    [send] = story.loaded()
    assert isinstance(send.message, Ready)
    assert send.message.load.state is WorkerState.READY


def test_a_heartbeat_is_due_each_interval_and_counts_what_was_sent(ready: Any, say: Any) -> None:
    assert ready.core.next_deadline() == ready.now + 1.0
    assert ready.tick(0.9) == []
    [send] = ready.tick(0.1)
    assert send.message.sent == 2  # READY twice
    [send] = ready.tick(1.0)
    assert send.message.sent == 3


def test_chunks_do_not_put_the_heartbeat_off(ready: Any, say: Any) -> None:
    job = ready.take(say.request())
    ready.now += 0.9
    ready.engine(say.tokens(job, 1), running=1)
    [beat] = say.messages(ready.tick(0.1), Heartbeat)
    assert beat.sent == 3
    assert (beat.load.running, beat.load.waiting, beat.load.held) == (1, 0, 1)


def test_the_load_tells_apart_what_runs_what_waits_and_whose_it_is(say: Any) -> None:
    story = say.story(brokers=(say.broker, say.other))
    story.start()
    for broker in (say.broker, say.other):
        story.join(broker)
    story.loaded()
    jobs = [story.take(say.request(number), say.broker) for number in (1, 2)]
    story.take(say.request(1), say.other)  # the same id from another broker is another request
    story.tell(EngineProgress(7, story.now - 0.5, Rates(12.5, 3.0, 0.25, 0.5, 0.75)))
    story.engine(say.tokens(jobs[0], 1), running=2)
    beats = {
        action.broker: action.message.load for action in story.tick(1.0) if isinstance(action.message, Heartbeat)
    }
    assert {broker: load.held for broker, load in beats.items()} == {say.broker: 2, say.other: 1}
    load = beats[say.broker]
    assert (load.running, load.waiting, load.steps, load.tokens_per_s, load.step_age_s) == (2, 1, 7, 12.5, 1.5)
    assert (load.steps_per_s, load.prefill_use, load.decode_use, load.prefix_hits) == (3.0, 0.25, 0.5, 0.75)


def test_a_broker_hears_early_what_others_send_here_and_what_of_it_has_ended(say: Any) -> None:
    story = say.story(brokers=(say.broker, say.other))
    story.start()
    for broker in (say.broker, say.other):
        story.join(broker)
    story.loaded()
    mine, parked = story.take(say.request(1)), story.take(say.request(2, credit=0))

    def reports() -> list[tuple[str, int]]:
        sends = story.tick(0.05)
        assert len(say.messages(sends, Heartbeat)) == len(sends)
        return [(send.broker, send.message.load.running + send.message.load.waiting) for send in sends]

    assert reports() == [(say.other, 2)]
    story.engine(say.tokens(parked, 1), say.done(parked, 1))  # it only waits for its reader
    assert reports() == [(say.other, 1)]
    story.engine(say.tokens(mine, 1))
    assert reports() == []
    story.engine(say.done(mine, 1))
    story.engine(say.done(parked, 1))  # once more: an engine may be wrong, the figures are not
    assert reports() == [(say.other, 0)]


def test_a_long_step_makes_it_stalled_until_the_step_ends(ready: Any, say: Any) -> None:
    ready.tell(EngineProgress(5, ready.now))
    for _ in range(29):
        ready.tick(1.0)
        ready.hear(Heartbeat(ready.core._membership.sessions[say.broker].received))
    assert ready.core.state is WorkerState.READY
    assert ready.core.next_deadline() <= ready.now + 1.0
    [beat] = say.messages(ready.tick(1.0), Heartbeat)
    assert beat.load.state is WorkerState.STALLED
    assert beat.load.step_age_s == 30.0
    [beat] = say.messages(ready.tell(EngineProgress(6, None)), Heartbeat)
    assert beat.load.state is WorkerState.READY
    stalls = [log for log in ready.logs if log.event == "state" and log.fields["now"] == "stalled"]
    assert [log.level for log in stalls] == [logging.WARNING]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda broker: Lost(broker), "connection lost"),
        (lambda broker: Received(broker, Goodbye()), "the broker said goodbye"),
        (lambda broker: Received(broker, Disconnect(DisconnectCode.EXPIRED, "late")), "expired: late"),
        (lambda broker: Received(broker, Heartbeat(9)), "messages lost: 9 sent, 2 received"),
        (lambda broker: Received(broker, Hello("c", "s")), "unexpected HELLO"),
        (lambda broker: Received(broker, Draining()), "unexpected DRAINING"),
        (lambda broker: Received(broker, Query(bytes(16), "models")), "unexpected QUERY"),
        (lambda broker: Received(broker, Reply(bytes(16), None)), "unexpected REPLY"),
        (lambda broker: Malformed(broker, ProtocolError("no magic")), "malformed message: no magic"),
    ],
)
def test_every_end_of_a_session_cancels_what_it_held_and_leads_to_a_new_socket(
    ready: Any, say: Any, end: Any, reason: str
) -> None:
    job = ready.take(say.request())
    assert ready.tell(end(say.broker)) == [CancelJob(job.ticket), Shut(say.broker)]
    assert ready.logs[-1].event == "broker_lost"
    assert ready.logs[-1].fields["reason"] == reason
    assert ready.tick(0.049) == []
    assert ready.engine(say.tokens(job, 1), say.done(job, 1)) == []  # late outputs find nobody
    assert ready.tick(0.002) == [Open(say.broker)]
    [send] = ready.tell(Connected(say.broker))
    assert send.message.load.state is WorkerState.READY
    ready.accepted()
    [beat] = ready.tick(1.0)
    assert beat.message.sent == 1  # a new session counts anew


def test_silence_for_the_expiry_ends_the_session_and_any_message_puts_it_off(ready: Any, say: Any) -> None:
    ready.tick(4.0)
    ready.credit(1, 10)
    assert Shut(say.broker) not in ready.tick(4.9)
    assert Shut(say.broker) in ready.tick(0.2)
    assert ready.logs[-1].fields["reason"] == "silent for 5 s"


def test_silence_while_the_worker_did_not_listen_is_forgiven(ready: Any, say: Any) -> None:
    ready.core.forgive(60.0)
    assert Shut(say.broker) not in ready.tick(60.0)


def test_a_broker_that_never_accepts_is_given_up(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.tell(Connected(say.broker))
    assert Shut(say.broker) in fresh.tick(5.0)


def test_the_back_off_doubles_to_two_seconds_and_accepted_resets_it(fresh: Any, say: Any) -> None:
    fresh.start()
    pauses = []
    for _ in range(8):
        fresh.tell(Lost(say.broker))
        pauses.append(fresh.core.next_deadline() - fresh.now)
        fresh.now = fresh.core.next_deadline()
        assert fresh.tick() == [Open(say.broker)]
    assert pauses == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0])
    fresh.join()
    fresh.tell(Lost(say.broker))
    assert fresh.core.next_deadline() - fresh.now == pytest.approx(0.05)


def test_the_brokers_intervals_hold(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.tell(Connected(say.broker))
    fresh.accepted(heartbeat_s=10.0, expiry_s=50.0)
    assert fresh.core.next_deadline() == fresh.now + 10.0
    assert Shut(say.broker) not in fresh.tick(49.0)
    assert Shut(say.broker) in fresh.tick(1.0)


@pytest.mark.parametrize("code", [DisconnectCode.SUPERSEDED, DisconnectCode.REMOVED])
def test_superseded_and_removed_are_for_good(say: Any, code: DisconnectCode) -> None:
    story = say.story(brokers=(say.broker, say.other))
    story.start()
    story.join(say.broker)
    story.join(say.other)
    story.loaded()
    for_good = Disconnect(code, "newer")
    assert story.hear(for_good, say.broker) == [Shut(say.broker)]
    assert Open(say.broker) not in story.tick(3.0)
    job = story.take(say.request(), say.other)  # the other broker is served on
    orders = story.hear(for_good, say.other)
    assert orders[:2] == [CancelJob(job.ticket), Shut(say.other)]
    [stop] = orders[2:]
    assert isinstance(stop, Stop)
    assert stop.exit_code == (1 if code is DisconnectCode.SUPERSEDED else 0)  # an operator's order is no failure
    assert stop.reason.startswith(f"{code.value}: ")
    assert "'w1'" in stop.reason
    assert story.core.next_deadline() == math.inf
    assert story.tick(10.0) == []


@pytest.mark.parametrize("message", [Credit(bytes(16), 1, 5)])
def test_nothing_but_accepted_is_expected_before_it(fresh: Any, say: Any, message: Any) -> None:
    fresh.start()
    fresh.tell(Connected(say.broker))
    assert fresh.hear(message) == [Shut(say.broker)]


def test_a_request_before_accepted_ends_the_session(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.loaded()
    fresh.tell(Connected(say.broker))
    assert fresh.hear(say.request()) == [Shut(say.broker)]


def test_what_comes_between_two_sessions_is_ignored(ready: Any, say: Any) -> None:
    ready.tell(Lost(say.broker))
    assert ready.hear(say.request()) == []
    assert ready.tell(Lost(say.broker)) == []
    assert ready.tell(Connected(say.broker)) == []
    assert ready.tell(Malformed(say.broker, ProtocolError("x"))) == []


@pytest.mark.parametrize("end", [Goodbye(), Disconnect(DisconnectCode.EXPIRED, "late"), None])
def test_nothing_of_an_old_session_leaves_in_the_new_one(ready: Any, say: Any, end: Any) -> None:
    """Not even for the same attempt at the same request, which the new session has been given again."""
    working, parked = ready.take(say.request(1)), ready.take(say.request(2, credit=0))
    ready.engine(say.tokens(working, 1), say.tokens(parked, 1), say.done(parked, 1))
    ready.tell(Lost(say.broker) if end is None else Received(say.broker, end))
    ready.tick(0.05)
    ready.join()
    assert ready.credit(2, 100) == []
    again = ready.take(say.request(1))
    assert again.ticket != working.ticket
    # The engine was in a step: what it brings for the old job finds nobody, what it brings for the new one leaves.
    orders = ready.engine(say.tokens(working, 2), say.tokens(again, 3), say.done(working, 2))
    [chunk] = say.chunks(orders)
    assert (chunk.offset, chunk.token_ids) == (0, (3,))
    assert not say.messages(orders, Finish)
    [end_of_new] = say.messages(ready.engine(say.done(again, 1)), Finish)
    assert end_of_new.usage.completion_tokens == 1


def test_one_lost_broker_leaves_the_other_alone(say: Any) -> None:
    story = say.story(brokers=(say.broker, say.other))
    story.start()
    story.join(say.broker)
    story.join(say.other)
    story.loaded()
    mine, theirs = story.take(say.request(1), say.broker), story.take(say.request(2), say.other)
    assert story.tell(Lost(say.broker)) == [CancelJob(mine.ticket), Shut(say.broker)]
    [send] = story.engine(say.tokens(mine, 1), say.tokens(theirs, 2))
    assert isinstance(send, Send)
    assert send.broker == say.other


def refusals(story: Any) -> list[Any]:
    return [log for log in story.logs if log.event == "connection_refused"]


def test_who_is_refused_tries_again_after_a_pause_and_says_so_once_a_minute(fresh: Any, say: Any) -> None:
    fresh.start()
    began, tries = fresh.now, 0
    while fresh.now < began + UNREACHED_AGAIN_S - 1:
        assert fresh.tell(Refused(say.broker, Refusal.FORBIDDEN)) == [Shut(say.broker)]
        while not (actions := fresh.tick(0.05)):
            pass
        assert actions == [Open(say.broker)]
        tries += 1
    assert UNREACHED_AGAIN_S / MAX_BACKOFF_S - 3 < tries < UNREACHED_AGAIN_S / MAX_BACKOFF_S + 10
    [told] = refusals(fresh)
    assert told.fields["broker"] == say.broker
    assert "does not admit this key" in told.fields["reason"]
    assert "expected the key of a worker" in told.fields["reason"]
    fresh.tell(Refused(say.broker, Refusal.MISMATCH))  # that is news
    assert "wants keys" in refusals(fresh)[-1].fields["reason"]


def test_a_key_that_is_enrolled_later_is_let_in(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.tell(Refused(say.broker, Refusal.FORBIDDEN))
    fresh.tick(MAX_BACKOFF_S)
    fresh.join()
    fresh.tell(Lost(say.broker))
    fresh.tick(MAX_BACKOFF_S)
    fresh.tell(Refused(say.broker, Refusal.FORBIDDEN))  # and revoked then: a line of its own
    assert len(refusals(fresh)) == 2


def test_a_name_that_is_not_the_keys_is_tried_ever_less_often(fresh: Any, say: Any) -> None:
    fresh.start()
    pauses = []
    for _ in range(3):
        fresh.tell(Connected(say.broker))
        fresh.tell(Received(say.broker, Disconnect(DisconnectCode.FORBIDDEN, "the name is another key's")))
        pauses.append(fresh.logs[-1].fields["retry_s"])
        fresh.tick(pauses[-1])
    assert pauses == [1.0, 2.0, 4.0]


def test_who_has_sent_too_much_stays_away_for_a_while(fresh: Any, say: Any) -> None:
    fresh.start()
    fresh.join()
    fresh.tell(Received(say.broker, Disconnect(DisconnectCode.RATE_LIMITED, "more than 100 messages a second")))
    assert fresh.logs[-1].fields["retry_s"] == LIMITED_PAUSE_S
    assert fresh.tick(LIMITED_PAUSE_S - 0.1) == []
    assert fresh.tick(0.2) == [Open(say.broker)]


def test_a_broker_that_is_not_there_is_told_after_a_while_and_again_later(fresh: Any, say: Any) -> None:
    fresh.start()
    assert fresh.tick(UNREACHED_S - 0.1) == []
    assert "broker_unreached" not in [log.event for log in fresh.logs]
    fresh.tick(0.1)
    fresh.tick(UNREACHED_AGAIN_S - 0.1)
    [told] = [log for log in fresh.logs if log.event == "broker_unreached"]
    assert told.fields["broker"] == say.broker
    fresh.tick(0.1)
    assert [log.event for log in fresh.logs].count("broker_unreached") == 2
    fresh.join()
    fresh.tick(1.0)
    assert [log.event for log in fresh.logs].count("broker_unreached") == 2
