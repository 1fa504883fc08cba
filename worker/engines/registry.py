"""Engines by name: those that come with tokenmq, those of other packages, and any class named in full.

A package registers its own under the entry point group `tokenmq.engines`. Nothing is imported before it is asked
for: torch alone takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .base import Engine, EngineLoadError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "tokenmq.engines"
#: name -> (module relative to this package, class)
_BUILT_IN = {
    "embeddings": (".transformers.embeddings", "EmbeddingEngine"),
    "openai": (".openai.engine", "OpenAIEngine"),
    "synthetic": (".synthetic", "SyntheticEngine"),
    "transformers": (".transformers.engine", "TransformersEngine"),
    "vllm": (".vllm.engine", "VllmEngine"),
}
#: Modules that an extra installs.
_EXTRAS = {
    "openai": ("aiohttp",),
    "transformers": ("torch", "transformers", "tokenizers", "gguf", "safetensors", "huggingface_hub"),
    "vllm": ("vllm",),
}
#: The extra that an engine needs where it is not of the engine's own name.
_EXTRA_OF = {"embeddings": "transformers"}


def engine_names() -> list[str]:
    """Return the names that `engine_class` knows, sorted."""
    return sorted({*_BUILT_IN, *(point.name for point in _installed())})


def engine_class(name: str) -> type[Engine]:
    """Return the engine class of this name, or the one that `package.module:Class` names.

    Raises:
        EngineLoadError: there is none, it cannot be imported, or it is no Engine; the message says what to do.
    """
    if ":" in name:
        return _imported(name, *name.split(":", 1))
    if name in _BUILT_IN:
        return _imported(name, *_BUILT_IN[name])
    for point in _installed():
        if point.name == name:
            return _imported(name, *point.value.split(":", 1))
    known = ", ".join(engine_names())
    raise EngineLoadError(f"no engine is named {name!r}; there are {known}, or give one as package.module:Class")


def make_engine(engine: str, /, **options: Any) -> Engine:
    """Return an engine, not loaded yet.

    Args:
        engine: its name, as for `engine_class`.
        options: the arguments of its constructor.

    Raises:
        EngineLoadError: as `engine_class`, or the class does not take these options.
    """
    kind = engine_class(engine)
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise EngineLoadError(f"engine {engine!r}: {error}") from error


def _installed() -> Iterable[EntryPoint]:
    """Return the engines of other packages."""
    # Imported here: it takes an eighth of a start, and the engines above need none of it.
    from importlib.metadata import entry_points

    return entry_points(group=ENTRY_POINT_GROUP)


def _imported(name: str, module: str, attribute: str = "") -> type[Engine]:
    try:
        found: object = import_module(module.strip(), __package__)
        for part in attribute.strip().split("."):
            found = getattr(found, part)
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRA_OF.get(name, name)
        if missing in _EXTRAS.get(extra, ()):
            text = f'engine {name!r} needs {missing}, which is not installed: pip install "tokenmq[{extra}]"'
            raise EngineLoadError(text) from error
        raise EngineLoadError(f"engine {name!r} cannot be imported: {error}") from error
    except (AttributeError, ValueError) as error:
        raise EngineLoadError(f"engine {name!r} cannot be found: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise EngineLoadError(f"engine {name!r}: {module}:{attribute} is not a subclass of {Engine.__qualname__}")
    return found
