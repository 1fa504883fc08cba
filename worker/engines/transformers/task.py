"""What is a model for: to continue prompts, or to embed texts? Its files say it, before anything of it is loaded.

Imports neither torch nor transformers at the top: the command asks before it knows that they are installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

AUTO, GENERATE, EMBED = "auto", "generate", "embed"
TASKS = (AUTO, GENERATE, EMBED)
#: The engine for each.
ENGINES = {GENERATE: "transformers", EMBED: "embeddings"}


def engine_for(model: str, task: str = AUTO) -> str:
    """Return the name of the engine that serves a model.

    Args:
        model: a folder, a `.gguf` file or a hub id.
        task: one of TASKS. With `auto`, a model of sentence-transformers and one without a language model's head
            embed; whatever else there is, a model that cannot be found included, is left to the engine that
            generates, which tells what is wrong.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, not {task!r}")
    return ENGINES[(EMBED if _embeds(model) else GENERATE) if task == AUTO else task]


def find_file(source: str, name: str) -> Path | None:
    """Return where a file of a model is, fetched from the hub if `source` is no folder; None if there is none."""
    folder = Path(source)
    if folder.exists():
        path = folder / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None


def read_json(source: str, name: str) -> Any:
    """Return what a JSON file of a model holds; None if there is no such file.

    Raises:
        OSError: it cannot be read, or fetched.
        ValueError: it is no JSON, or `source` is no hub id.
    """
    path = find_file(source, name)
    return None if path is None else json.loads(path.read_text("utf-8"))


def _embeds(model: str) -> bool:
    if Path(model).suffix == ".gguf":
        return False
    try:
        if find_file(model, "modules.json") is not None:
            return True
        config = read_json(model, "config.json")
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WITH_HEAD
    except (OSError, ValueError, ImportError):
        return False
    names = (config.get("architectures") if isinstance(config, dict) else None) or []
    with_head = set(WITH_HEAD.values())
    # A masked language model is an encoder, whose head is left out; many encoders are published as such.
    return bool(names) and all(
        str(name).endswith(("Model", "ForMaskedLM")) and name not in with_head for name in names
    )
