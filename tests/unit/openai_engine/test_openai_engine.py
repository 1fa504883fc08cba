"""The openai engine in its thread, against a real HTTP server that does all that may go wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from tokenmq.client.local import free_port
from tokenmq.protocol.messages import FinishReason, ModelInfo
from tokenmq.protocol.payload import Prior
from tokenmq.worker.engines.base import Done, Tokens
from tokenmq.worker.engines.openai import link
from tokenmq.worker.engines.openai.engine import OpenAIEngine

from .conftest import WAIT_S, Rig, done, failure, ids, text
from .server import FakeServer, Reply

KEY = "sk-secret-0123"


async def two_words(reply: Reply) -> None:
    await reply.begin()
    await reply.event({"choices": [{"text": "blue", "token_ids": [11]}]})
    await reply.event({"choices": [{"text": " sky", "token_ids": [12, 13]}]})
    await reply.finish("stop", prompt=5, completion=3)


# --- what works -----------------------------------------------------------------------------------------------------


def test_a_completion_streams(server: FakeServer, rig: Rig) -> None:
    server.handle = two_words
    got = rig.run()
    assert (text(got), ids(got)) == ("blue sky", [11, 12, 13])
    assert (done(got).reason, done(got).prompt_tokens, done(got).completion_tokens) == (FinishReason.STOP, 5, 3)
    assert server.seen[-1][1] == "/v1/completions"
    assert (server.bodies[0]["model"], server.bodies[0]["prompt"]) == ("big", "The sea is")
    stats = rig.engine.stats()
    assert (stats.running, stats.waiting, stats.prompt_tokens) == (0, 0, 5)


def test_tokens_come_while_the_server_still_generates(server: FakeServer, rig: Rig) -> None:
    go_on = asyncio.Event()

    async def slow(reply: Reply) -> None:
        await reply.begin()
        await reply.text("one")
        await go_on.wait()
        await reply.finish(completion=1)

    server.handle = slow
    rig.submit()
    assert rig.until(1, lambda output: isinstance(output, Tokens)) == [Tokens(1, (0,), "one")]
    assert rig.engine.stats().running == 1
    server._loop.call_soon_threadsafe(go_on.set)
    assert text(rig.ended()) == "one"


def test_many_at_a_time(server: FakeServer, rig: Rig) -> None:
    async def count(reply: Reply) -> None:
        await reply.begin()
        prompt = reply.seen[3]["prompt"]
        for number in range(20):
            await reply.text(f"{prompt}.{number} ")
            await asyncio.sleep(0)
        await reply.finish("length", completion=20)

    server.handle = count
    for ticket in range(1, 31):
        rig.submit(ticket, prompt=str(ticket))
    for ticket in range(1, 31):
        assert text(rig.ended(ticket)) == "".join(f"{ticket}.{number} " for number in range(20))


def test_a_stream_without_done_and_usage_ends_well(server: FakeServer, rig: Rig) -> None:
    async def plain(reply: Reply) -> None:
        await reply.begin()
        await reply.text("a")
        await reply.text("b", finish_reason="length")

    server.handle = plain
    got = rig.run()
    assert (text(got), done(got).reason) == ("ab", FinishReason.LENGTH)


def test_a_server_that_does_not_close_after_the_last_piece(
    server: FakeServer, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LINGER_S", 0.05)

    async def lingers(reply: Reply) -> None:
        await reply.begin()
        await reply.text("a", finish_reason="stop")
        await asyncio.Event().wait()

    server.handle = lingers
    assert done(rig.run()).reason is FinishReason.STOP


# --- cancel and close -----------------------------------------------------------------------------------------------


async def endless(reply: Reply) -> None:
    await reply.begin()
    await reply.text("one")
    await reply.until_closed()


def test_cancel_closes_the_stream(server: FakeServer, rig: Rig) -> None:
    server.handle = endless
    rig.submit()
    rig.until(1, lambda output: isinstance(output, Tokens))
    rig.cancel(1)
    assert done(rig.ended()) == Done(1, FinishReason.CANCELLED, 0, 1, prefill_s=done(rig.ended()).prefill_s)
    assert server.closed.wait(WAIT_S)


def test_cancel_before_the_server_answers(server: FakeServer, rig: Rig) -> None:
    async def never(reply: Reply) -> None:
        await asyncio.Event().wait()

    server.handle = never
    rig.submit()
    rig.cancel(1)
    assert done(rig.ended()).completion_tokens == 0
    assert rig.engine.stats().waiting == 0


def test_what_is_more_than_was_asked_for_closes_the_stream(server: FakeServer, rig: Rig) -> None:
    async def chatters(reply: Reply) -> None:
        await reply.begin()
        await reply.text(*["x"] * 50)
        await reply.until_closed()

    server.handle = chatters
    got = rig.run(max_tokens=4)
    assert (len(ids(got)), done(got).reason) == (4, FinishReason.LENGTH)
    assert server.closed.wait(WAIT_S)


def test_the_end_of_the_engine_closes_all_streams(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(server.url)
    rig.loaded()
    server.handle = endless
    rig.submit()
    rig.until(1, lambda output: isinstance(output, Tokens))
    assert rig.thread.stop(WAIT_S)
    assert server.closed.wait(WAIT_S)


# --- what goes wrong at the server ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "retryable"), [(429, "busy", True), (500, "engine_failed", True), (400, "bad_request", False)]
)
def test_a_status(server: FakeServer, rig: Rig, status: int, code: str, retryable: bool) -> None:
    async def refuses(reply: Reply) -> None:
        await reply.json({"error": {"message": "not like this"}}, status)

    server.handle = refuses
    failed = failure(rig.run())
    assert (failed.code, failed.retryable) == (code, retryable)
    assert "not like this" in failed.message
    assert server.url in failed.message


def test_the_key_is_sent_and_never_told(
    server: FakeServer, make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rig = make_rig(server.url, api_key=KEY)
    rig.loaded()
    failures = []
    for status in (401, 500, 400):

        async def refuses(reply: Reply, status: int = status) -> None:
            await reply.json({"error": {"message": f"Incorrect API key provided: {KEY}"}}, status)

        server.handle = refuses
        failures.append(failure(rig.run(status)))
    assert all(seen[2]["authorization"] == f"Bearer {KEY}" for seen in server.seen)
    assert failures[0].retryable
    assert "refused the worker's API key" in failures[0].message
    assert KEY not in str(failures) + caplog.text + repr(rig.engine)


def test_a_key_that_no_header_can_carry() -> None:
    with pytest.raises(ValueError, match="newline at its end") as caught:
        OpenAIEngine("m", "big", "http://h/v1", api_key=KEY + "\n")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://h/v1", "http:///v1", "http://u:p@h/v1", "http://h/v1?x=1"])
def test_base_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="base URL"):
        OpenAIEngine("m", "big", url)


async def garbage(reply: Reply) -> None:
    await reply.begin()
    await reply.text("a")
    await reply.event("}{")


async def breaks_off(reply: Reply) -> None:
    await reply.begin()
    await reply.text("a")
    reply.abort()


async def breaks_off_in_a_chunk(reply: Reply) -> None:
    await reply.raw(
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n20\r\nda"
    )
    reply.abort()


async def ends_early(reply: Reply) -> None:
    await reply.begin()
    await reply.text("a")


async def too_much(reply: Reply) -> None:
    await reply.begin()
    while True:
        await reply.raw(b"data: " + b"x" * 65536)


async def no_http(reply: Reply) -> None:
    await reply.raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


async def no_stream(reply: Reply) -> None:
    await reply.json({"choices": [{"text": "all at once"}]})


async def says_error(reply: Reply) -> None:
    await reply.begin()
    await reply.event({"error": {"message": "CUDA went away", "code": 500}})


async def redirects(reply: Reply) -> None:
    there = b"location: http://127.0.0.1:1/\r\n"
    await reply.raw(b"HTTP/1.1 307 X\r\n" + there + b"content-length: 0\r\nconnection: close\r\n\r\n")


async def bad_chunks(reply: Reply) -> None:
    await reply.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")


@pytest.mark.parametrize(
    ("handle", "words"),
    [
        (garbage, "no event of a completion"),
        (breaks_off, "ended the stream in the middle"),
        (breaks_off_in_a_chunk, "broke off"),
        (ends_early, "ended the stream in the middle"),
        (too_much, "more than 4194304 bytes"),
        (no_http, "broke off"),
        (no_stream, "answered with application/json"),
        (says_error, "CUDA went away"),
        (redirects, "HTTP 307"),
        (bad_chunks, "broke off"),
    ],
)
def test_a_server_that_is_broken(server: FakeServer, rig: Rig, handle: Any, words: str) -> None:
    server.handle = handle
    failed = failure(rig.run())
    assert (failed.code, failed.retryable) == ("engine_failed", True)
    assert words in failed.message
    server.handle = two_words
    assert text(rig.run(2)) == "blue sky"  # and the engine goes on


@pytest.mark.parametrize("after_headers", [False, True])
def test_a_server_that_falls_silent(server: FakeServer, make_rig: Callable[..., Rig], after_headers: bool) -> None:
    async def silent(reply: Reply) -> None:
        if after_headers:
            await reply.begin()
        await asyncio.Event().wait()

    rig = make_rig(server.url, silence_s=0.2)
    rig.loaded()
    server.handle = silent
    failed = failure(rig.run())
    assert (failed.code, failed.retryable) == ("engine_failed", True)
    assert "nothing came for 0.2 s" in failed.message


# --- what the engine itself refuses ---------------------------------------------------------------------------------


def test_refusals_never_reach_the_server(server: FakeServer, rig: Rig) -> None:
    assert failure(rig.run(1, texts=("a",))).code == "bad_request"
    assert failure(rig.run(2, prompt="a", prior=Prior((1,)))).code == "cannot_resume"
    assert failure(rig.run(3, prompt="a", echo=True, logprobs=1)).code == "bad_request"
    assert server.bodies == []


# --- load, and a server that comes and goes -------------------------------------------------------------------------


def test_what_the_server_tells_of_the_model(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    assert make_rig(server.url).loaded() == (ModelInfo("m", context_tokens=512, chat=True, images=True),)


def test_a_model_that_the_server_does_not_have(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    with pytest.raises(RuntimeError, match="does not serve 'huge'; models there: big"):
        make_rig(server.url, model="huge").loaded()


@pytest.mark.parametrize(("owner", "takes_top_k"), [("sglang", True), ("llamacpp", True), ("somebody", False)])
def test_the_dialect_is_found(
    server: FakeServer, make_rig: Callable[..., Rig], owner: str, takes_top_k: bool
) -> None:
    server.models = {"data": [{"id": "big", "owned_by": owner}]}
    server.handle = two_words
    rig = make_rig(server.url)
    rig.loaded()
    rig.run()
    assert ("top_k" in server.bodies[0]) == takes_top_k


def test_a_server_without_a_list(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    server.list_status = 404
    server.handle = two_words
    rig = make_rig(server.url, dialect="vllm")
    assert rig.loaded()[0].context_tokens == 0
    assert text(rig.run()) == "blue sky"


def test_a_key_that_is_refused_is_not_waited_for(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    server.list_status = 401
    with pytest.raises(RuntimeError, match="refused the worker's API key"):
        make_rig(server.url).loaded()


def test_a_server_that_never_comes(make_rig: Callable[..., Rig]) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be reached: Connect.* \(waited 0 s\)"):
        make_rig(f"http://127.0.0.1:{free_port()}/v1", server_wait_s=0.0).loaded()


def test_it_waits_for_the_server_and_says_so(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    port = free_port()
    started: list[FakeServer] = []
    # The first time that it would sleep, the server comes.
    monkeypatch.setattr(
        "tokenmq.worker.engines.openai.engine.time.sleep", lambda _: started or started.append(FakeServer(port))
    )
    try:
        assert make_rig(f"http://127.0.0.1:{port}/v1").loaded()
    finally:
        started[0].stop()
    assert "waiting_for_server" in caplog.text


def test_a_server_that_goes_and_comes_back(make_rig: Callable[..., Rig]) -> None:
    server = FakeServer()
    rig = make_rig(server.url, watch_s=0.05)
    models = rig.loaded()
    server.handle = endless
    rig.submit(1)
    rig.until(1, lambda output: isinstance(output, Tokens))
    server.stop()
    lost = failure(rig.ended(1))
    assert (lost.code, lost.retryable) == ("engine_failed", True)
    assert rig.changes.get(timeout=WAIT_S).models == ()
    refused = failure(rig.run(2))  # at once: nothing is dialled
    assert (refused.code, refused.retryable) == ("engine_failed", True)
    assert "cannot be reached" in refused.message
    again = FakeServer(server.port)
    again.handle = two_words
    try:
        assert rig.changes.get(timeout=WAIT_S).models == models
        assert text(rig.run(3)) == "blue sky"
    finally:
        again.stop()


def test_a_server_that_is_only_slow_to_list_is_not_given_up(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(server.url, watch_s=0.02)
    rig.loaded()
    server.list_status = 404  # it answers: it lives
    server.handle = two_words
    polls = len(server.seen)
    while len(server.seen) < polls + 2 * link.SILENT_POLLS:
        assert text(rig.run(len(server.seen) + 100)) == "blue sky"
    assert rig.changes.empty()


def test_a_server_that_fails_to_answer_thrice_is_given_up(server: FakeServer, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(server.url, watch_s=0.02)
    rig.loaded()
    server.list_status = 503
    assert rig.changes.get(timeout=WAIT_S).models == ()
    assert len([seen for seen in server.seen if seen[0] == "GET"]) > link.SILENT_POLLS
