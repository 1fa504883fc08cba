"""What requests may ask for beyond plain text, through a real broker and real workers with the synthetic engine."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import (
    AsyncClient,
    BadRequestError,
    Client,
    DeadlineError,
    Embeddings,
    ModelNotFoundError,
    Stream,
    WorkerLostError,
)
from tokenmq.client.local import LocalCluster, LocalProcess
from tokenmq.protocol.limits import MAX_TEXTS
from tokenmq.worker.engines.synthetic import DIMENSION, logprobs_at, text_of, token_at, vector_of

from .conftest import at_rest, eventually
from .test_commands import run

MODEL = "toy"
SYNTHETIC = ("--engine", "synthetic", "--model", MODEL)
PNG = b"\x89PNG\r\n\x1a\n-a-png"
JPEG = b"\xff\xd8\xff\xe0-a-jpeg"

MakeCluster = Callable[..., LocalCluster]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        for _ in range(2):
            made.start_worker(*SYNTHETIC)
        made.wait_ready(MODEL, workers=2)
        yield made


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster.frontend) as made:
        yield made
        eventually(lambda: at_rest(made), "nothing is left of the test")


def expected(seed: int, tokens: int) -> str:
    return "".join(text_of(token_at(seed, position)) for position in range(tokens))


def told_vectors(found: Embeddings) -> list[bytes]:
    return [struct.pack(f"<{DIMENSION}f", *vector) for vector in found]


def serving(cluster: LocalCluster, stream: Stream) -> LocalProcess:
    """Return the process of the worker that has the stream now."""
    name = stream.attempts[-1].worker
    return next(worker for worker in cluster.workers if worker.name == name)


# Details


def test_logprobs_and_echo(client: Client) -> None:
    stream = client.generate(MODEL, "one two three", max_tokens=20, seed=4, logprobs=2, echo=True)
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == "one two three" + expected(4, 20)
    assert [one for chunk in chunks for one in chunk.logprobs] == [
        logprobs_at(4, position, 2) for position in range(20)
    ]
    first, *others = chunks[0].prompt_logprobs
    assert first is None
    assert len(others) == 2
    assert not any(chunk.prompt_logprobs for chunk in chunks[1:])
    plain = list(client.generate(MODEL, "x", max_tokens=3, seed=4))
    assert not any(chunk.logprobs for chunk in plain)


def test_over_a_kill_each_token_has_its_logprobs_and_the_echo_comes_once(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker(*SYNTHETIC, "--tokens-per-second", "50")
    cluster.wait_ready(MODEL, workers=2)
    with Client(cluster.frontend, window_tokens=4) as client:
        stream = client.generate(MODEL, "one two", max_tokens=60, seed=4, logprobs=3, echo=True)
        chunks = [next(stream) for _ in range(10)]
        serving(cluster, stream).kill()
        chunks += stream
        assert len(stream.attempts) == 2
    assert "".join(chunk.text for chunk in chunks) == "one two" + expected(4, 60)
    assert [one for chunk in chunks for one in chunk.logprobs] == [
        logprobs_at(4, position, 3) for position in range(60)
    ]
    assert sum(len(chunk.prompt_logprobs) for chunk in chunks) == 2


# Images


def test_images_arrive_also_after_a_kill(make_cluster: MakeCluster, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(JPEG)
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker(*SYNTHETIC, "--tokens-per-second", "50")
    cluster.wait_ready(MODEL, workers=2)
    parts = [{"type": "image", "image": PNG}, {"type": "text", "text": "a b"}, {"type": "image"}]
    with Client(cluster.frontend) as client:
        stream = client.chat(MODEL, [{"role": "user", "content": parts}], images=[file], max_tokens=40, seed=1)
        for _ in range(5):
            next(stream)
        serving(cluster, stream).kill()
        assert stream.text()
        assert len(stream.attempts) == 2
        assert stream.usage is not None
        assert stream.usage.prompt_tokens == 4, "two words and, at the second worker, too, two images"


# Several completions


def test_several_completions_have_seeds_in_a_row_and_may_be_read_in_order(client: Client) -> None:
    streams = client.generate_n(4, MODEL, "x", max_tokens=600, seed=7)
    assert [stream.text() for stream in streams] == [expected(seed, 600) for seed in range(7, 11)]
    (answer,) = client.chat_n(1, MODEL, [{"role": "user", "content": "x"}], max_tokens=3, seed=2)
    assert answer.text() == expected(2, 3)
    drawn = {stream.text() for stream in client.generate_n(3, MODEL, "x", max_tokens=9)}
    assert len(drawn) == 3
    with pytest.raises(BadRequestError, match=r"request\.n: expected an integer from 1"):
        client.generate_n(0, MODEL, "x")


def test_several_completions_with_asyncio(cluster: LocalCluster) -> None:
    async def read() -> list[str]:
        async with AsyncClient(cluster.frontend) as client:
            streams = client.generate_n(3, MODEL, "x", max_tokens=9, seed=1)
            return await asyncio.gather(*(stream.text() for stream in streams))

    assert asyncio.run(read()) == [expected(seed, 9) for seed in (1, 2, 3)]


# Embeddings


def test_embeddings_of_a_long_list_come_in_order(client: Client, cluster: LocalCluster) -> None:
    texts = [f"text number {number}" for number in range(10 * MAX_TEXTS + 5)]
    found = client.embed(MODEL, texts)
    assert found.dimension == DIMENSION
    assert told_vectors(found) == [vector_of(text) for text in texts]
    assert found.usage.prompt_tokens == 3 * len(texts)
    assert len(client.embed(MODEL, [])) == 0

    async def embed() -> list[bytes]:
        async with AsyncClient(cluster.frontend) as other:
            some = await asyncio.gather(*(other.embed(MODEL, texts[place::3]) for place in range(3)))
            return [told_vectors(some[number % 3])[number // 3] for number in range(12)]

    assert asyncio.run(embed()) == [vector_of(text) for text in texts[:12]]


def test_a_worker_that_dies_loses_no_vector_and_doubles_none(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    for _ in range(2):
        cluster.start_worker(*SYNTHETIC, "--slots", "2", "--tokens-per-second", "400")
    cluster.wait_ready(MODEL, workers=2)
    texts = [f"text {number}" for number in range(3 * MAX_TEXTS)]

    async def embed() -> Embeddings:
        async with AsyncClient(cluster.frontend) as client:
            work = asyncio.create_task(client.embed(MODEL, texts))
            while not all(row["in_flight"] for row in await client.workers()):
                await asyncio.sleep(0.01)
            cluster.workers[0].kill()
            assert not work.done()
            found = await work
            assert [row["name"] for row in await client.workers()] == ["worker-2"]
            return found

    found = asyncio.run(asyncio.wait_for(embed(), 60))
    assert told_vectors(found) == [vector_of(text) for text in texts]
    assert found.usage.prompt_tokens == 2 * len(texts)


def test_embeddings_fail_by_code_and_leave_nothing_behind(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.start_worker(*SYNTHETIC, "--slots", "16", "--tokens-per-second", "5")
    cluster.wait_ready(MODEL)
    texts = ["text"] * (2 * MAX_TEXTS)
    with Client(cluster.frontend) as client:
        with pytest.raises(ModelNotFoundError, match="no worker serves 'other'; models here: toy"):
            client.embed("other", ["x"])
        with pytest.raises(BadRequestError, match=r"request\.priority"):
            client.embed(MODEL, texts, priority=10)
        with pytest.raises(DeadlineError):
            client.embed(MODEL, texts, deadline_s=0.5)
        eventually(lambda: at_rest(client), "the requests of the call are cancelled")
        with Client(cluster.frontend, resume=False) as hasty:
            victim = cluster.workers[0]
            asking = asyncio.run(asyncio.wait_for(_killed(hasty, victim, texts), 60))
        assert isinstance(asking, WorkerLostError)


async def _killed(client: Client, victim: LocalProcess, texts: list[str]) -> BaseException | None:
    """Embed in a thread, kill the worker when it runs; return the error."""
    work = asyncio.create_task(asyncio.to_thread(client.embed, MODEL, texts))
    while not any(row["in_flight"] for row in client.workers()):
        await asyncio.sleep(0.01)
    victim.kill()
    await asyncio.wait([work])
    return work.exception()


def test_a_task_that_is_cancelled_cancels_its_embeddings(make_cluster: MakeCluster) -> None:
    cluster = make_cluster()
    cluster.start_worker(*SYNTHETIC, "--tokens-per-second", "2")
    cluster.wait_ready(MODEL)

    async def embed() -> None:
        async with AsyncClient(cluster.frontend) as client:
            work = asyncio.create_task(client.embed(MODEL, ["x"] * MAX_TEXTS))
            while not any(row["in_flight"] for row in await client.workers()):
                await asyncio.sleep(0.01)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work
            while any(row["in_flight"] for row in await client.workers()):
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(embed(), 60))


# The command


def zmq_client(cluster: LocalCluster, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    done = run("zmq-client", "--broker", cluster.frontend, *arguments, stdin=stdin)
    return done.returncode, done.stdout, done.stderr


def json_lines(cluster: LocalCluster, *arguments: str, stdin: str = "") -> list[dict[str, Any]]:
    code, out, err = zmq_client(cluster, *arguments, "--json", stdin=stdin)
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_generate_tells_logprobs(cluster: LocalCluster) -> None:
    options = ("generate", MODEL, "one two", "--max-tokens", "2", "--seed", "4", "--logprobs", "1", "--echo")
    *chunks, _ = json_lines(cluster, *options)
    assert [one["token_id"] for chunk in chunks for one in chunk["logprobs"]] == [token_at(4, 0), token_at(4, 1)]
    assert chunks[0]["logprobs"][0]["top"][0]["logprob"] == chunks[0]["logprobs"][0]["logprob"]
    assert [one and one["token_id"] for one in chunks[0]["prompt_logprobs"]] == [None, 1]
    code, out, _ = zmq_client(cluster, *options)
    text, headings, first, *_ = out.splitlines()
    assert (code, text) == (0, "one two" + expected(4, 2))
    assert headings.split() == ["POSITION", "TOKEN_ID", "TEXT", "LOGPROB", "TOP"]
    assert first.split()[:2] == ["0", str(token_at(4, 0))]


def test_generate_several(cluster: LocalCluster) -> None:
    options = ("generate", MODEL, "x", "--max-tokens", "300", "--seed", "4", "--n", "3")
    _, out, _ = zmq_client(cluster, *options)
    assert out.splitlines() == [
        "--- 1 of 3", expected(4, 300), "--- 2 of 3", expected(5, 300), "--- 3 of 3", expected(6, 300),
    ]  # fmt: skip
    lines = json_lines(cluster, *options)
    for index in range(3):
        *chunks, summary = [line for line in lines if line["index"] == index]
        assert "".join(chunk["text"] for chunk in chunks) == expected(4 + index, 300)
        assert summary["completion_tokens"] == 300


def test_images_tools_and_template_come_from_files_or_as_they_stand(cluster: LocalCluster, tmp_path: Path) -> None:
    image, tools = tmp_path / "a.png", tmp_path / "tools.json"
    image.write_bytes(PNG)
    tools.write_text('[{"type": "function"}]')
    shown = ("--image", str(image), "--max-tokens", "1")
    chat = ("chat", MODEL, "a b", *shown, "--tools", str(tools), "--template", '{"enable_thinking": false}')
    assert json_lines(cluster, *chat)[-1]["prompt_tokens"] == 3
    assert (
        json_lines(cluster, "generate", MODEL, "<image> a b", *shown, "--image", str(image))[-1]["prompt_tokens"] == 5
    )
    code, _, err = zmq_client(cluster, "generate", MODEL, "x", "--image", str(tools))
    assert code == 1
    assert "request.images[0]: it is no PNG, JPEG or WebP file" in err


def test_embed_prints_vectors(cluster: LocalCluster) -> None:
    *rows, summary = json_lines(cluster, "embed", MODEL, stdin="one\n\ntwo words\n")
    assert [(row["index"], row["text"]) for row in rows] == [(0, "one"), (1, "two words")]
    assert [struct.pack(f"<{DIMENSION}f", *row["vector"]) for row in rows] == [
        vector_of("one"),
        vector_of("two words"),
    ]
    assert summary == {"texts": 2, "numbers": DIMENSION, "prompt_tokens": 3}
    code, out, _ = zmq_client(cluster, "embed", MODEL, "one", "two words")
    assert (code, len(out.splitlines())) == (0, 3)
    code, out, err = zmq_client(cluster, "embed", "other", "one")
    assert (code, out) == (1, "")
    assert "no worker serves 'other'" in err


def test_models_and_engines_are_told(cluster: LocalCluster) -> None:
    _, out, _ = zmq_client(cluster, "models")
    assert out.splitlines()[1].split()[-1] == "generate,chat,image,embed"
    (row,) = json_lines(cluster, "models")
    assert (row["chat"], row["images"], row["generates"], row["embeds"]) == (True, True, True, True)
    _, out, _ = zmq_client(cluster, "workers", "--engine")
    assert out.splitlines()[0].split() == [
        "NAME", "RUNNING", "TOKENS_PER_S", "STEPS_PER_S", "PREFILL", "DECODE", "PREFIX_HITS", "KV_USE", "MEMORY",
    ]  # fmt: skip
    assert out.splitlines()[1].split()[4] == "0%"
    assert {"steps_per_s", "prefill_use", "memory_bytes"} <= json_lines(cluster, "workers")[0].keys()
