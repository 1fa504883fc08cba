"""What a model's own files say about making one vector of a text: the layout of sentence-transformers.

`modules.json` lists what a text goes through: the transformer, a pooling, perhaps dense layers and a normalisation.
A model without it is pooled as sentence-transformers does then: by the mean for an encoder, by the last token for a
decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from ..base import EngineLoadError
from .task import find_file, read_json

#: How states of tokens become one vector, in the order in which they are put side by side where there are several.
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
#: What sentence-transformers wrote before version 5.3: a switch for each.
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Recipe:
    """How a model makes vectors.

    Attributes:
        poolings: some of POOLINGS; None where the files say nothing.
        then: what the pooled vector goes through: dense layers, a normalisation.
        path: the folder of the transformer inside the model's; "" for that itself.
        max_tokens: most tokens of a text, the special ones included; None where the files say nothing.
        prompt: what is put before every text.
        pools_prompt: the prompt's tokens are pooled, too.
        lower_case: texts are lower-cased first.
        prompts: names of the prompts that the model was trained with, for a person to know.
    """

    poolings: tuple[str, ...] | None = None
    then: tuple[nn.Module, ...] = ()
    path: str = ""
    max_tokens: int | None = None
    prompt: str = ""
    pools_prompt: bool = True
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)


class Normalize(nn.Module):
    """Gives every vector the length 1."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the vectors over their lengths."""
        return nn.functional.normalize(vectors, dim=-1)


class Dense(nn.Module):
    """A linear layer with an activation, and the input added again where the model has it so."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Make the layer that a config.json describes, without its weights.

        Raises:
            EngineLoadError: it asks for an activation that torch does not have.
        """
        super().__init__()
        wide, narrow = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(wide, narrow, bias=bool(config.get("bias", True)))
        self.activation_function = _activation(config.get("activation_function", "torch.nn.Tanh"))
        self.adds = bool(config.get("use_residual", False))
        if self.adds and wide != narrow:
            self.residual = nn.Linear(wide, narrow, bias=False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the layer's vectors."""
        out: torch.Tensor = self.activation_function(self.linear(vectors))
        if self.adds:
            out = out + (self.residual(vectors) if hasattr(self, "residual") else vectors)
        return out


def read_recipe(source: str) -> Recipe:
    """Return how a model makes vectors.

    Args:
        source: its folder, or a hub id.

    Raises:
        EngineLoadError: its files ask for something that this engine does not have.
        Exception: they are damaged; of many kinds.
    """
    modules = read_json(source, "modules.json")
    if modules is None:
        return Recipe()
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise EngineLoadError(
            f"{source}: modules.json begins with {' and '.join(kinds[:2])}; this engine serves embedding models "
            "that begin with Transformer and Pooling"
        )
    paths = [str(module["path"]) for module in modules]
    pooling = read_json(source, f"{paths[1]}/config.json") or {}
    transformer = read_json(source, _under(paths[0], "sentence_bert_config.json")) or {}
    own = read_json(source, "config_sentence_transformers.json") or {}
    prompts = own.get("prompts") or {}
    return Recipe(
        poolings=_poolings(source, pooling),
        then=tuple(_module(source, kind, path) for kind, path in zip(kinds[2:], paths[2:], strict=True)),
        path=paths[0],
        max_tokens=transformer.get("max_seq_length"),
        prompt=prompts.get(own.get("default_prompt_name")) or "",
        pools_prompt=bool(pooling.get("include_prompt", True)),
        lower_case=bool(transformer.get("do_lower_case", False)),
        prompts={name: prompt for name, prompt in prompts.items() if prompt},
    )


def _under(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _poolings(source: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("pooling_mode")
    if named is None:
        named = [mode for switch, mode in _SWITCHES.items() if config.get(switch)] or ["mean"]
    modes = (named,) if isinstance(named, str) else tuple(named)
    for mode in modes:
        if mode not in POOLINGS:
            raise EngineLoadError(f"{source}: pooling {mode!r} is unknown; there are {', '.join(POOLINGS)}")
    return modes


def _module(source: str, kind: str, path: str) -> nn.Module:
    if kind == "Normalize":
        return Normalize()
    if kind == "Dropout":
        return nn.Identity()  # it drops in training only
    if kind != "Dense":
        raise EngineLoadError(
            f"{source}: modules.json asks for {kind} behind the pooling; this engine has Dense, Normalize, Dropout"
        )
    dense = Dense(read_json(source, f"{path}/config.json") or {})
    dense.load_state_dict(_weights(source, path))
    return dense


def _weights(source: str, path: str) -> dict[str, torch.Tensor]:
    file = find_file(source, f"{path}/model.safetensors")
    if file is not None:
        return load_file(file)
    file = find_file(source, f"{path}/pytorch_model.bin")
    if file is None:
        raise EngineLoadError(f"{source}: {path} has no weights (model.safetensors)")
    weights: dict[str, torch.Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return weights


def _activation(name: str) -> nn.Module:
    """Return the activation of that name: none but torch's own, since a name could be any code."""
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise EngineLoadError(f"activation function {name!r} is none of torch.nn")
    return kind()


def resolved(source: str, recipe: Recipe) -> str:
    """Return where the transformer itself is.

    Raises:
        EngineLoadError: it is in a folder of its own, at the hub.
    """
    if not recipe.path:
        return source
    if not Path(source).is_dir():
        raise EngineLoadError(
            f"{source}: its transformer is in {recipe.path}; download the model and give its folder instead"
        )
    return str(Path(source) / recipe.path)
