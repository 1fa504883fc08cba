"""A model and its tokenizer from a folder, a GGUF file or the hub; every failure is one line for a person."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import logging as transformers_logging

from ..base import EngineLoadError
from .devices import choose_device, choose_dtype, first_line, is_out_of_memory
from .division import refuse_indivisible
from .gguf import converted, default_cache_dir
from .vision import has_eyes, load_processor

#: What the hub allows as an id: `name` or `owner/name`.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


#: What is said of a model whose files bring Python code of their own.
OWN_CODE = (
    "it needs Python code from its own files, which is never run here; only models that transformers itself knows "
    "are served"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode on its device, its tokenizer, and where it looks at images its processor."""

    model: Any
    tokenizer: Any
    processor: Any = None


def load(
    model: str | os.PathLike[str],
    *,
    device: str,
    dtype: str,
    cache_dir: str | None,
    kind: Any = AutoModelForCausalLM,
    processes: int = 1,
) -> LoadedModel:
    """Load a model.

    Args:
        model: a folder with config and safetensors, a `.gguf` file, or a hub id. A local path never touches the
            network; a hub id does, unless HF_HUB_OFFLINE is set, and then only the hub's cache is read.
        device: a torch device or `auto`.
        dtype: a torch dtype or `auto`.
        cache_dir: folder for converted GGUF files; None for the default.
        kind: the class of transformers that makes the model of its config.
        processes: load the part of this one of so many processes; they have met, see `group`.

    Raises:
        EngineLoadError: no such model, device or dtype, not a decoder-only language model, damaged, or no memory.
    """
    on = choose_device(device)
    number = choose_dtype(dtype, on)
    local = _is_local(str(model))
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        if local and str(model).endswith(".gguf"):
            model = converted(Path(model).resolve(), number, Path(cache_dir) if cache_dir else default_cache_dir())
        return _load(kind, str(model), on, number, local=local, processes=processes)
    except EngineLoadError:
        raise
    except Exception as error:
        if needs_code(error):
            raise EngineLoadError(f"{model}: {OWN_CODE}") from error
        if is_out_of_memory(error):
            raise EngineLoadError(f"no memory on {on} for the weights of {model} in {number}") from error
        raise EngineLoadError(f"cannot load {model}: {first_line(error)}") from error


def needs_code(error: BaseException) -> bool:
    """Tell whether transformers refused to run code that a model brings."""
    return "trust_remote_code" in str(error)


def _refuse_kernels(source: str, config: Any) -> None:
    """Refuse a config that names kernels at the hub: transformers would fetch them, and run what they bring."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        named = getattr(part, "_attn_implementation", None)
        if isinstance(named, str) and "/" in named:
            raise EngineLoadError(f"{source}: its config.json asks for the kernels {named!r}: {OWN_CODE}")


def _is_local(model: str) -> bool:
    """Tell a path from a hub id.

    Raises:
        EngineLoadError: it can only be a path, and there is nothing at it.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EngineLoadError(f"{model}: the folder has no config.json, so it holds no model for transformers")
        return True
    if path.is_file():
        if path.suffix != ".gguf":
            raise EngineLoadError(f"{model}: a model is a folder, a .gguf file or a hub id; this is another file")
        return True
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise EngineLoadError(f"{model}: no such file or folder")
    return False


def _load(
    kind: Any, source: str, device: torch.device, dtype: torch.dtype, *, local: bool, processes: int
) -> LoadedModel:
    config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    _refuse_kernels(source, config)
    if config.is_encoder_decoder:
        raise EngineLoadError(f"{source}: {config.model_type} is an encoder-decoder, which no engine here serves")
    processor = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        if needs_code(error):
            raise
        raise EngineLoadError(
            f"{source}: its tokenizer (tokenizer.json and others) is absent or damaged: "
            f"{first_line(error).rstrip(':')}"
        ) from error
    if kind is AutoModelForCausalLM and has_eyes(config):
        kind, processor = AutoModelForImageTextToText, load_processor(source, local=local)
        tokenizer = processor.tokenizer
    more: dict[str, Any] = {}
    if processes > 1:
        refuse_indivisible(config, processes)
        more["distributed_config"] = DistributedConfig(tp_size=processes)
    elif getattr(config, "quantization_config", None) is not None:
        more["device_map"] = {"": device}  # quantised weights must be placed as they are read
    loaded: Any = kind.from_pretrained(
        source,
        config=config,
        dtype=dtype,
        local_files_only=local,
        output_loading_info=True,
        trust_remote_code=False,
        weights_only=True,  # a pickle may bring tensors and nothing that runs
        **more,
    )
    model, report = loaded
    # An encoder's pooler is for classifiers: no vector depends on it, and some are published without.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise EngineLoadError(f"{source}: {len(missing)} weights are missing from its files, such as {missing[0]}")
    if not more:
        model.to(device)
    return LoadedModel(model.eval(), tokenizer, processor)
