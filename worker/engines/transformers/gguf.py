"""GGUF files, converted once into a folder that loads in a second.

transformers reads a GGUF file by unpacking every tensor in Python, which takes ten times as long as reading the same
weights from safetensors. The converted folder is kept by the content of the file, so that a renamed or copied file is
found again and a changed one is not mistaken for its forerunner.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

_log = logging.getLogger("tokenmq.worker")

CACHE_VARIABLE = "TOKENMQ_CACHE"


def default_cache_dir() -> Path:
    """Return the folder for converted models: `$TOKENMQ_CACHE/models`, else `~/.cache/tokenmq/models`."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root) if root else Path.home() / ".cache" / "tokenmq") / "models"


def converted(file: Path, dtype: torch.dtype, cache_dir: Path) -> Path:
    """Return the folder with `file` as safetensors of `dtype`, converting it where that was not done yet.

    Workers that start together wait for the one that converts. The folder appears by a rename, whole or not at all.

    Raises:
        OSError: the file or the cache folder cannot be read or written.
        Exception: transformers cannot read the file; of many kinds.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / _key(file, dtype)
    if not folder.is_dir():
        with _locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                _convert(file, dtype, folder)
    _log.info("loading converted model from %s", folder)
    return folder


def _key(file: Path, dtype: torch.dtype) -> str:
    """Return the folder's name: the file's for people, its hash, the dtype, and the version of the converter."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    version = ".".join(transformers.__version__.split(".")[:2])
    return f"{file.stem}-{digest.hexdigest()[:32]}-{str(dtype).removeprefix('torch.')}-transformers{version}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes; the kernel frees it when its holder dies, however that comes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(file: Path, dtype: torch.dtype, folder: Path) -> None:
    _log.info("converting GGUF %s to %s (once, about 15 s for each 100 MB)", file, folder)
    started = time.monotonic()
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed here
    # What lies beside the file is not asked for code either.
    how: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=dtype, **how)
    # The weights are plain numbers now, but the model still says that it is quantised, and save_pretrained refuses.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    _log.info("converted in %.1f s", time.monotonic() - started)
