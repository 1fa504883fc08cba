"""The payload of a REQUEST: the prompt and how to continue it. Written by the client, read by the worker only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import limits
from .errors import BadRequestError, ProtocolError
from .packing import pack, unpack
from .schema import Check, boolean, count, dump, integers, listing, mapping, number, optional, record, text

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
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


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
    """What to generate: exactly one of `prompt`, `token_ids` and `messages` is given.

    Attributes:
        prompt: text to continue, as it stands; the tokenizer adds what it adds by default.
        token_ids: the same, already tokenised; nothing is added.
        messages: a chat; the model's own template makes the prompt.
        sampling: how.
        prior: what earlier attempts have brought; None for a request that begins.
    """

    prompt: str | None = None
    token_ids: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    prior: Prior | None = None


_role = text(limits.MAX_NAME_CHARS, empty=False)
_content = text(limits.MAX_PROMPT_CHARS)


def _message(value: Any, path: str) -> dict[str, Any]:
    message = mapping(value, path)
    absent = [name for name in ("role", "content") if name not in message]
    if absent:
        raise ProtocolError(f"{path}: missing {', '.join(absent)}")
    _role(message["role"], f"{path}.role")
    _content(message["content"], f"{path}.content")
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
        "sampling": _SAMPLING,
        "prior": optional(_PRIOR),
    },
    strict=True,
)


def check_generation(value: Mapping[str, Any]) -> Generation:
    """Build a Generation from plain data.

    Raises:
        BadRequestError: a field is missing, unknown, mistyped or out of range; the message names it.
    """
    try:
        generation: Generation = _GENERATION(value, "request")
    except ProtocolError as error:
        raise BadRequestError(error.message) from error
    given = [name for name in ("prompt", "token_ids", "messages") if getattr(generation, name) is not None]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        raise BadRequestError(f"request: give exactly one of prompt, token_ids and messages; got {found}")
    prior, most = generation.prior, generation.sampling.max_tokens
    if prior is not None and len(prior.token_ids) > most:
        raise BadRequestError(f"request.prior: {len(prior.token_ids)} tokens, max_tokens is {most}")
    return generation


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
