"""What a request can ask of the vllm engine: broker, worker and client as processes, SmolLM2 in bfloat16."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster

from .conftest import MODEL, PATIENCE_S, SLOTS, START_S, eventually

pytestmark = pytest.mark.timeout(START_S + 2 * PATIENCE_S)

PROMPT = "The sea is"
QUESTION = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.frontend) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(model_folder: str) -> Tokenizer:
    return Tokenizer.from_file(f"{model_folder}/tokenizer.json")


def ids_of(chunks: list[Any]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_it_says_what_it_serves(client: Client) -> None:
    (row,) = client.models()
    assert (row["name"], row["context_tokens"], row["chat"], row["images"]) == (MODEL, 1024, True, False)
    (worker,) = client.workers()
    assert (worker["engine"], worker["slots"]) == ("vllm", SLOTS)


def test_a_stream_has_the_real_tokens_and_their_text(client: Client, tokenizer: Tokenizer) -> None:
    stream = client.generate(MODEL, prompt=PROMPT, max_tokens=24, temperature=0.0)
    chunks = list(stream)
    assert len(chunks) > 1
    assert len(ids_of(chunks)) == 24
    assert text_of(chunks) == tokenizer.decode(ids_of(chunks))
    assert stream.finish_reason == "length"
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (3, 24)
    again = client.generate(MODEL, token_ids=tokenizer.encode(PROMPT).ids, max_tokens=24, temperature=0.0)
    assert again.text() == text_of(chunks)


def test_more_requests_than_slots_all_get_their_tokens(client: Client) -> None:
    streams = [
        client.generate(MODEL, prompt=f"{number} is", max_tokens=12, ignore_eos=True, seed=number)
        for number in range(3 * SLOTS)
    ]
    assert [len(ids_of(list(stream))) for stream in streams] == [12] * (3 * SLOTS)


def test_a_seed_repeats_a_stream(client: Client) -> None:
    texts = [client.generate(MODEL, prompt=PROMPT, max_tokens=16, seed=seed).text() for seed in (7, 7, 8, 2**63 - 1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_stop_strings_and_ids_end_a_stream(client: Client, tokenizer: Tokenizer) -> None:
    whole = client.generate(MODEL, prompt=PROMPT, max_tokens=24, temperature=0.0)
    chunks = list(whole)
    text, ids = text_of(chunks), ids_of(chunks)
    stop = text[10:14]
    cut = client.generate(MODEL, prompt=PROMPT, max_tokens=24, temperature=0.0, stop=[stop])
    assert cut.text() == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    by_id = client.generate(MODEL, prompt=PROMPT, max_tokens=24, temperature=0.0, stop_token_ids=[ids[4]])
    assert by_id.text() == tokenizer.decode(ids[: ids.index(ids[4])])
    assert by_id.finish_reason == "stop"


def test_min_tokens_bias_and_bad_words(client: Client) -> None:
    def greedy(**how: Any) -> list[Any]:
        return list(client.generate(MODEL, prompt=PROMPT, max_tokens=12, temperature=0.0, **how))

    plain = greedy()
    second = ids_of(plain)[1]
    assert len(ids_of(greedy(stop_token_ids=[second], min_tokens=6))) > 5
    assert set(ids_of(greedy(logit_bias={second: 100.0}))) == {second}
    word = text_of(plain).split()[1]
    assert word not in text_of(greedy(bad_words=[word, " " + word]))


def test_structured_output(client: Client) -> None:
    shape = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    found = client.chat(MODEL, messages=QUESTION, max_tokens=40, seed=1, json_schema=json.dumps(shape)).text()
    assert json.loads(found)["n"] in (1, 2)
    dates = client.generate(MODEL, prompt="On ", max_tokens=40, seed=1, regex=r"\d{4}-\d\d-\d\d").text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", dates)
    assert client.chat(MODEL, messages=QUESTION, max_tokens=9, seed=1, choice=["red", "blue"]).text() in (
        "red",
        "blue",
    )


def test_logprobs_and_echo(client: Client, tokenizer: Tokenizer) -> None:
    chunks = list(client.generate(MODEL, prompt=PROMPT, max_tokens=6, temperature=0.0, logprobs=3, echo=True))
    assert text_of(chunks) == PROMPT + tokenizer.decode(ids_of(chunks))
    told = [token for chunk in chunks if chunk.details for token in chunk.details.logprobs]
    assert [token.token_id for token in told] == ids_of(chunks)
    for token in told:
        assert len(token.top) == 3
        # Two tokens may be equally likely in bfloat16, and then either may come.
        assert token.token_id in [one.token_id for one in token.top]
        assert token.logprob == token.top[0].logprob
        assert token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob
    before = chunks[0].details.prompt_logprobs
    assert before[0] is None
    assert [token.token_id for token in before[1:]] == tokenizer.encode(PROMPT).ids[1:]


@pytest.mark.parametrize(
    ("wish", "tells"),
    [
        ({"prompt": "word " * 3000}, "maximum context length is 1024 tokens"),
        ({"token_ids": [10**6]}, "1000000"),
        ({"prompt": PROMPT, "temperature": 50.0}, r"temperature must be in \[0, 2\]"),
        ({"prompt": PROMPT, "logit_bias": {10**6: 1.0}}, "1000000"),
        ({"prompt": PROMPT, "regex": "((("}, "regex"),
        ({"prompt": PROMPT, "json_schema": "{nope"}, "JSON"),
        ({"messages": QUESTION, "template": {"chat_template": "x"}}, "chat_template cannot be given"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": [b"\x89PNG\r\n\x1a\n"]},
            "text only",
        ),
    ],
)
def test_a_bad_request_is_told_in_a_line_and_hurts_nobody(client: Client, wish: dict[str, Any], tells: str) -> None:
    ask = client.chat if "messages" in wish else client.generate
    running = client.generate(MODEL, prompt=PROMPT, max_tokens=16, temperature=0.0, ignore_eos=True)
    with pytest.raises(TokenmqError, match=tells) as caught:
        ask(MODEL, max_tokens=4, **wish).text()
    assert (caught.value.code, caught.value.retryable) == ("bad_request", False)
    assert "\n" not in caught.value.message
    assert len(ids_of(list(running))) == 16


def test_embeddings_are_refused(client: Client) -> None:
    with pytest.raises(TokenmqError, match="no embeddings") as caught:
        client.embed(MODEL, ["a"])
    assert caught.value.code == "bad_request"


def test_cancel_frees_the_slot(client: Client) -> None:
    def running() -> int:
        return int(client.workers()[0]["running"])

    held = [client.generate(MODEL, prompt=PROMPT, max_tokens=1000, ignore_eos=True, seed=n) for n in range(SLOTS)]
    begun = [iter(stream) for stream in held]
    for chunks in begun:
        next(chunks)
    eventually(lambda: running() == SLOTS, "all slots are taken")
    waiting = client.generate(MODEL, prompt=PROMPT, max_tokens=1)
    for stream in held:
        stream.cancel()
    assert len(ids_of(list(waiting))) == 1
    assert [stream.finish_reason for stream in held] == ["cancelled"] * SLOTS
    eventually(lambda: running() == 0, "no request is left")
    eventually(lambda: client.workers()[0]["kv_use"] == 0.0, "no part of the cache is in use")
