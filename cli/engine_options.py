"""Which engine each of `zmq-worker`'s own options is for: one that would change nothing is an error."""

from __future__ import annotations

from collections.abc import Mapping

import click
from click.core import ParameterSource

#: By the option's parameter: the engines that it is for. Others, those of other packages too, are not handed it.
ENGINES_OF: Mapping[str, tuple[str, ...]] = {
    "dtype": ("transformers", "embeddings", "vllm"),
    "max_context": ("transformers", "embeddings", "vllm"),
    "cache_tokens": ("transformers",),
    "prefix_cache": ("transformers",),
    "prefill_tokens": ("transformers",),
    "compile_decode": ("transformers",),
    "cache_dir": ("transformers",),
    "resume": ("transformers",),
    "adapter": ("transformers",),
    "engine_option": ("vllm",),
    "base_url": ("openai",),
    "api_key_env": ("openai",),
    "dialect": ("openai",),
    "server_wait": ("openai",),
    "tokens_per_second": ("synthetic",),
}


def refuse_foreign(context: click.Context, engine: str) -> None:
    """Refuse options of the command line that are not for this engine; of the environment they may be for others.

    Raises:
        ValueError: there is one; it says for which engine it is.
    """
    for parameter in context.command.params:
        engines = ENGINES_OF.get(parameter.name or "", (engine,))
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and engine not in engines:
            names = " and ".join(filter(None, (", ".join(engines[:-1]), engines[-1])))
            noun = "engine" if len(engines) == 1 else "engines"
            raise ValueError(f"{parameter.opts[0]}: it is for the {noun} {names}, not for {engine}")
