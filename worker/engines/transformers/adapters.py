"""LoRA adapters beside one model: each row of a forward is computed by its own, or by none.

peft puts a layer of its own around each linear layer that an adapter changes. That layer takes the names of the rows'
adapters, and adds to what the plain layer gives for all rows what each adapter gives for its own. Here a hook hands
it the names for the forward that comes next.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ....protocol.limits import MAX_NAME_CHARS
from ..base import EngineLoadError
from .devices import first_line, is_out_of_memory

#: Stands between the served names of the model and of an adapter.
SEPARATOR = ":"
#: What peft calls the model without an adapter.
_PLAIN = "__base__"
#: Greatest relative difference between what the plain model gives before adapters are there and afterwards, and
#: between a row alone and among others.
TOLERANCE = 1e-3
TOLERANCE_HALF = 0.1
#: Tokens of the trial.
TRIAL = 8


class Adapters:
    """Which adapter computes each row of the next forward.

    Attributes:
        names: of the adapters, as users know them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Have all rows computed by the plain model."""
        self.names = tuple(names)
        self._rows: list[str] = []

    def select(self, rows: Sequence[str]) -> None:
        """Say which adapter each row has from now on, "" for none; no rows: all are plain, however many come."""
        self._rows = [_key(self.names.index(name)) if name else _PLAIN for name in rows]

    def hook(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Hand a layer of peft's the rows' adapters, just before its forward."""
        return args, {**kwargs, "adapter_names": self._rows or [_PLAIN] * len(args[0])}


def _key(number: int) -> str:
    """Return the name for peft, which allows no dots and looks for one name within another."""
    return f"adapter{number:04}"


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to load.

    Attributes:
        name: what users ask for, behind the model's name.
        path: the folder that peft wrote.
    """

    name: str
    path: Path


def parse(given: Sequence[str], served: str) -> list[Source]:
    """Return the adapters of options such as `NAME=PATH`.

    Args:
        given: the options.
        served: the model's served name.

    Raises:
        EngineLoadError: one is no such option, a name cannot be one, or is there twice.
    """
    sources: list[Source] = []
    for text in given:
        name, separator, path = text.partition("=")
        if not separator or not name or not path:
            raise EngineLoadError(f"adapter {text!r}: give it as NAME=PATH")
        if SEPARATOR in name:
            raise EngineLoadError(f"adapter {name!r}: its name must not contain {SEPARATOR!r}")
        if len(served + SEPARATOR + name) > MAX_NAME_CHARS:
            raise EngineLoadError(
                f"adapter {name!r}: {served + SEPARATOR + name!r} is too long, at most {MAX_NAME_CHARS} characters"
            )
        if any(source.name == name for source in sources):
            raise EngineLoadError(f"adapter {name!r} is given twice")
        sources.append(Source(name, Path(path)))
    return sources


def attach(model: Any, sources: Sequence[Source]) -> Adapters:
    """Put adapters beside a model; it stays the same object, and computes the same for rows that have none.

    Args:
        model: a transformers model in eval mode.
        sources: the adapters, one or more.

    Raises:
        EngineLoadError: peft is missing; one is no LoRA adapter, is damaged, was made for another model, or changes
            more than its own rows.
    """
    try:
        import peft
    except ImportError as error:
        raise EngineLoadError("adapters need peft: pip install 'tokenmq[transformers]'") from error
    expected = _trial(model)
    holder: Any = None
    for number, source in enumerate(sources):
        config = _config(peft, source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what they say is looked for below
                if holder is None:
                    holder = peft.PeftModel(model, config, _key(number), autocast_adapter_dtype=False)
                else:
                    holder.add_adapter(_key(number), config, autocast_adapter_dtype=False)
                report = holder.load_adapter(
                    source.path, _key(number), torch_device=str(model.device), autocast_adapter_dtype=False
                )
        except Exception as error:
            if is_out_of_memory(error):
                raise EngineLoadError(f"adapter {source.name!r}: no memory for {source.path}") from error
            raise EngineLoadError(
                f"adapter {source.name!r}: {source.path} does not fit {type(model).__name__}: {_reason(error)}"
            ) from error
        if isinstance(model.get_input_embeddings(), peft.tuners.lora.LoraLayer):
            raise EngineLoadError(
                f"adapter {source.name!r}: {source.path} changes the embeddings, which cannot be served beside others"
            )
        odd = [*report.missing_keys, *report.unexpected_keys]
        if odd:
            raise EngineLoadError(
                f"adapter {source.name!r}: {source.path} was made for another model: {len(odd)} of its weights are "
                f"missing or have no place here, such as {odd[0]}"
            )
    adapters = Adapters([source.name for source in sources])
    layers: list[Any] = [module for module in holder.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.register_forward_pre_hook(adapters.hook, with_kwargs=True)
    holder.requires_grad_(requires_grad=False).eval()
    _check(model, adapters, expected)
    return adapters


def _config(peft: Any, source: Source) -> Any:
    """Return an adapter's config; raise EngineLoadError where it is of no kind that can be served."""
    what = f"adapter {source.name!r}: {source.path}"
    if not source.path.is_dir():
        raise EngineLoadError(f"{what}: no such folder")
    if not (source.path / "adapter_config.json").is_file():
        raise EngineLoadError(f"{what} has no adapter_config.json, so it holds no adapter of peft's")
    try:
        config = peft.PeftConfig.from_pretrained(str(source.path))
    except Exception as error:
        raise EngineLoadError(f"{what}: its adapter_config.json is damaged: {first_line(error)}") from error
    if config.peft_type != peft.PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise EngineLoadError(f"{what} is an adapter of the kind {kind}; only LORA can be served")
    # All of these change what other rows get, or depend on more than their own.
    unserved = {
        "modules_to_save": config.modules_to_save,
        "bias": config.bias if config.bias != "none" else None,
        "use_dora": config.use_dora,
        "alora_invocation_tokens": getattr(config, "alora_invocation_tokens", None),
        "target_parameters": getattr(config, "target_parameters", None),
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
    }
    # Ways to begin that take a part out of the model's own weights, which then must be taken out wherever it is used.
    if config.init_lora_weights not in (True, False, "gaussian", "eva", "orthogonal"):
        unserved["init_lora_weights"] = config.init_lora_weights
    for name, value in unserved.items():
        if value:
            raise EngineLoadError(f"{what} was made with {name}={value!r}, which cannot be served beside others")
    config.inference_mode = True
    config.init_lora_weights = True  # no need to draw what is overwritten
    return config


def _reason(error: Exception) -> str:
    """Return the line that says what is wrong: of many weights that do not fit, the first one."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("size mismatch")), first_line(error))


@torch.inference_mode()
def _check(model: Any, adapters: Adapters, expected: torch.Tensor) -> None:
    """Try rows of all adapters in one forward, and each alone.

    Raises:
        EngineLoadError: they cannot be mixed, or an adapter has changed the plain model.
    """
    kind, tolerance = type(model).__name__, TOLERANCE if model.dtype is torch.float32 else TOLERANCE_HALF
    rows = ["", *adapters.names]
    try:
        adapters.select(rows)
        mixed = _trial(model, len(rows))
        alone = [expected[0]]
        for name in adapters.names:
            adapters.select([name])
            alone.append(_trial(model)[0])
    except Exception as error:
        raise EngineLoadError(f"{kind} does not run with adapters of its rows' own: {first_line(error)}") from error
    finally:
        adapters.select([])
    for name, ours, theirs in zip(rows, mixed, alone, strict=True):
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= tolerance:
            what = f"adapter {name!r}" if name else "the plain model"
            raise EngineLoadError(
                f"{kind}: {what} gives other results beside adapters than alone (difference {difference:.2g}, at "
                f"most {tolerance:.2g} is rounding): it cannot be served"
            )


@torch.inference_mode()
def _trial(model: Any, rows: int = 1) -> torch.Tensor:
    """Return the model's logits for the same few tokens in each of some rows, as float32."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.tensor([[(17 * step + 5) % vocabulary for step in range(TRIAL)]] * rows, device=model.device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()
