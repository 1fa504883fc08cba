"""Requests for embeddings in the core: each vector is delivered once, whatever fails on the way."""

from __future__ import annotations

import pytest

from tokenmq.client.events import Action, Deliver
from tokenmq.protocol.errors import ErrorCode, FirstTokenTimeoutError, InterTokenTimeoutError, WorkerLostError
from tokenmq.protocol.messages import NO_ID, Cancel, Chunk, Chunks, Details, Finish, FinishReason, Timings, Usage
from tokenmq.protocol.payload import Generation, pack_generation

from .story import ONE, TWO, Story, ended, ending, failure, key, patience, request, requests, sent

TEXTS = ("one", "two", "three")
PAYLOAD = pack_generation(Generation(texts=TEXTS))


@pytest.fixture
def story() -> Story:
    story = Story(ONE, TWO)
    story.open_sessions()
    return story


def submit(story: Story, *, resume: bool = True, hedge_after_s: float | None = None) -> list[Action]:
    return story.submit(1, payload=PAYLOAD, attachments=(), texts=3, resume=resume, hedge_after_s=hedge_after_s)


def vector(index: int, attempt: int = 1) -> Chunk:
    return Chunk(key(1), attempt, index, 0, (), "", Details(vector=bytes([index, 0, 0, 0])))


def take(story: Story, *chunks: Chunk) -> list[int]:
    """Return the numbers of the texts whose vectors are delivered."""
    actions = story.receive(Chunks(NO_ID, chunks))
    return [action.chunk.index for action in actions if isinstance(action, Deliver)]


def finish(story: Story, attempt: int = 1, reason: FinishReason = FinishReason.STOP) -> list[Action]:
    return story.receive(Finish(key(1), attempt, reason, Usage(3, 0), Timings(), "w1"))


def test_vectors_come_in_any_order_and_then_the_end(story: Story) -> None:
    envelope = request(submit(story)).envelope
    assert (envelope.expected_tokens, envelope.prior_tokens) == (0, 0)
    assert take(story, vector(2), vector(0)) == [2, 0]
    assert take(story, vector(1)) == [1]
    assert ending(finish(story)).usage == Usage(3, 0)


def test_what_is_lost_is_asked_for_again_and_what_is_here_comes_once(story: Story) -> None:
    submit(story)
    story.started("w1")
    assert take(story, vector(0), vector(2)) == [0, 2]
    again = request(story.error("worker_lost", worker="w1"))
    assert (again.payload, again.envelope.prior_tokens, again.envelope.avoid) == (PAYLOAD, 0, ("w1",))
    assert take(story, vector(1)) == []  # of the attempt that is closed
    assert take(story, vector(0, 2), vector(1, 2), vector(2, 2)) == [1]
    assert story.core.dropped == {"attempt": 1, "repeat": 2}
    end = ended(finish(story, attempt=2))
    assert [(attempt.number, attempt.first_token) for attempt in end.attempts] == [(1, 0), (2, 2)]


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.CANCELLED])
def test_an_end_before_all_vectors_is_a_loss(story: Story, reason: FinishReason) -> None:
    submit(story)
    take(story, vector(0))
    assert requests(finish(story, reason=reason))
    take(story, vector(1, 2), vector(2, 2))
    ending(finish(story, attempt=2))


def test_without_resume_it_is_an_error(story: Story) -> None:
    submit(story, resume=False)
    take(story, vector(0))
    error = failure(finish(story))
    assert isinstance(error, WorkerLostError)
    assert "the vectors of 1 texts, 3 were given" in error.message


def test_a_vector_is_progress_and_a_repeat_is_a_sign_of_life() -> None:
    story = Story(ONE, max_attempts=2, first_token_timeout_s=4.0, inter_token_timeout_s=2.0, resume=True)
    story.open_sessions()
    submit(story)
    story.started("w1")
    take(story, vector(0))
    assert requests(patience(story, 2.0))  # no further vector within the second timeout
    story.started("w2", attempt=2)
    patience(story, 3.0)
    assert take(story, vector(0, 2)) == []
    assert not sent(patience(story, 3.0)), "it was heard of 3 s ago"
    actions = patience(story, 2.0)
    assert isinstance(failure(actions), FirstTokenTimeoutError)
    submit(story, resume=False)
    story.started("w1")
    take(story, vector(0))
    assert isinstance(failure(patience(story, 2.0)), InterTokenTimeoutError)


def test_of_a_hedged_pair_the_first_to_bring_a_new_vector_goes_on(story: Story) -> None:
    submit(story, hedge_after_s=1.0)
    story.started("slow")
    hedge = request(patience(story, 1.0))
    assert (hedge.payload, hedge.envelope.hedge) == (PAYLOAD, True)
    story.started("quick", attempt=2)
    actions = story.receive(Chunks(NO_ID, (vector(1, 2),)))
    assert sent(actions) == [Cancel(key(1), 1)]
    assert take(story, vector(0)) == []
    assert take(story, vector(0, 2), vector(2, 2)) == [0, 2]
    ending(finish(story, attempt=2))


@pytest.mark.parametrize(
    ("chunk", "told"),
    [
        (vector(3), "a vector of text 3, 3 were given"),
        (Chunk(key(1), 1, 0, 0, (7,), "x"), "a chunk without a vector"),
        (Chunk(key(1), 1, 0, 0, (), ""), "a chunk without a vector"),
        (Chunk(key(1), 1, 0, 0, (7,), "", Details(vector=b"abcd")), "a chunk without a vector"),
    ],
)
def test_what_is_no_vector_fails_the_request(story: Story, chunk: Chunk, told: str) -> None:
    submit(story)
    actions = story.receive(Chunks(NO_ID, (chunk,)))
    assert sent(actions) == [Cancel(key(1), 1)]
    assert failure(actions).code == ErrorCode.PROTOCOL.value
    assert told in failure(actions).message
