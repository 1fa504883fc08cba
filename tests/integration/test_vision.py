"""Images through broker, `zmq-worker` as a user starts it, and client: a tiny model with eyes, made on the spot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.transformers.conftest import make_tokenizer
from tests.unit.transformers.eyes import generated, make_eyes, picture
from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster

from .conftest import PATIENCE_S

pytestmark = pytest.mark.model

MODEL = "tiny-eyes"
TOKENS = 16
FILES = [picture(1, 50, 40), picture(2, 90, 40, "JPEG"), picture(3, 40, 120, "WEBP")]
IMAGE = {"type": "image"}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def eyes() -> tuple[Any, Any]:
    return make_eyes("llava", make_tokenizer())


@pytest.fixture(scope="module")
def cluster(eyes: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    model, processor = eyes
    folder = tmp_path_factory.mktemp("model") / MODEL
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with LocalCluster() as made:
        for _ in range(2):
            made.start_worker("--model", str(folder), "--slots", "4", "--device", "cpu")
        made.wait_ready(MODEL, workers=2, timeout_s=120)
        yield made


def test_images_and_texts_at_once_are_what_generate_gives(cluster: LocalCluster, eyes: tuple[Any, Any]) -> None:
    model, processor = eyes
    own = {**IMAGE, "image": FILES[1]}
    turns: list[
        tuple[Any, list[bytes], str, list[bytes]]
    ] = [  # content, images=, what the template makes, all images
        ([part("one "), IMAGE], FILES[:1], "<|user|>one <image><|bot|>", FILES[:1]),
        ([own, part(" two "), IMAGE], FILES[2:], "<|user|><image> two <image><|bot|>", FILES[1:]),
        ("no image", [], "<|user|>no image<|bot|>", []),
    ]
    with Client(cluster.frontend) as client:
        [served] = client.models()
        assert served["images"]
        streams = [
            client.chat(
                MODEL, [{"role": "user", "content": content}], images=files, max_tokens=TOKENS, temperature=0.0
            )
            for content, files, _, _ in turns
        ]
        prompted = client.generate(MODEL, prompt="a <image> b", images=FILES[:1], max_tokens=TOKENS, temperature=0.0)
        ids = [[token for chunk in stream for token in chunk.token_ids] for stream in (*streams, prompted)]
    expected = [generated(model, processor, text, files, TOKENS, special=False) for _, _, text, files in turns]
    assert ids == [*expected, generated(model, processor, "a <image> b", FILES[:1], TOKENS)]


def test_a_damaged_image_is_an_error_that_names_it(cluster: LocalCluster) -> None:
    with Client(cluster.frontend) as client:
        stream = client.generate(MODEL, prompt="<image> <image>", images=[FILES[0], FILES[1][:300]])
        with pytest.raises(TokenmqError, match="image 1: ") as caught:
            stream.text()
        assert caught.value.code == "bad_request"


def test_the_command_takes_image_files(cluster: LocalCluster, eyes: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = eyes
    file = tmp_path / "sea.png"
    file.write_bytes(FILES[0])
    command = [str(Path(sys.executable).with_name("zmq-client")), "--broker", cluster.frontend, "generate", MODEL]
    command += ["a <image> b", "--image", str(file), "--max-tokens", "16", "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    ids = generated(model, processor, "a <image> b", FILES[:1], 16)
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) in done.stdout


def test_a_stream_survives_its_worker(cluster: LocalCluster, eyes: tuple[Any, Any]) -> None:
    model, processor = eyes
    # With a small window nearly all tokens are still to be sent when the worker dies.
    with Client(cluster.frontend, window_tokens=16) as client:
        stream = client.generate(
            MODEL, prompt="a <image> b", images=FILES[1:2], max_tokens=200, temperature=0.0, ignore_eos=True
        )
        ids = list(next(stream).token_ids)
        busy = [row["name"] for row in client.workers() if row["in_flight"]]
        next(worker for worker in cluster.workers if [worker.name] == busy).kill()
        ids += [token for chunk in stream for token in chunk.token_ids]
        assert len(stream.attempts) == 2
    model.generation_config.eos_token_id = None
    assert ids == generated(model, processor, "a <image> b", FILES[1:2], 200)
