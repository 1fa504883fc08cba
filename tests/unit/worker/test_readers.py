"""WorkerCore and readers that grant no credit: how long their tokens are kept, and how many."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.links import Connected, Lost
from tokenmq.protocol.messages import Cancel, Chunks, Error, Finish, Parked
from tokenmq.worker.events import CancelJob

TIMEOUT_S = 20.0


@pytest.fixture
def patient(say: Any) -> Any:
    """A worker whose readers have 20 s, and whose broker is never silent for too long."""
    story = say.story(reader_timeout_s=TIMEOUT_S)
    story.start()
    story.tell(Connected(say.broker))
    story.accepted(heartbeat_s=1000.0, expiry_s=5000.0)
    story.loaded()
    return story


def errors(say: Any, actions: Any) -> list[tuple[bytes, str, bool]]:
    return [(error.id, error.code, error.retryable) for error in say.messages(actions, Error)]


def test_a_reader_that_grants_nothing_is_given_up(patient: Any, say: Any) -> None:
    job = patient.take(say.request(1, credit=1))
    patient.tick(50.0)  # nothing waits yet
    patient.engine(say.tokens(job, 1))
    patient.tick(50.0)  # nor now: all has been sent
    patient.engine(say.tokens(job, 2))
    assert patient.core.next_deadline() == patient.now + TIMEOUT_S
    assert patient.tick(TIMEOUT_S - 0.01) == []
    cancel, send = patient.tick(0.01)
    assert cancel == CancelJob(job.ticket)
    assert errors(say, [send]) == [(say.id(1), "reader_timeout", False)]
    assert "20 s" in send.message.message
    assert patient.logs[-1].fields["outcome"] == "reader_timeout"
    assert patient.engine(say.tokens(job, 3), say.done(job, 3)) == []
    assert patient.credit(1, 100) == []


def test_more_tokens_do_not_put_it_off(patient: Any, say: Any) -> None:
    job = patient.take(say.request(1, credit=0))
    for _ in range(4):
        patient.engine(say.tokens(job, 1))
        patient.now += TIMEOUT_S / 4
    assert errors(say, patient.tick()) == [(say.id(1), "reader_timeout", False)]


def test_what_the_engine_has_ended_needs_no_cancel(patient: Any, say: Any) -> None:
    job = patient.take(say.request(1, credit=0))
    assert say.messages(patient.engine(say.tokens(job, 1), say.done(job, 1)), Parked)
    [send] = patient.tick(TIMEOUT_S)
    assert errors(say, [send]) == [(say.id(1), "reader_timeout", False)]


def test_each_grant_gives_a_slow_reader_new_time(patient: Any, say: Any) -> None:
    job = patient.take(say.request(1, credit=0))
    patient.engine(*(say.tokens(job, number) for number in range(5)))
    for limit in range(1, 5):
        assert patient.tick(TIMEOUT_S - 0.01) == []
        assert len(say.chunks(patient.credit(1, limit))) == 1
    assert patient.tick(TIMEOUT_S - 0.01) == []
    assert patient.credit(1, 4) == []  # a grant that grants nothing
    assert errors(say, patient.tick(0.01)) == [(say.id(1), "reader_timeout", False)]


def test_a_reader_that_catches_up_is_not_watched(patient: Any, say: Any) -> None:
    before = patient.core.next_deadline()
    job = patient.take(say.request(1, credit=0))
    patient.engine(say.tokens(job, 1))
    patient.credit(1, 1)
    assert patient.core.next_deadline() == before
    patient.tick(TIMEOUT_S)
    assert say.messages(patient.engine(say.done(job, 1)), Finish)


def test_those_that_have_waited_longest_go_first(patient: Any, say: Any) -> None:
    jobs = {number: patient.take(say.request(number, credit=0)) for number in (1, 2, 3)}
    for number in (2, 1, 3):
        patient.engine(say.tokens(jobs[number], 1), say.tokens(jobs[number], 2))
        patient.now += 1.0
    patient.credit(2, 1)
    patient.now += TIMEOUT_S - 2.0
    assert errors(say, patient.tick()) == [(say.id(1), "reader_timeout", False)]
    assert errors(say, patient.tick(1.0)) == [(say.id(3), "reader_timeout", False)]
    assert errors(say, patient.tick(1.0)) == [(say.id(2), "reader_timeout", False)]


@pytest.mark.parametrize("parked", [False, True])
def test_streams_that_are_over_are_not_watched(patient: Any, say: Any, parked: bool) -> None:
    before = patient.core.next_deadline()
    for number in (1, 2):
        job = patient.take(say.request(number, credit=0))
        patient.engine(say.tokens(job, 1), *([say.done(job, 1)] if parked else []))
    patient.hear(Cancel(say.id(1), 1))
    assert patient.core.next_deadline() <= patient.now + TIMEOUT_S
    patient.tell(Lost(say.broker))
    assert patient.core.next_deadline() < before  # the next dial, and nothing else
    patient.tick(TIMEOUT_S)


def test_what_is_kept_for_parked_requests_is_bounded_in_tokens(
    patient: Any, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenmq.worker.desk.MOST_PARKED_TOKENS", 5)

    def offer(number: int, tokens: int) -> bool:
        """Let a request end with so many tokens that nobody has credit for; tell whether it was parked."""
        job = patient.take(say.request(number, credit=0))
        return bool(say.messages(patient.engine(say.tokens(job, *range(tokens)), say.done(job, tokens)), Parked))

    assert not offer(0, 6)  # it keeps its slot
    assert offer(1, 3)
    assert not offer(2, 3)
    assert offer(3, 2)
    assert [type(order.message) for order in patient.credit(1, 2)] == [Chunks]  # 2 of 3 have gone: 3 are kept
    assert offer(4, 2)
    assert not offer(5, 1)
    assert say.messages(patient.hear(Cancel(say.id(3), 1)), Finish)
    assert [type(order.message) for order in patient.credit(4, 2)] == [Chunks, Finish]
    assert patient.core._streams.parked_tokens == 1
    assert offer(6, 4)
    assert not offer(7, 1)
