"""What a generation may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.protocol import limits, payload
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.packing import pack
from tokenmq.protocol.payload import (
    MAX_SEED,
    Generation,
    Sampling,
    check_generation,
    pack_generation,
    unpack_generation,
)

USER = {"role": "user", "content": "Hi"}


def refusal(value: Any) -> str:
    with pytest.raises(BadRequestError) as caught:
        check_generation(value)
    message = caught.value.message
    assert caught.value.code == "bad_request"
    assert message.startswith("request")
    assert len(message) < 300
    # What the library says of the user's own data, the worker says of the same bytes.
    try:
        payload = pack(value)
    except Exception:
        return message
    with pytest.raises(BadRequestError) as caught:
        unpack_generation(payload)
    # A key of another type is found before there is a path to name.
    assert caught.value.message == message or caught.value.message.endswith("a map has a key that is not a string")
    return message


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "a"},
        {"prompt": "a", "token_ids": None, "messages": None},
        {"token_ids": [0, limits.MAX_TOKEN_ID]},
        {"messages": [USER]},
        {"messages": [{**USER, "content": "", "tool_calls": [{"id": "1", "arguments": {}}]}]},
        {"prompt": "a", "sampling": {}},
        {"prompt": "a", "sampling": {"temperature": 0, "top_p": 1, "seed": MAX_SEED, "stop": ["x"] * 64}},
    ],
)
def test_good_requests_come_through_unchanged(value: dict[str, Any]) -> None:
    generation = check_generation(value)
    assert unpack_generation(pack_generation(generation)) == generation


def test_defaults() -> None:
    assert check_generation({"prompt": "a"}) == Generation(prompt="a", sampling=Sampling())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "request: expected a map, got None"),
        ([], "request: expected a map, got a list of 0"),
        ({}, "request: give exactly one of prompt, token_ids, messages and texts; got none"),
        ({"prompt": None}, "got none"),
        ({"prompt": "a", "messages": [USER]}, "got prompt and messages"),
        ({"prompt": ""}, "request.prompt: expected a string of 1 to 4000000 characters, got ''"),
        ({"prompt": b"a"}, "request.prompt: expected a string"),
        ({"prompt": "a" * 4_000_001}, "(4000001 characters)"),
        ({"token_ids": []}, "request.token_ids: expected a list of 1 to 1048576 integers"),
        ({"token_ids": [1, -1]}, "request.token_ids[1]: expected an integer from 0 to 2147483647, got -1"),
        ({"token_ids": "abc"}, "request.token_ids: expected a list"),
        ({"messages": []}, "request.messages: expected a list of 1 to 4096 elements"),
        ({"messages": [USER] * 4097}, "got a list of 4097"),
        ({"messages": USER}, "request.messages: expected a list of 1 to 4096 elements, got a map of 2"),
        ({"messages": ["Hi"]}, "request.messages[0]: expected a map, got 'Hi'"),
        ({"messages": [USER, {}]}, "request.messages[1]: missing role, content"),
        ({"messages": [{"role": "user"}]}, "request.messages[0]: missing content"),
        ({"messages": [{**USER, "role": ""}]}, "request.messages[0].role: expected a string of 1 to 256 characters"),
        ({"messages": [{**USER, "role": 1}]}, "request.messages[0].role: expected a string"),
        ({"messages": [{**USER, "content": ["a"]}]}, "request.messages[0].content[0]: expected a map with a type"),
        ({"messages": [{**USER, "x": float("nan")}]}, "request.messages[0]: expected finite numbers only"),
        ({"messages": [{**USER, "x": {1: 2}}]}, "request.messages[0]: a map has a key that is not a string"),
        ({"messages": [{**USER, "x": 2**64}]}, "request.messages[0]: expected integers of 64 bits at most"),
        (
            {"prompt": "a", "max_tokens": 5},
            "request: unknown 'max_tokens'; known are echo, messages, prior, prompt, sampling",
        ),
        ({"prompt": "a", "sampling": None}, "request.sampling: expected a map, got None"),
        ({"prompt": "a", "sampling": {"max_token": 5}}, "request.sampling: unknown 'max_token'; known are"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_requests(value: Any, expected: str) -> None:
    assert expected in refusal(value)


@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        ("max_tokens", 0, "an integer from 1 to 1048576, got 0"),
        ("max_tokens", True, "an integer from 1 to 1048576, got True"),
        ("max_tokens", 1.5, "got 1.5"),
        ("max_tokens", limits.MAX_NEW_TOKENS + 1, "got 1048577"),
        ("temperature", -0.1, "a number from 0 to 100, got -0.1"),
        ("temperature", 101, "got 101"),
        ("temperature", float("nan"), "got nan"),
        ("temperature", "hot", "got 'hot'"),
        ("top_k", -1, "an integer from 0 to 2147483647, got -1"),
        ("top_k", 2**31, "got 2147483648"),
        ("top_p", 0, "a number from 1e-09 to 1, got 0"),
        ("top_p", 1.01, "got 1.01"),
        ("top_p", False, "got False"),
        ("seed", -1, "an integer from 0 to 9223372036854775807, got -1"),
        ("seed", MAX_SEED + 1, "got 9223372036854775808"),
        ("stop", "\n", "a list of 0 to 64 elements"),
        ("stop", ["x"] * 65, "got a list of 65"),
        ("stop_token_ids", [2**31], "[0]: expected an integer from 0 to 2147483647"),
        ("stop_token_ids", [1] * 65, "a list of 0 to 64 integers"),
        ("ignore_eos", 1, "true or false, got 1"),
    ],
)
def test_bad_sampling(name: str, bad: Any, expected: str) -> None:
    message = refusal({"prompt": "a", "sampling": {name: bad}})
    assert message.startswith(f"request.sampling.{name}")
    assert expected in message


@pytest.mark.parametrize(("stop", "got"), [("", "got ''"), ("x" * 1025, "(1025 characters)")])
def test_each_stop_string_is_checked(stop: str, got: str) -> None:
    message = refusal({"prompt": "a", "sampling": {"stop": ["ok", stop]}})
    assert message.startswith("request.sampling.stop[1]: expected a string of 1 to 1024 characters")
    assert message.endswith(got)


def test_a_prompt_is_not_repeated_in_errors() -> None:
    message = refusal({"messages": [{"role": "user", "content": ["a secret"]}]})
    assert "secret" not in message


def test_lone_surrogates_are_refused_before_they_are_sent() -> None:
    with pytest.raises(BadRequestError, match="request: cannot be packed"):
        pack_generation(Generation(prompt="\ud800"))


def test_payload_size_is_bounded_on_both_sides() -> None:
    messages = tuple({"role": "user", "content": "海" * 2_000_000} for _ in range(3))
    with pytest.raises(BadRequestError, match="bytes, at most 16777216 are allowed"):
        pack_generation(Generation(messages=messages))
    with pytest.raises(BadRequestError, match="request: 16777217 bytes, at most 16777216 are allowed"):
        unpack_generation(bytes(limits.MAX_PAYLOAD_BYTES + 1))


def test_the_longest_prompt_of_tokens_passes() -> None:
    generation = Generation(token_ids=(1,) * limits.MAX_PROMPT_TOKENS)
    assert unpack_generation(pack_generation(generation)) == generation


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"enum": [1] * limits.MAX_CHAT_VALUES}]},
        {"template": {"a": {str(key): {"b": None} for key in range(limits.MAX_CHAT_VALUES // 2)}}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1024}] * 64},
    ],
    ids=["tools", "template", "messages"],
)
def test_values_of_a_chat_are_counted_before_they_are_looked_at(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload, "_GENERATION", lambda _value, _path: pytest.fail("each value was looked at"))
    assert "more than 65536 values together" in refusal({"messages": [USER], **more})


def test_the_most_messages_with_the_most_tools_are_taken() -> None:
    tool = {"type": "function", "function": {str(key): key for key in range(43)}}
    value = {"messages": [USER] * limits.MAX_MESSAGES, "tools": [tool] * limits.MAX_TOOLS}
    assert len(check_generation(value).tools) == limits.MAX_TOOLS
