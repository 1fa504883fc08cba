"""`--log-prompts`: what is logged of a prompt, and that nothing is without it."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol.payload import Generation, pack_generation
from tokenmq.worker.engines.base import Failed
from tokenmq.worker.prompt_line import MAX_CHARS, begin_of_prompt

SECRET = "the launch code is 0000"


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (Generation(prompt="hello"), "hello"),
        (Generation(prompt="a" * MAX_CHARS), "a" * MAX_CHARS),
        (Generation(prompt="a" * 2_000_000), "a" * MAX_CHARS + "..."),
        (Generation(token_ids=(1, 22, 3)), "1 22 3"),
        (Generation(token_ids=(7,) * 151), "7 " * 149 + "7..."),
        (Generation(texts=("one", "two")), "one\ntwo"),
        (Generation(texts=("b" * 600, "c" * 600)), "b" * 600 + "\n" + "c" * 399 + "..."),
        (
            Generation(
                messages=(
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image"}]},
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
                )
            ),
            "system: be brief\nuser: what is\nuser: [image]",
        ),
        (Generation(messages=({"role": "user", "content": "d" * 5_000},) * 3), "user: " + "d" * 994 + "..."),
    ],
)
def test_the_begin_of_a_prompt(generation: Generation, expected: str) -> None:
    assert begin_of_prompt(generation) == expected


def told(say: Any, **settings: Any) -> list[Any]:
    """Return all log lines of a worker about requests with a secret in them: one that fails, two that are refused."""
    story = say.story(**settings)
    story.start()
    story.join()
    story.loaded()
    secret = pack_generation(Generation(prompt=SECRET))
    job = story.take(say.request(1, payload=secret))
    story.hear(say.request(2, payload=secret, expected_tokens=3))
    story.hear(say.request(3, payload=pack_generation(Generation(prompt=SECRET))[:-3]))
    story.engine(Failed(job.ticket, "engine_failed", f"KeyError: {SECRET}"))
    return [log for log in story.logs if log.request_id is not None]


def test_no_prompt_is_logged(say: Any) -> None:
    logs = told(say)
    assert {log.event for log in logs} == {"request_accepted", "request_refused", "request_finished"}
    assert SECRET not in str(logs)


def test_prompts_are_logged_where_that_is_asked_for(say: Any) -> None:
    prompts = [log for log in told(say, log_prompts=True) if SECRET in str(log)]
    assert [(log.event, log.request_id, log.fields) for log in prompts] == [
        ("prompt", say.id(1), {"attempt": 1, "prompt": SECRET})
    ]
