"""Settings of the `vllm` engine, and what vLLM is told of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from vllm.platforms import current_platform

from ....protocol.limits import MAX_LOGPROBS
from ..base import EngineLoadError

#: KV cache on a CPU where the user does not say, and at most this part of the free memory. vLLM would take 92 % of
#: all memory, and does not start where others have some of it.
CPU_CACHE_BYTES = 4 << 30
CPU_CACHE_PART = 0.25


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Return engine arguments given as KEY=VALUE: a value is JSON where it can be read as such, else a string.

    Raises:
        EngineLoadError: one is not of this form, or comes twice.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not (key.isidentifier() and equals):
            raise EngineLoadError(f"engine option {text!r}: expected KEY=VALUE, such as gpu_memory_utilization=0.8")
        if key in options:
            raise EngineLoadError(f"engine option {key!r} is given twice")
        if key == "hf_token":
            raise EngineLoadError("engine option 'hf_token': all who can list processes would see it; set HF_TOKEN")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def engine_arguments(
    model: str | os.PathLike[str], *, slots: int, dtype: str, max_context: int | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments of AsyncEngineArgs; those in `options` go before ours.

    Raises:
        EngineLoadError: vLLM cannot load such a model, or a setting is out of its range.
    """
    _check_source(model)
    if slots < 1:
        raise EngineLoadError(f"slots must be 1 or more, not {slots}")
    if max_context is not None and max_context < 1:
        raise EngineLoadError(f"max_context must be 1 or more, not {max_context}")
    if "model" in options:
        raise EngineLoadError("engine option 'model': give it as --model")
    arguments: dict[str, Any] = {
        "model": os.fspath(model),
        "dtype": dtype,
        "max_num_seqs": slots,
        # -1: the model's own limit, or what the cache has room for where that is less.
        "max_model_len": -1 if max_context is None else max_context,
        "max_logprobs": MAX_LOGPROBS,
        "scheduling_policy": "priority",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        free = psutil.virtual_memory().available
        arguments["kv_cache_memory_bytes"] = min(CPU_CACHE_BYTES, int(free * CPU_CACHE_PART))
    return {**arguments, **options}


def choose_device(wish: str) -> None:
    """Let vLLM take this device: it takes the first one that it sees, of the kind that it is built for.

    Raises:
        EngineLoadError: this build of vLLM is for another kind.
    """
    if wish == "auto":
        return
    kind, _, number = wish.partition(":")
    built_for = str(current_platform.device_type)
    if kind != built_for:
        raise EngineLoadError(f"device {wish!r}: this vLLM is built for {built_for!r}")
    if number and not current_platform.is_cpu():
        variable = str(current_platform.device_control_env_var)
        visible = list(filter(None, os.environ.get(variable, "").split(",")))
        if visible and int(number) >= len(visible):
            raise EngineLoadError(f"device {wish!r}: {variable} leaves {len(visible)}")
        os.environ[variable] = visible[int(number)] if visible else number


def _check_source(model: str | os.PathLike[str]) -> None:
    """Refuse what vLLM would look for on the model hub, and then tell something misleading."""
    path = Path(model)
    if path.suffix == ".gguf":
        raise EngineLoadError(
            f"{path.name}: vLLM does not load GGUF files; give a folder with the model's safetensors. The "
            "transformers engine makes such a folder of a GGUF file, below ~/.cache/tokenmq/models"
        )
    written_as_path = str(model).startswith((".", "/", "~")) or isinstance(model, os.PathLike)
    if written_as_path and not path.is_dir():
        raise EngineLoadError(f"{model}: no such folder")
