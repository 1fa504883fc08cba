"""What chunks carry besides tokens and text: it comes with them, once, also over a recovery."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokenmq.client.events import Action, Deliver
from tokenmq.protocol.errors import ErrorCode
from tokenmq.protocol.messages import NO_ID, Cancel, Chunk, Chunks, Details, TokenLogprob, TokenLogprobs

from .story import Story, failure, key, make_chunk, sent


@pytest.fixture
def story() -> Story:
    story = Story()
    story.open_sessions()
    story.submit(1)
    return story


def logprobs(token: int) -> TokenLogprobs:
    return TokenLogprobs(token, f"t{token}", -float(token), (TokenLogprob(9, "t9", -0.5),))


def told(offset: int, tokens: int, *, attempt: int = 1, prompt: int = 0) -> Chunk:
    """A chunk with logprobs; `prompt`: as many of a prompt."""
    own = tuple(logprobs(token) for token in range(offset, offset + tokens))
    of_prompt = (None, *(logprobs(token) for token in range(1, prompt)))[:prompt]
    return replace(make_chunk(offset, tokens, attempt=attempt), details=Details(own, of_prompt))


def take(story: Story, chunk: Chunk) -> list[Action]:
    return story.receive(Chunks(NO_ID, (chunk,)))


def delivered(actions: list[Action]) -> list[Chunk]:
    return [action.chunk for action in actions if isinstance(action, Deliver)]


def test_a_chunk_tells_its_logprobs(story: Story) -> None:
    (chunk,) = delivered(take(story, told(0, 2, prompt=3)))
    assert chunk.logprobs == (logprobs(0), logprobs(1))
    assert chunk.prompt_logprobs == (None, logprobs(1), logprobs(2))
    (plain,) = delivered(take(story, make_chunk(2)))
    assert (plain.logprobs, plain.prompt_logprobs) == ((), ())


def test_over_recoveries_each_token_has_its_logprobs_once(story: Story) -> None:
    chunks = delivered(take(story, told(0, 2, prompt=2)))
    story.error()
    assert take(story, told(0, 2, prompt=2)) == [], "of an attempt that is closed"
    chunks += delivered(take(story, told(2, 1, attempt=2)))
    assert take(story, told(0, 2, attempt=2, prompt=2)) == [], "a repeat"
    assert take(story, told(2, 1, attempt=2)) == [], "a repeat"
    story.error(attempt=2)
    chunks += delivered(take(story, told(3, 2, attempt=3)))
    assert [one for chunk in chunks for one in chunk.logprobs] == [logprobs(token) for token in range(5)]
    assert [one for chunk in chunks for one in chunk.prompt_logprobs] == [None, logprobs(1)]


def test_an_overlap_is_asked_for_anew_and_not_delivered_in_part(story: Story) -> None:
    take(story, told(0, 2))
    assert delivered(take(story, told(1, 2))) == []
    (chunk,) = delivered(take(story, told(2, 2, attempt=2)))
    assert chunk.logprobs == (logprobs(2), logprobs(3))


@pytest.mark.parametrize(
    ("chunk", "told_of"),
    [
        (replace(told(2, 2), details=Details((logprobs(2),))), "logprobs of 1 tokens in a chunk of 2"),
        (replace(told(2, 1), token_ids=()), "logprobs of 1 tokens in a chunk of 0"),
        (told(2, 1, prompt=2), "logprobs of the prompt in front of token 2"),
        (replace(make_chunk(2), details=Details(vector=b"abcd")), "a vector, and a completion was asked for"),
    ],
)
def test_details_that_cannot_be_right_fail_the_stream(story: Story, chunk: Chunk, told_of: str) -> None:
    take(story, told(0, 2))
    actions = take(story, chunk)
    assert sent(actions) == [Cancel(key(1), 1)]
    assert failure(actions).code == ErrorCode.PROTOCOL.value
    assert told_of in failure(actions).message
