"""What the openai engine does without a socket: events, pieces, counting, bodies, words of errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmq.protocol.errors import BadRequestError, ErrorCode
from tokenmq.protocol.messages import FinishReason
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import Done, Failed, Job, Output
from tokenmq.worker.engines.openai import body, faults, pieces, sse
from tokenmq.worker.engines.openai.dialects import DIALECTS, LLAMA_CPP, OPENAI, SGLANG, TRANSFORMERS, VLLM
from tokenmq.worker.engines.openai.pieces import Call, Piece
from tokenmq.worker.engines.openai.row import MAX_SURPLUS, MAX_UNPAID_CHARS, Row

from .conftest import done, failure, ids, text

PNG, JPEG, WEBP = b"\x89PNG\r\n\x1a\n...", b"\xff\xd8\xff...", b"RIFF....WEBP..."


# --- events ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40)), st.sampled_from(["\n", "\r\n"]))
def test_events_do_not_depend_on_how_they_are_cut(cuts: list[int], newline: str) -> None:
    stream = newline.join(
        [": a comment", "event: x", "data: one", "", "data:two", "data: more", "", "", "id: 7", "", "data: {}", ""]
    ).encode()
    reader, events, at = sse.EventReader(), [], 0
    for cut in [*cuts, len(stream)]:
        events += reader.feed(stream[at : at + cut])
        at += cut
    assert [*events, *reader.end()] == [b"one", b"two\nmore", b"{}"]


@pytest.mark.parametrize("part", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n"])
def test_an_event_without_end_is_not_kept(part: bytes) -> None:
    reader = sse.EventReader()
    parts = [part] * (2 * sse.MAX_EVENT_BYTES // len(part))
    with pytest.raises(sse.EventTooLargeError):
        list(map(reader.feed, parts))


# --- pieces ---------------------------------------------------------------------------------------------------------


def parse(event: Any, top: int = 0) -> Piece:
    return pieces.parse(json.dumps(event).encode(), "S", top)


def test_pieces_of_both_endpoints() -> None:
    assert parse({"choices": [{"text": "a", "token_ids": [7]}]}) == Piece("a", token_ids=(7,))
    chat = parse({"choices": [{"delta": {"content": "b", "reasoning_content": "r"}, "finish_reason": "length"}]})
    assert chat == Piece("b", "r", reason="length")
    assert parse({"choices": [{"delta": {"role": "assistant", "content": None}}]}) == Piece()
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 4}}
    assert parse({"choices": [], "usage": usage}) == Piece(prompt_tokens=5, completion_tokens=6, cached_tokens=4)
    call = {"index": 1, "function": {"name": "f", "arguments": '{"a"'}}
    assert parse({"choices": [{"delta": {"tool_calls": [call]}}]}).calls == (Call(1, "f", '{"a"'),)


def test_logprobs_of_chats_have_ids_where_the_server_tells_them() -> None:
    top = [{"token": "a", "logprob": -0.1, "id": 3}, {"token": "b", "logprob": -2.0, "id": 4}]
    content = [{"token": "a", "logprob": -0.1, "id": 3, "top_logprobs": top}]
    (told,) = parse({"choices": [{"delta": {"content": "a"}, "logprobs": {"content": content}}]}, top=1).logprobs
    assert (told.token_id, told.text, told.logprob) == (3, "a", -0.1)
    assert [(one.token_id, one.text) for one in told.top] == [(3, "a")]  # one was asked for


def test_logprobs_of_completions_stand_side_by_side() -> None:
    logprobs = {
        "tokens": ["a", "token_id:9"],
        "token_logprobs": [-0.5, None],
        "top_logprobs": [{"b": -9, "a": -0.5}, None],
    }
    piece = parse({"choices": [{"text": "a", "token_ids": [5, 6], "logprobs": logprobs}]}, top=5)
    first, second = piece.logprobs
    assert (first.token_id, [(one.token_id, one.text) for one in first.top]) == (5, [(5, "a"), (0, "b")])
    assert (second.token_id, second.text, second.logprob) == (6, "", -9999.0)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense", b"[]", b"7", b'{"choices": 7}', b'{"choices": [7]}', b'{"choices": [{"text": 7}]}',
        b'{"choices": [{"text": "a", "token_ids": [-1]}]}', b'{"choices": [{"text": "a", "token_ids": ["x"]}]}',
        b'{"choices": [{"delta": 7}]}', b'{"usage": 7}', b"[" * 100_000, b"\xff\xfe",
        b'{"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": []}}]}',
        b'{"choices": [{"text": "a", "logprobs": {"content": [{"token": "a"}]}}]}',
    ],
)  # fmt: skip
def test_what_is_no_piece_is_the_servers_fault(data: bytes) -> None:
    with pytest.raises(faults.ServerError, match="S sent what is no event") as caught:
        pieces.parse(data, "S", 0)
    assert (caught.value.code, caught.value.retryable) == (ErrorCode.ENGINE_FAILED, True)


def test_errors_in_mid_stream() -> None:
    with pytest.raises(faults.ServerError, match="too long") as caught:
        parse({"error": {"message": "too long", "code": 400}})
    assert (caught.value.code, caught.value.retryable) == (ErrorCode.BAD_REQUEST, False)
    with pytest.raises(faults.ServerError, match="CUDA") as caught:
        parse({"error": "CUDA error"})
    assert (caught.value.code, caught.value.retryable) == (ErrorCode.ENGINE_FAILED, True)


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "bad_request", False), (422, "bad_request", False), (413, "bad_request", False),
        (404, "model_not_found", True), (429, "busy", True), (408, "busy", True), (401, "engine_failed", True),
        (403, "engine_failed", True), (500, "engine_failed", True), (503, "engine_failed", True),
        (302, "engine_failed", True),
    ],
)  # fmt: skip
def test_statuses(status: int, code: str, retryable: bool) -> None:
    error = faults.of_status("S", status, b'{"error": {"message": "why so"}}')
    assert (error.code.value, error.retryable) == (code, retryable)
    assert ("why so" in error.message) == (status not in (401, 403))  # these may quote the key


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b'{"error": {"message": "a  b"}}', "a b"), (b'{"error": "c"}', "c"), (b'{"detail": "d"}', "d"),
        (b'{"detail": [{"loc": 1}]}', '[{"loc": 1}]'), (b"<html>\n oops", "<html> oops"), (b"", "(no words)"),
        (b'"just so"', "just so"), (b"x" * 5000, "x" * 600 + "..."), (b"[" * 100_000, "[" * 600 + "..."),
    ],
)  # fmt: skip
def test_a_servers_words(said: bytes, told: str) -> None:
    assert faults.quoted(said) == told


# --- counting -------------------------------------------------------------------------------------------------------


def play(row: Row, *told: Piece) -> list[Output]:
    """Let a row take pieces until it ends, and the end of the stream."""
    outputs: list[Output] = []
    for piece in told:
        outputs += row.take(piece, 1.0)
        if row.ended:
            return outputs
    return outputs + row.end("S")


def row(most: int = 100, **options: Any) -> Row:
    sampling = {name: options.pop(name) for name in ("stop", "logprobs") if name in options}
    return Row(1, Sampling(max_tokens=most, **sampling), 0.0, **options)


def test_ids_that_are_told_are_the_tokens() -> None:
    got = play(row(), Piece("", token_ids=(1,)), Piece("é", token_ids=(2, 3)), Piece("", reason="stop", token_ids=()))
    assert (ids(got), text(got)) == ([1, 2, 3], "é")
    assert done(got).completion_tokens == 3


def test_text_without_a_token_leaves_with_the_next_one() -> None:
    got = play(row(), Piece("a", token_ids=(1,)), Piece("b"), Piece("c", token_ids=(2,)), Piece("d", reason="stop"))
    assert [(one.token_ids, one.text) for one in got[:-1]] == [((1,), "a"), ((2,), "bc"), ((), "d")]  # type: ignore[union-attr]


def test_pieces_count_where_ids_are_not_told_and_usage_has_the_last_word() -> None:
    told = (Piece("a"), Piece("b c"), Piece(reason="stop"))
    assert ids(play(row(), *told)) == [0, 0]
    got = play(row(), *told, Piece(prompt_tokens=4, completion_tokens=5))
    assert (ids(got), done(got).completion_tokens, done(got).prompt_tokens) == ([0] * 5, 5, 4)
    got = play(row(), *told, Piece(prompt_tokens=4, completion_tokens=1))
    assert (ids(got), done(got).completion_tokens) == ([0, 0], 2)


def test_logprobs_count_tokens_too() -> None:
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1, -2]}
    piece = parse({"choices": [{"text": "ab", "logprobs": logprobs}]})
    got = play(row(logprobs=0), piece, Piece(reason="stop"))
    assert ids(got) == [0, 0]
    assert [one.logprob for one in got[0].details.logprobs] == [-1.0, -2.0]  # type: ignore[union-attr]


def test_never_more_than_was_asked_for() -> None:
    got = play(row(2), *[Piece("x")] * 4, Piece(reason="stop"), Piece(completion_tokens=9))
    assert (ids(got), text(got), done(got).reason) == ([0, 0], "xxxx", FinishReason.STOP)
    got = play(row(2), *[Piece("x")] * 1000)  # it never ends by itself
    assert (len(ids(got)), done(got).reason) == (2, FinishReason.LENGTH)
    assert len(text(got)) <= 2 + MAX_SURPLUS + 1
    got = play(row(2), Piece("abc", token_ids=(1, 2, 3)), Piece("d", token_ids=(4,), reason="stop"))
    assert ids(got) == [1, 2]


def test_text_for_no_token_is_not_kept_for_ever() -> None:
    big = Piece("x" * 65536, token_ids=())
    got = play(row(), *[big] * 100)
    assert done(got).reason is FinishReason.LENGTH
    assert len(text(got)) <= MAX_UNPAID_CHARS + 65536


@pytest.mark.parametrize(
    ("reason", "end"),
    [("stop", FinishReason.STOP), ("length", FinishReason.LENGTH), ("tool_calls", FinishReason.STOP)],
)
def test_reasons(reason: str, end: FinishReason) -> None:
    assert done(play(row(), Piece("a"), Piece(reason=reason))).reason is end


@pytest.mark.parametrize(("reason", "retryable"), [("content_filter", False), ("abort", True), ("", True)])
def test_a_completion_that_is_not_whole_fails(reason: str, retryable: bool) -> None:
    failed = failure(play(row(), Piece("a", reason=reason)))
    assert (failed.code, failed.retryable) == ("engine_failed", retryable)


def test_stop_strings_that_the_server_was_not_told() -> None:
    got = play(row(stop=("END",), watch_stops=True), Piece("a E"), Piece("ND b"), Piece("c"))
    assert (text(got), done(got).reason) == ("a ", FinishReason.STOP)
    got = play(row(stop=("END",), watch_stops=True), Piece("a EN"), Piece(reason="length"))
    assert (text(got), done(got).reason) == ("a EN", FinishReason.LENGTH)


def test_reasoning_and_calls_become_text_again() -> None:
    got = play(
        row(), Piece(reasoning="hm"), Piece(reasoning=", so"), Piece("It is"), Piece(" 4"), Piece(reason="stop")
    )
    assert text(got) == "<think>hm, so</think>It is 4"
    parts = Piece(calls=(Call(0, "f", '{"a"'),)), Piece(calls=(Call(0, "", ": 1}"), Call(1, "g", "{oops")))
    got = play(row(), *parts, Piece(reason="tool_calls"))
    assert text(got) == (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
        '<tool_call>\n{"name": "g", "arguments": "{oops"}\n</tool_call>'
    )
    assert len(ids(got)) == 2


def test_echo_and_times() -> None:
    one = row(echo="The sea")
    got = [*one.take(Piece(" is"), 2.0), *one.take(Piece(" big", reason="stop"), 5.0), *one.end("S")]
    assert text(got) == "The sea is big"
    assert (done(got).prefill_s, done(got).decode_s) == (2.0, 3.0)


def test_cancelled() -> None:
    one = row(echo="x")
    assert one.cancel() == [Done(1, FinishReason.CANCELLED, 0, 0)]
    assert isinstance(row().fail(ErrorCode.BUSY, "b", retryable=True)[0], Failed)


# --- bodies ---------------------------------------------------------------------------------------------------------


def request(dialect: Any, *, attachments: tuple[bytes, ...] = (), **values: Any) -> tuple[str, dict[str, Any]]:
    names = Generation.__dataclass_fields__
    given = {name: values.pop(name) for name in list(values) if name in names}
    generation = Generation(**(given or {"prompt": "Hi"}), sampling=Sampling(**values))
    return body.request_for(Job(1, "m", generation, attachments), "big", dialect)


MESSAGES = ({"role": "user", "content": "Hi"},)


def test_what_vllm_is_sent() -> None:
    path, sent = request(
        VLLM, top_k=5, min_p=0.1, repetition_penalty=1.1, logit_bias=((3, -1.5),), bad_words=("no",), min_tokens=2,
        stop=("a", "b"), stop_token_ids=(7,), ignore_eos=True, seed=2**62, logprobs=0, choice=("x", "y"),
    )  # fmt: skip
    assert path == "/completions"
    assert sent == {
        "model": "big", "prompt": "Hi", "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "max_tokens": 256, "temperature": 1.0, "top_p": 1.0, "seed": 2**62, "top_k": 5,
        "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "logit_bias": {"3": -1.5}, "bad_words": ["no"], "min_tokens": 2, "stop": ["a", "b"], "stop_token_ids": [7],
        "ignore_eos": True, "logprobs": 1, "structured_outputs": {"choice": ["x", "y"]},
    }  # fmt: skip


def test_defaults_of_the_server_do_not_creep_in() -> None:
    for dialect, everything in ((VLLM, -1), (SGLANG, -1), (LLAMA_CPP, 0)):
        sent = request(dialect)[1]
        assert (sent["top_k"], sent["min_p"]) == (everything, 0.0)
    assert request(LLAMA_CPP)[1]["repeat_penalty"] == 1.0
    assert not {"top_k", "min_p", "repetition_penalty"} & request(OPENAI)[1].keys()
    assert "stream_options" not in request(TRANSFORMERS)[1]  # it refuses fields that it does not know
    assert request(LLAMA_CPP, seed=2**32)[1]["seed"] < 2**32 - 1


def test_chats_with_images_tools_and_template() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    messages = ({"role": "user", "content": content}, {"role": "assistant", "content": None, "tool_calls": [call]})
    tool = {"type": "function", "function": {"name": "f"}}
    path, sent = request(
        VLLM, messages=messages, tools=(tool,), template={"enable_thinking": False}, attachments=(PNG, WEBP),
        json_schema='{"type": "object"}', logprobs=2,
    )  # fmt: skip
    assert path == "/chat/completions"
    urls = [part["image_url"]["url"][:22] for part in sent["messages"][0]["content"] if part["type"] == "image_url"]
    assert urls == ["data:image/png;base64,", "data:image/webp;base64"]
    assert sent["messages"][1]["tool_calls"] == [
        {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    ]
    assert (sent["tools"], sent["tool_choice"]) == ([tool], "none")
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 2)
    assert sent["structured_outputs"] == {"json": {"type": "object"}}


def test_structured_output_by_dialect() -> None:
    schema = '{"type": "object"}'
    assert request(SGLANG, json_schema=schema)[1]["json_schema"] == schema
    assert request(LLAMA_CPP, json_schema=schema)[1]["json_schema"] == {"type": "object"}
    for dialect in (SGLANG, LLAMA_CPP, OPENAI):
        chat = request(dialect, messages=MESSAGES, json_schema=schema)[1]
        assert chat["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert request(SGLANG, choice=("a.b", "c"))[1]["regex"] == r"(a\.b|c)"
    assert request(LLAMA_CPP, choice=('a"b', "é"))[1]["grammar"] == 'root ::= "a\\"b" | "é"'
    with pytest.raises(BadRequestError, match="json_schema: it is no JSON"):
        request(VLLM, json_schema="{")


@pytest.mark.parametrize(
    ("dialect", "values", "named"),
    [
        (TRANSFORMERS, {"top_k": 5, "ignore_eos": True}, "sampling.top_k, sampling.ignore_eos"),
        (TRANSFORMERS, {"token_ids": (1, 2)}, "token_ids"),
        (TRANSFORMERS, {"logprobs": 0}, "sampling.logprobs"),
        (LLAMA_CPP, {"bad_words": ("x",)}, "sampling.bad_words"),
        (LLAMA_CPP, {"regex": "a*"}, "sampling.regex"),
        (OPENAI, {"json_schema": "{}"}, "sampling.json_schema"),  # only in chats
        (OPENAI, {"messages": MESSAGES, "template": {"a": 1}}, "template"),
        (VLLM, {"attachments": (PNG,)}, "images in a prompt"),
        (VLLM, {"messages": MESSAGES, "echo": True}, "echo of anything but"),
        (VLLM, {"prompt": "Hi", "echo": True, "logprobs": 1}, "logprobs of an echo"),
    ],
)  # fmt: skip
def test_what_a_server_lacks_is_refused_by_name(dialect: Any, values: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        request(dialect, **values)
    assert named in caught.value.message
    assert dialect.name in caught.value.message


def test_images_that_are_none_or_too_few() -> None:
    messages = ({"role": "user", "content": [{"type": "image"}]},)
    with pytest.raises(BadRequestError, match="1 image parts, but 0 images"):
        request(VLLM, messages=messages)
    with pytest.raises(BadRequestError, match="image 0 is neither PNG"):
        request(VLLM, messages=messages, attachments=(b"GIF89a",))
    assert request(VLLM, messages=messages, attachments=(JPEG,))[1]["messages"][0]["content"][0]["image_url"]


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_stop_strings_are_sent_as_many_as_the_server_takes(dialect: Any) -> None:
    assert ("stop" in request(dialect, stop=("a",))[1]) == (dialect.stops > 0)
    assert "stop" not in request(dialect, stop=tuple("abcde"))[1] or dialect.stops >= 5


@pytest.mark.parametrize("calls", [5, [5], [{"function": {"name": "f", "arguments": {"a": b"bytes"}}}]])
def test_what_is_no_json_is_the_users_mistake(calls: Any) -> None:
    with pytest.raises(BadRequestError, match=r"must be a list of maps|cannot be sent to the server as JSON"):
        request(VLLM, messages=({"role": "assistant", "content": None, "tool_calls": calls},))
