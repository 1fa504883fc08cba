"""The payload of a REQUEST: the prompt and how to continue it. Written by the client, read by the worker only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import limits
from .errors import BadRequestError, ProtocolError
from .packing import pack, unpack
from .schema import Check, boolean, count, dump, fail, integers, listing, mapping, number, optional, record, text

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_tokens: most tokens to generate, 1 or more.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability; 1 for all.
        seed: makes the stream repeatable: each token's noise is a function of the seed and its position. The
            client draws one where the user gave none, so that every request has one.
        stop: strings that end the stream; they are not part of the text.
        stop_token_ids: tokens that end the stream, besides the model's own end tokens.
        ignore_eos: go on to `max_tokens` whatever the model's end tokens say.
        min_p: only tokens with at least this part of the likeliest one's probability; 0 for all.
        repetition_penalty: logits of tokens that prompt or completion have are divided by it, negative ones
            multiplied (CTRL, Keskar and others 2019); 1 for none.
        presence_penalty: taken off the logits of tokens that the completion has; 0 for none.
        frequency_penalty: the same, times how often it has them.
        logit_bias: (token id, what is added to its logit).
        bad_words: strings that must not come.
        min_tokens: only `max_tokens`, or a grammar that is complete, ends the stream before it has so many
            tokens.
        logprobs: tell each token's logprob and those of so many likeliest; None for none.
        json_schema: the completion is a JSON text that this schema, itself a JSON text, allows. At most one of it,
            `regex` and `choice` is given.
        regex: the whole completion matches this regular expression.
        choice: the completion is one of these.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prior:
    """What the reader has of the completion from earlier attempts: the engine goes on behind it.

    Attributes:
        token_ids: the tokens, one or more; they count towards max_tokens.
        text_chars: characters (Unicode code points) of their text that have arrived; the first text that comes now
            begins behind them.
    """

    token_ids: tuple[int, ...]
    text_chars: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What to generate, or to embed: exactly one of `prompt`, `token_ids`, `messages` and `texts` is given.

    Images are the request's attachments: PNG, JPEG or WebP bytes, one for each image part of the messages, or for
    each mark of the model's (`<image>`) in the prompt, in this order.

    Attributes:
        prompt: text to continue, as it stands; the tokenizer adds what it adds by default.
        token_ids: the same, already tokenised; nothing is added.
        messages: a chat; the model's own template makes the prompt. Each has a `role` and a `content`: a string, a
            list of parts {"type": "text", "text": ...} and {"type": "image"}, or None beside `tool_calls`.
        texts: give an embedding for each of these; `sampling`, `prior` and `echo` have no meaning for them.
        sampling: how.
        prior: what earlier attempts have brought; None for a request that begins.
        tools: what the chat template is given as tools: JSON schemas of functions.
        template: further arguments of the chat template, by name.
        echo: the text begins with the prompt's. With `sampling.logprobs` its logprobs come, too.
    """

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    texts: tuple[str, ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    prior: Prior | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False


_role = text(limits.MAX_NAME_CHARS, empty=False)
_content = text(limits.MAX_PROMPT_CHARS)
_penalty = number(-100.0, 100.0)
_grammar = optional(text(limits.MAX_GRAMMAR_CHARS, empty=False))
_bias_token, _bias = count(0, limits.MAX_TOKEN_ID), number(-1e6, 1e6)


def _logit_bias(value: Any, path: str) -> tuple[int, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise fail(path, "a token id and a number", value)
    return _bias_token(value[0], f"{path}[0]"), _bias(value[1], f"{path}[1]")


def _message_part(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ProtocolError(f"{path}: expected a map with a type")  # and not what it is: it may be the prompt
    part = mapping(value, path)
    kind = part.get("type")
    if kind == "text":
        _content(part.get("text"), f"{path}.text")
    elif kind != "image":
        raise fail(f"{path}.type", "text or image", kind)
    return part


_parts = listing(_message_part, limits.MAX_PARTS)


def _message(value: Any, path: str) -> dict[str, Any]:
    message = mapping(value, path)
    absent = [name for name in ("role", "content") if name not in message]
    if absent:
        raise ProtocolError(f"{path}: missing {', '.join(absent)}")
    _role(message["role"], f"{path}.role")
    content = message["content"]
    if isinstance(content, list):
        _parts(content, f"{path}.content")
    elif content is not None or not message.get("tool_calls"):
        _content(content, f"{path}.content")
    return message


_SAMPLING: Check = record(
    Sampling,
    {
        "max_tokens": count(1, limits.MAX_NEW_TOKENS),
        "temperature": number(0.0, 100.0),
        "top_k": count(0, 2**31 - 1),
        "top_p": number(1e-9, 1.0),
        "seed": count(0, MAX_SEED),
        "stop": listing(text(limits.MAX_STOP_CHARS, empty=False), limits.MAX_STOPS),
        "stop_token_ids": integers(0, limits.MAX_TOKEN_ID, limits.MAX_STOPS),
        "ignore_eos": boolean,
        "min_p": number(0.0, 1.0),
        "repetition_penalty": number(0.01, 100.0),
        "presence_penalty": _penalty,
        "frequency_penalty": _penalty,
        "logit_bias": listing(_logit_bias, limits.MAX_BIASES),
        "bad_words": listing(text(limits.MAX_BAD_WORD_CHARS, empty=False), limits.MAX_BAD_WORDS),
        "min_tokens": count(0, limits.MAX_NEW_TOKENS),
        "logprobs": optional(count(0, limits.MAX_LOGPROBS)),
        "json_schema": _grammar,
        "regex": _grammar,
        "choice": listing(text(limits.MAX_GRAMMAR_CHARS, empty=False), limits.MAX_CHOICES),
    },
    strict=True,
)
_PRIOR: Check = record(
    Prior,
    {
        "token_ids": integers(0, limits.MAX_TOKEN_ID, limits.MAX_NEW_TOKENS, least=1),
        "text_chars": count(),
    },
    strict=True,
)
_GENERATION: Check = record(
    Generation,
    {
        "prompt": optional(text(limits.MAX_PROMPT_CHARS, empty=False)),
        "token_ids": optional(integers(0, limits.MAX_TOKEN_ID, limits.MAX_PROMPT_TOKENS, least=1)),
        "messages": optional(listing(_message, limits.MAX_MESSAGES, least=1)),
        "texts": optional(listing(text(limits.MAX_PROMPT_CHARS, empty=False), limits.MAX_TEXTS, least=1)),
        "sampling": _SAMPLING,
        "prior": optional(_PRIOR),
        "tools": listing(mapping, limits.MAX_TOOLS),
        "template": mapping,
        "echo": boolean,
    },
    strict=True,
)


def _bound_chat(value: Any) -> None:
    """Raise ProtocolError where the free-form parts of a request have too many values to be looked at one by one.

    A container's values are counted before any is looked at: this takes no longer for those that are far too many.
    """
    parts = ("messages", "tools", "template")
    pending = [value[name] for name in parts if value.get(name) is not None] if isinstance(value, Mapping) else []
    left = limits.MAX_CHAT_VALUES
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            item = item.values()
        elif not isinstance(item, (list, tuple)):
            continue
        left -= len(item)
        if left < 0:
            most = limits.MAX_CHAT_VALUES
            raise ProtocolError(f"request: messages, tools and template have more than {most} values together")
        pending.extend(item)


def check_generation(value: Mapping[str, Any]) -> Generation:
    """Build a Generation from plain data.

    Raises:
        BadRequestError: a field is missing, unknown, mistyped or out of range; the message names it.
    """
    try:
        _bound_chat(value)
        generation: Generation = _GENERATION(value, "request")
    except ProtocolError as error:
        raise BadRequestError(error.message) from error
    given = [name for name in ("prompt", "token_ids", "messages", "texts") if getattr(generation, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise BadRequestError(f"request: give exactly one of prompt, token_ids, messages and texts; got {found}")
    prior, sampling = generation.prior, generation.sampling
    if prior is not None:
        if generation.texts is not None:
            raise BadRequestError("request.prior: embeddings have no tokens to go on behind")
        if len(prior.token_ids) > sampling.max_tokens:
            raise BadRequestError(
                f"request.prior: {len(prior.token_ids)} tokens, max_tokens is {sampling.max_tokens}"
            )
    if (generation.tools or generation.template) and generation.messages is None:
        raise BadRequestError("request: tools and template are for a chat: give messages")
    _check_sampling(sampling)
    return generation


def _check_sampling(sampling: Sampling) -> None:
    """Raise BadRequestError where fields of it contradict one another."""
    if sampling.min_tokens > sampling.max_tokens:
        raise BadRequestError(
            f"request.sampling.min_tokens: {sampling.min_tokens}, max_tokens is {sampling.max_tokens}"
        )
    given = [name for name in ("json_schema", "regex", "choice") if getattr(sampling, name)]
    if len(given) > 1:
        found = " and ".join(given)
        raise BadRequestError(f"request.sampling: give one of json_schema, regex and choice; got {found}")


def pack_generation(generation: Generation) -> bytes:
    """Return the payload for a REQUEST.

    Raises:
        BadRequestError: it holds what cannot be packed, or is larger than MAX_PAYLOAD_BYTES.
    """
    try:
        payload = pack(dump(generation))
    except ProtocolError as error:
        raise BadRequestError(f"request: {error.message}") from error
    if len(payload) > limits.MAX_PAYLOAD_BYTES:
        raise BadRequestError(f"request: {len(payload)} bytes, at most {limits.MAX_PAYLOAD_BYTES} are allowed")
    return payload


def resumed(payload: bytes, prior: Prior) -> bytes:
    """Return the payload of the same request, to be continued behind `prior`.

    Raises:
        BadRequestError: with the tokens it is larger than MAX_PAYLOAD_BYTES.
    """
    return pack_generation(replace(unpack_generation(payload), prior=prior))


def unpack_generation(payload: bytes) -> Generation:
    """Return what a payload asks for.

    Raises:
        BadRequestError: it is not valid.
    """
    try:
        value = unpack(payload, "request", limits.MAX_PAYLOAD_BYTES)
    except ProtocolError as error:
        raise BadRequestError(error.message) from error
    return check_generation(value)
