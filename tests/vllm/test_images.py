"""Images through the vllm engine: a tiny Idefics3 with random weights, and its real processor.

LLaVA and others would do as well where torchvision is installed, which .venv-vllm leaves out.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster

from .conftest import PATIENCE_S, START_S

pytestmark = pytest.mark.timeout(START_S + 2 * PATIENCE_S)

MODEL = "tiny-vlm"
#: Run in a process of its own: the tests themselves import no torch.
_MAKE = """
import sys, torch
from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration
from transformers import Idefics3Processor, LlamaConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

source, folder = sys.argv[1:]
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(source)
marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
tokenizer.add_special_tokens({"additional_special_tokens": marks})
text = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)
vision = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
)
model = Idefics3ForConditionalGeneration(Idefics3Config(
    vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
    pad_token_id=2,
))
for weights in model.parameters():
    if weights.ndim > 1:
        torch.nn.init.normal_(weights, std=0.3)
model.save_pretrained(folder)
images = Idefics3ImageProcessorPil(
    size={"longest_edge": 56}, max_image_size={"longest_edge": 56}, do_image_splitting=False
)
template = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}assistant:"
)
Idefics3Processor(
    image_processor=images, tokenizer=tokenizer, image_seq_len=4, chat_template=template
).save_pretrained(folder)
"""


@pytest.fixture(scope="module")
def client(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder: Path = tmp_path_factory.mktemp("model") / MODEL
    made = subprocess.run([sys.executable, "-c", _MAKE, model_folder, folder], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    with LocalCluster() as cluster:
        cluster.start_worker(
            *("--engine", "vllm", "--model", str(folder), "--max-context", "256", "--dtype", "float32"),
            *("--engine-option", "enforce_eager=true", "--engine-option", f"kv_cache_memory_bytes={64 << 20}"),
        )
        cluster.wait_ready(MODEL, timeout_s=START_S)
        with Client(cluster.frontend) as client:
            yield client


def picture(colour: str, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(data, kind)
    return data.getvalue()


def asked(client: Client, *images: bytes) -> list[int]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is it?"}]
    stream = client.chat(
        MODEL, messages=[{"role": "user", "content": content}], images=images, max_tokens=6, temperature=0.0
    )
    return [token for chunk in stream for token in chunk.token_ids]


def test_it_takes_images_and_looks_at_them(client: Client) -> None:
    assert client.models()[0]["images"] is True
    red = asked(client, picture("red"))
    assert asked(client, picture("red")) == red
    assert asked(client, picture("blue")) != red
    assert asked(client, picture("red"), picture("blue")) != asked(client, picture("blue"), picture("red"))
    assert len(asked(client, picture("red", "JPEG"))) == len(asked(client, picture("red", "WEBP"))) == 6


def test_marks_in_a_prompt(client: Client) -> None:
    def complete(*images: bytes) -> Any:
        stream = client.generate(MODEL, prompt="<image> is", images=images, max_tokens=4, temperature=0.0)
        return [token for chunk in stream for token in chunk.token_ids]

    assert complete(picture("red")) != complete(picture("blue"))
    with pytest.raises(TokenmqError) as caught:
        complete(picture("red"), picture("blue"))
    assert caught.value.code == "bad_request"


def test_a_broken_or_too_large_image_is_told(client: Client) -> None:
    with pytest.raises(TokenmqError, match="image 0: its PNG data are damaged"):
        asked(client, picture("red")[:60])
    huge = io.BytesIO()
    Image.new("L", (6000, 6000)).save(huge, "PNG")
    with pytest.raises(TokenmqError, match="image 0: 6000 x 6000 pixels, at most 24,000,000"):
        asked(client, huge.getvalue())
