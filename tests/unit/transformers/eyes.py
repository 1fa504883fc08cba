"""Tiny models that look at images: random weights, and transformers' own processors, made on the spot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
)

CONTEXT = 256
MARKS = {"llava": "<image>", "idefics3": "<image>", "qwen2-vl": "<|image_pad|>"}
#: As such models write it: content is a list of parts, and nothing else.
PARTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}"
    "{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def picture(seed: int, width: int = 50, height: int = 40, kind: str = "PNG", **how: Any) -> bytes:
    """Return the file of an image of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((width, height)).save(file, kind, **how)
    return file.getvalue()


class Qwen2VLWithoutVideos(Qwen2VLProcessor):  # type: ignore[misc, no-untyped-call]
    """Qwen2-VL's processor, which needs torchvision for its videos, with images only."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        """Be what the original one is behind its check of the parts."""
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, None
        self.image_token, self.video_token = "<|image_pad|>", None
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = None


def make_eyes(kind: str, tokenizer: Any) -> tuple[Any, Any]:
    """Return a model in float32 and its processor.

    Args:
        kind: one of MARKS.
        tokenizer: becomes the processor's, and gets its marks.
    """
    torch.manual_seed(3)
    mark = MARKS[kind]
    more = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"] if kind == "idefics3" else []
    tokenizer.add_special_tokens({"additional_special_tokens": [mark, *more]})
    tokenizer.chat_template = PARTS.replace("MARK", mark)
    mark_id = tokenizer.convert_tokens_to_ids(mark)
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.4,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    seeing: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    seeing |= {"num_attention_heads": 2, "patch_size": 14, "initializer_range": 0.4}
    if kind == "llava":
        sight = CLIPVisionConfig(image_size=28, projection_dim=16, **seeing)
        model: Any = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=sight, text_config=LlamaConfig(**text), image_token_id=mark_id)
        )
        images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        processor: Any = LlavaProcessor(
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif kind == "idefics3":
        model = Idefics3ForConditionalGeneration(
            Idefics3Config(
                vision_config={"image_size": 56, **seeing},
                text_config=LlamaConfig(**text),
                image_token_id=mark_id,
                scale_factor=2,
                pad_token_id=0,
            )
        )
        edge = {"longest_edge": 56}
        processor = Idefics3Processor(
            Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False),
            tokenizer,
            image_seq_len=4,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        sight_2d = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        model = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={**text, "rope_parameters": rope}, vision_config=sight_2d, image_token_id=mark_id
            )
        )
        # From 2 x 2 to 4 x 4 tokens an image, by its shape.
        size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        processor = Qwen2VLWithoutVideos(Qwen2VLImageProcessorPil(size=size), tokenizer)
    return model.eval(), processor


def generated(
    model: Any, processor: Any, text: str, files: Sequence[bytes], tokens: int, *, special: bool = True
) -> list[int]:
    """Return what `generate` gives greedily behind a text with images, the end token included."""
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
    inputs = processor(
        text=[text], images=[pictures] if pictures else None, add_special_tokens=special, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1] :].tolist()
