"""What each kind of server takes beyond the OpenAI API, as tables.

A field that a server does not know it ignores in silence, or it refuses the whole request. So what is sent depends on
who gets it; and a request that needs a field that this server lacks is refused with the field's name.

The names were read in the servers' sources in November 2026: vLLM and SGLang (their `protocol.py`), llama.cpp (the
README of its server), transformers 5.23 (`cli/serving`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Fields of Sampling that the OpenAI API has on both endpoints.
_OPENAI = frozenset({"presence_penalty", "frequency_penalty", "logit_bias", "logprobs"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server.

    Attributes:
        name: what `--dialect` calls it.
        takes: fields of Sampling that it takes besides max_tokens, temperature, top_p, seed and stop.
        structured: those of json_schema, regex and choice that it takes, on /completions.
        chat_structured: the same on /chat/completions.
        renames: its own names for such fields.
        all_tokens: its `top_k` for all tokens.
        seeds: seeds are below it.
        stops: stop strings that it takes at most; with more, the engine itself looks for them.
        streams_usage: it is to be asked for usage by `stream_options`; else it tells it anyway, or refuses the field.
        token_ids: it tells the ids of tokens when asked by `return_token_ids`.
        token_prompts: a prompt may be token ids.
        template: it takes `chat_template_kwargs`.
        more: further fields of every request.
        tool_choice: sent with tools; None leaves it to the server.
        lists_model: the model must stand in its list of models.
    """

    name: str
    takes: frozenset[str] = _OPENAI
    structured: frozenset[str] = frozenset()
    chat_structured: frozenset[str] = frozenset()
    renames: Mapping[str, str] = field(default_factory=dict)
    all_tokens: int = 0
    seeds: int = 2**63
    stops: int = 64
    streams_usage: bool = True
    token_ids: bool = False
    token_prompts: bool = True
    template: bool = True
    more: Mapping[str, object] = field(default_factory=dict)
    tool_choice: str | None = None
    lists_model: bool = True


_ALL_STRUCTURED = frozenset({"json_schema", "regex", "choice"})
_SERVING = _OPENAI | {"top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos"}

VLLM = Dialect(
    "vllm",
    takes=_SERVING | {"bad_words"},
    structured=_ALL_STRUCTURED,
    chat_structured=_ALL_STRUCTURED,
    all_tokens=-1,
    token_ids=True,
    # With `auto` it refuses tools unless it was started with a tool parser; so the model's own text comes.
    tool_choice="none",
)
SGLANG = Dialect(
    "sglang",
    takes=_SERVING,
    structured=_ALL_STRUCTURED,
    chat_structured=_ALL_STRUCTURED,
    all_tokens=-1,
    token_ids=True,
)
LLAMA_CPP = Dialect(
    "llama.cpp",
    takes=_OPENAI | {"top_k", "min_p", "repetition_penalty", "ignore_eos"},
    structured=frozenset({"json_schema", "choice"}),
    chat_structured=frozenset({"json_schema", "choice"}),
    renames={"repetition_penalty": "repeat_penalty"},
    seeds=2**32 - 1,  # the last one means a random seed
    # Penalties look back over all tokens, not over the last 64.
    more={"repeat_last_n": -1},
    lists_model=False,
)
TRANSFORMERS = Dialect(
    "transformers",
    takes=frozenset(),
    seeds=2**32,
    stops=0,  # with continuous batching it ignores them
    streams_usage=False,
    token_prompts=False,
    lists_model=False,  # it lists the hub's cache, whatever it serves
)
OPENAI = Dialect("openai", chat_structured=frozenset({"json_schema"}), stops=4, template=False)

DIALECTS = {one.name: one for one in (VLLM, SGLANG, LLAMA_CPP, TRANSFORMERS, OPENAI)}
#: What servers write into `owned_by` of their models.
OWNERS = {"vllm": VLLM, "sglang": SGLANG, "llamacpp": LLAMA_CPP}
