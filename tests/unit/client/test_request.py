"""From arguments to the envelope: what is checked, and what the broker is told without reading the payload."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from tokenmq.client.affinity import BEGINNING_CHARS, BEGINNING_TOKENS
from tokenmq.client.events import Submit
from tokenmq.client.request import SOURCE, build_submit
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.payload import Generation, Sampling, pack_generation

from .story import Story, key, request



def build(sampling: dict[str, Any] | None = None, **given: Any) -> Submit:
    source = {name: given.pop(name) for name in (*SOURCE, "texts") if name in given}
    return build_submit("m", source or {"prompt": "x"}, sampling or {}, window_tokens=8, **given)


def affinity(**given: Any) -> str:
    return build(**given).affinity


# Affinity


def test_an_affinity_is_sixteen_hexadecimal_digits() -> None:
    for source in ({"prompt": "x"}, {"token_ids": [1]}, {"messages": [turn("user", "x")]}, {"session": "s"}):
        found = affinity(**source)
        assert len(found) == 16
        assert int(found, 16) >= 0


def test_prompts_share_their_beginning() -> None:
    beginning = "ä" * BEGINNING_CHARS
    assert affinity(prompt=beginning) == affinity(prompt=beginning + "one") == affinity(prompt=beginning + "two")
    assert affinity(prompt=beginning[1:] + "o") != affinity(prompt=beginning)
    assert affinity(prompt="one") != affinity(prompt="two")


def test_token_ids_share_their_beginning() -> None:
    beginning = list(range(BEGINNING_TOKENS))
    assert affinity(token_ids=beginning) == affinity(token_ids=[*beginning, 7])
    assert affinity(token_ids=beginning) != affinity(token_ids=[*beginning[:-1], 7])


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_all_turns_of_a_conversation_have_one_affinity_and_conversations_differ() -> None:
    system = turn("system", "Be brief.")
    talk = [system, turn("user", "Hello"), turn("assistant", "Hi"), turn("user", "And?")]
    first = affinity(messages=talk[:2])
    assert first == affinity(messages=talk[:3]) == affinity(messages=talk)
    assert first != affinity(messages=[system, turn("user", "Hullo")])
    assert first != affinity(messages=[turn("system", "Be long."), talk[1]])
    assert affinity(messages=talk[1:]) == affinity(messages=talk[1:2])


def test_messages_without_a_user_count_whole() -> None:
    assert affinity(messages=[turn("system", "a")]) != affinity(messages=[turn("system", "a"), turn("tool", "b")])


def test_a_session_counts_in_place_of_the_prompt() -> None:
    assert affinity(prompt="one", session="s") == affinity(token_ids=[1, 2], session="s")
    assert affinity(prompt="x", session="s") != affinity(prompt="x", session="t")
    assert affinity(prompt="x", session="x") != affinity(prompt="x")


def test_every_process_finds_the_same_affinity() -> None:
    program = (
        "from tokenmq.client.affinity import affinity_of; from tokenmq.protocol.payload import Generation;"
        "print(affinity_of(Generation(prompt='The sea is')))"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == affinity(prompt="The sea is")


# Checks


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("priority", -1, "request.priority: expected an integer from 0 to 9, got -1"),
        ("priority", 10, "from 0 to 9"),
        ("priority", True, "from 0 to 9"),
        ("priority", 5.0, "from 0 to 9"),
        ("session", "", "request.session: expected a string of 1 to 256 characters"),
        ("session", 7, "request.session"),
        ("session", "\ud800", "request.session: cannot be packed"),
        ("hedge_after_s", 0, "request.hedge_after_s: expected seconds, more than 0"),
        ("hedge_after_s", math.nan, "request.hedge_after_s"),
        ("hedge_after_s", "1", "request.hedge_after_s"),
        ("hedge_after_s", True, "request.hedge_after_s"),
        ("explain", 1, "request.explain: expected true or false, got 1"),
        ("resume", None, "request.resume: expected true or false"),
        ("deadline_s", -1.0, "request.deadline_s"),
    ],
)
def test_what_is_wrong_is_named(field: str, value: object, told: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        build(**{field: value})
    assert told in caught.value.message


def test_an_infinite_hedge_after_is_none() -> None:
    assert build(hedge_after_s=math.inf).hedge_after_s is None
    assert build(hedge_after_s=2).hedge_after_s == 2.0


# The envelope


def test_the_broker_is_told_what_it_shares_out_by() -> None:
    order = build({"max_tokens": 40}, priority=7, session="s", explain=True)
    story = Story()
    story.open_sessions()
    envelope = request(story.handle(order)).envelope
    assert (envelope.expected_tokens, envelope.priority, envelope.affinity) == (40, 7, order.affinity)
    assert envelope.explain
    assert not envelope.hedge


def test_what_is_expected_shrinks_with_what_has_come_in_every_attempt() -> None:
    payload = pack_generation(Generation(prompt="x", sampling=Sampling(max_tokens=5)))
    story = Story()
    story.open_sessions()
    assert request(story.submit(1, payload=payload, max_tokens=5)).envelope.expected_tokens == 5
    story.chunk(0, 2)
    assert request(story.error()).envelope.expected_tokens == 3
    story.chunk(2, 3, attempt=2)
    again = request(story.error(attempt=2)).envelope
    assert (again.expected_tokens, again.prior_tokens) == (0, 5)
    assert story.windows[key(1)].received == 5
