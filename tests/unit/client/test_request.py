"""From arguments to the envelope: what is checked, and what the broker is told without reading the payload."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from tokenmq.client.affinity import BEGINNING_CHARS, BEGINNING_TOKENS
from tokenmq.client.events import Submit
from tokenmq.client.request import SOURCE, build_submit, seeds
from tokenmq.protocol import limits
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.payload import MAX_SEED, Generation, Sampling, pack_generation, unpack_generation

from .story import Story, key, request


def build(sampling: dict[str, Any] | None = None, **given: Any) -> Submit:
    source = {name: given.pop(name) for name in (*SOURCE, "texts") if name in given}
    return build_submit("m", source or {"prompt": "x"}, sampling or {}, window_tokens=8, **given)


def generation(sampling: dict[str, Any] | None = None, **given: Any) -> Generation:
    return unpack_generation(build(sampling, **given).payload)


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


def test_embeddings_are_at_home_nowhere() -> None:
    assert affinity(texts=["x"]) == ""


# The payload


def test_what_is_not_said_is_the_default_but_for_the_seed() -> None:
    nothing = {"seed": None, "logit_bias": None, "logprobs": None, "json_schema": None, "regex": None}
    first, second = generation(nothing).sampling, generation().sampling
    assert replace(first, seed=0) == replace(second, seed=0) == Sampling()
    assert first.seed != second.seed


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"stop": "end"}, {"stop": ("end",)}),
        ({"bad_words": "no"}, {"bad_words": ("no",)}),
        ({"bad_words": ["no", "never"]}, {"bad_words": ("no", "never")}),
        ({"logit_bias": {7: -5, 3: 0.5}}, {"logit_bias": ((7, -5.0), (3, 0.5))}),
        ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": '{"type": "string"}'}, {"json_schema": '{"type": "string"}'}),
        ({"choice": ["ja", "nein"]}, {"choice": ("ja", "nein")}),
        ({"regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"min_p": 0.1, "min_tokens": 3, "logprobs": 0}, {"min_p": 0.1, "min_tokens": 3, "logprobs": 0}),
        (
            {"repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 2},
            {"repetition_penalty": 1.1, "presence_penalty": -1.0, "frequency_penalty": 2.0},
        ),
    ],
)
def test_sampling_is_put_in_the_form_of_the_wire(given: dict[str, Any], sent: dict[str, Any]) -> None:
    assert generation({"seed": 1, **given}).sampling == replace(Sampling(seed=1), **sent)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"choice": "yes"}, "choice: expected a list"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {1: "b"}}, "logit_bias"),
        ({"json_schema": {"type": object}}, "json_schema: cannot be written as JSON"),
        ({"json_schema": {"a": 1}, "regex": "x"}, "got json_schema and regex"),
        ({"max_tokens": None}, "max_tokens: expected an integer"),
        ({"logprobs": True}, "logprobs"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens: 9, max_tokens is 8"),
    ],
)
def test_sampling_that_cannot_be_is_named(sampling: dict[str, Any], told: str) -> None:
    with pytest.raises(BadRequestError, match=told):
        build(sampling)


def test_a_chats_tools_and_template_go_along() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [turn("user", "x")]
    sent = generation(messages=messages, tools=tools, template={"enable_thinking": False}, echo=True)
    assert (sent.tools, sent.template, sent.echo) == (tuple(tools), {"enable_thinking": False}, True)
    plain = generation(messages=messages, tools=(), template=None)
    assert (plain.tools, plain.template, plain.echo) == ((), {}, False)


def test_seeds_of_several_follow_one_another() -> None:
    assert list(seeds(3, 7)) == [7, 8, 9]
    assert list(seeds(1, MAX_SEED)) == [MAX_SEED]
    drawn = seeds(limits.MAX_COMPLETIONS, None)
    assert len(drawn) == limits.MAX_COMPLETIONS
    assert drawn[-1] <= MAX_SEED
    for n, first, told in (
        (0, 1, "n: expected"),
        (1025, 1, "n: expected"),
        (2.0, 1, "n: expected"),
        (2, MAX_SEED, "seed"),
    ):
        with pytest.raises(BadRequestError, match=told):
            seeds(n, first)  # type: ignore[arg-type]


def test_a_stream_that_comes_ahead_has_credit_for_all_its_tokens() -> None:
    assert build({"max_tokens": 5}, ahead=True).window.limit == 8
    assert build({"max_tokens": 50}, ahead=True).window.limit == 50
    assert build({"max_tokens": 50}).window.limit == 8


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
