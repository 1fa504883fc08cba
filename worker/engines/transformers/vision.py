"""What a model with eyes makes of text and images: token ids, and what its forward is handed besides them.

The model's own processor does the work: it scales the images as the model was trained, and writes for each mark in
the text as many image tokens as the model will put in its place. `images` has made pixels of files before.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from ....protocol.errors import BadRequestError
from ..base import EngineLoadError
from ..images import decode, fingerprint
from .devices import first_line
from .sequence import Prompt

#: What the processor gives and the engine makes itself: a prompt with images is alone in its forward, unpadded.
_OWN_INPUTS = ("input_ids", "attention_mask")


def has_eyes(config: Any) -> bool:
    """Tell whether a model of this config looks at images, as far as transformers knows it."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    return known and getattr(config, "vision_config", None) is not None


def load_processor(source: str, *, local: bool) -> Any:
    """Load a model's processor: its tokenizer and what it needs for images.

    Args:
        source: a folder or a hub id.
        local: it is a folder; the network is not touched.

    Raises:
        EngineLoadError: it is absent or damaged, or needs a package that is not there.
    """
    try:
        # Without `trust_remote_code` transformers would ask on the terminal where a repository brings code.
        untyped: Any = AutoProcessor
        processor = untyped.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except ImportError as error:
        missing = "torchvision" if "torchvision" in str(error).lower() else first_line(error)
        raise EngineLoadError(
            f"{source}: its processor for images (or videos) cannot be loaded without a package: {missing}"
        ) from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise  # `loading` says what it says of all such models
        raise EngineLoadError(
            f"{source}: its processor (processor_config.json and others) is absent or damaged: "
            f"{first_line(error).rstrip(':')}"
        ) from error
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise EngineLoadError(f"{source}: a {type(processor).__name__} is no processor for text and images")
    return processor


class Vision:
    """A model's eyes.

    Attributes:
        mark: what stands for an image in a text.
    """

    def __init__(self, processor: Any, model: Any, name: str) -> None:
        """Look at images for one model.

        Args:
            processor: the model's, of transformers.
            model: the model.
            name: the served name, for messages.

        Raises:
            EngineLoadError: the processor has no mark for images in a text.
        """
        mark = getattr(processor, "image_token", None)
        if not isinstance(mark, str) or not mark:
            raise EngineLoadError(
                f"{name}: its {type(processor).__name__} has no mark for images in a text; it cannot be served"
            )
        self.mark = mark
        self._processor = processor
        self._name = name
        self._dtype: torch.dtype = model.dtype
        self._names = frozenset(inspect.signature(model.forward).parameters)
        # Models with positions of several dimensions (M-RoPE: Qwen2-VL, arXiv:2409.12191) compute them from the ids.
        self._index = getattr(getattr(model, "model", None), "get_rope_index", None)

    def check_marks(self, text: str, images: int) -> None:
        """Check that the text has a mark for each image.

        Raises:
            BadRequestError: there are more or less.
        """
        marks = text.count(self.mark)
        if marks != images:
            raise BadRequestError(
                f"the prompt has {_count(marks, 'place')} for images (each an image part, or the mark {self.mark!r} "
                f"of model {self._name!r} in a text), and {_count(images, 'image')} came with it"
            )

    def read(self, text: str, files: Sequence[bytes], *, special: bool) -> Prompt:
        """Return a text with images as a prompt.

        Args:
            text: with a mark for each image.
            files: the images: PNG, JPEG or WebP.
            special: let the tokenizer add what it adds by default.

        Raises:
            BadRequestError: marks and images do not match, an image cannot be read, or the processor rejects it.
        """
        self.check_marks(text, len(files))
        return self.look(text, decode(files), special=special, seed=fingerprint(files))

    def look(self, text: str, pictures: Sequence[Image.Image], *, special: bool, seed: bytes = b"") -> Prompt:
        """Return a text with decoded images as a prompt; as `read`, which see."""
        try:
            made = self._processor(
                # Nested, one list a text, is what all processors take.
                images=[list(pictures)],
                text=[text],
                add_special_tokens=special,
                return_tensors="pt",
            )
            ids: torch.Tensor = made["input_ids"]
            inputs = {name: self._cast(value) for name, value in made.items() if self._takes(name)}
            shift = self._number(ids, inputs)
        except Exception as error:  # processors reject in their own ways
            raise BadRequestError(
                f"the processor of model {self._name!r} rejects the images: {first_line(error)}"
            ) from error
        return Prompt(tuple(ids[0].tolist()), text, inputs, seed, shift)

    def _number(self, ids: torch.Tensor, inputs: dict[str, Any]) -> int:
        """Add positions to the inputs where the model has its own; return how far those behind the prompt shift."""
        if self._index is None:
            return 0
        taken = inspect.signature(self._index).parameters
        positions, shifts = self._index(
            input_ids=ids, **{name: value for name, value in inputs.items() if name in taken}
        )
        inputs["position_ids"] = positions
        return int(shifts.reshape(-1)[0])

    def _takes(self, name: str) -> bool:
        """Tell whether the model's forward is handed this; tokenizers give token types to models that know none."""
        return name not in _OWN_INPUTS and (name != "token_type_ids" or name in self._names)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.to(self._dtype)
        return value


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
