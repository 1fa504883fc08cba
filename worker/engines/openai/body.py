"""The HTTP request for a job: a pure function of the job and the server's dialect."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ....protocol.errors import BadRequestError
from ....protocol.payload import Generation, Sampling
from ..base import Job
from .dialects import OPENAI, SGLANG, VLLM, Dialect

COMPLETIONS = "/completions"
CHAT = "/chat/completions"
#: Numbers for which a server may have another default, such as the one in the model's generation_config.json.
_ALWAYS = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_STRUCTURED = ("json_schema", "regex", "choice")
#: Fields that every server takes, or that are not sent as they are.
_COMMON = frozenset({"max_tokens", "temperature", "top_p", "seed", "stop", *_STRUCTURED})
_DEFAULTS = Sampling()
_IMAGE_KINDS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpeg"))


def request_for(job: Job, model: str, dialect: Dialect) -> tuple[str, dict[str, Any]]:
    """Return path and JSON body of the request that runs a job.

    Args:
        job: the job; its prompt is not `texts`.
        model: the model's name at the server.
        dialect: the server's.

    Raises:
        BadRequestError: the server cannot be asked for this; the message names the field.
    """
    generation = job.generation
    chat = generation.messages is not None
    _refuse(generation, job.attachments, dialect, chat)
    body: dict[str, Any] = {"model": model, "stream": True, **dialect.more}
    if dialect.streams_usage:
        body["stream_options"] = {"include_usage": True}
    if dialect.token_ids:
        body["return_token_ids"] = True
    if generation.messages is not None:
        body["messages"] = _messages(generation.messages, job.attachments)
        if generation.tools:
            body["tools"] = list(generation.tools)
            if dialect.tool_choice is not None:
                body["tool_choice"] = dialect.tool_choice
        if generation.template:
            body["chat_template_kwargs"] = dict(generation.template)
    else:
        body["prompt"] = generation.prompt if generation.prompt is not None else list(generation.token_ids or ())
    _add_sampling(body, generation.sampling, dialect, chat)
    return (CHAT if chat else COMPLETIONS), body


def _refuse(generation: Generation, attachments: Sequence[bytes], dialect: Dialect, chat: bool) -> None:
    """Raise BadRequestError for what this server would ignore."""
    sampling = generation.sampling
    taken = _COMMON | dialect.takes
    lacks = [
        f"sampling.{one.name}"
        for one in fields(Sampling)
        if one.name not in taken and getattr(sampling, one.name) != getattr(_DEFAULTS, one.name)
    ]
    structured = dialect.chat_structured if chat else dialect.structured
    lacks += [f"sampling.{name}" for name in _STRUCTURED if getattr(sampling, name) and name not in structured]
    if generation.token_ids is not None and not dialect.token_prompts:
        lacks.append("token_ids")
    if generation.template and not dialect.template:
        lacks.append("template")
    if attachments and not chat:
        lacks.append("images in a prompt (give messages)")
    if generation.echo and generation.prompt is None:
        lacks.append("echo of anything but a prompt's text")
    elif generation.echo and sampling.logprobs is not None:
        lacks.append("logprobs of an echo")
    if lacks:
        raise BadRequestError(f"request: the model runs on a server ({dialect.name}) without {', '.join(lacks)}")


# --- sampling -------------------------------------------------------------------------------------------------------


def _add_sampling(body: dict[str, Any], sampling: Sampling, dialect: Dialect, chat: bool) -> None:
    body |= {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed % dialect.seeds,
    }
    if 0 < len(sampling.stop) <= dialect.stops:
        body["stop"] = list(sampling.stop)
    for name in sorted(dialect.takes - {"logprobs"}):
        value = getattr(sampling, name)
        if name not in _ALWAYS and value == getattr(_DEFAULTS, name):
            continue
        if name == "top_k" and not value:
            value = dialect.all_tokens
        elif name == "logit_bias":
            value = {str(token): bias for token, bias in value}
        body[dialect.renames.get(name, name)] = list(value) if isinstance(value, tuple) else value
    if sampling.logprobs is not None:
        # llama.cpp tells nothing for 0 alternatives; one too many is cut off again.
        least = max(1, sampling.logprobs)
        body |= {"logprobs": True, "top_logprobs": least} if chat else {"logprobs": least}
    _add_structure(body, sampling, dialect, chat)


def _add_structure(body: dict[str, Any], sampling: Sampling, dialect: Dialect, chat: bool) -> None:
    schema = None if sampling.json_schema is None else _schema(sampling.json_schema)
    if dialect is VLLM:
        wanted = {"json": schema, "regex": sampling.regex, "choice": list(sampling.choice) or None}
        given = {name: value for name, value in wanted.items() if value is not None}
        if given:
            body["structured_outputs"] = given
    elif schema is not None:
        if chat or dialect is OPENAI:
            named = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        else:
            body["json_schema"] = json.dumps(schema) if dialect is SGLANG else schema
    elif sampling.regex is not None:
        body["regex"] = sampling.regex
    elif sampling.choice and dialect is SGLANG:
        body["regex"] = "(" + "|".join(map(re.escape, sampling.choice)) + ")"
    elif sampling.choice:
        # JSON's escapes are those of llama.cpp's grammars (GBNF), except that of a character beyond ASCII.
        body["grammar"] = "root ::= " + " | ".join(json.dumps(one, ensure_ascii=False) for one in sampling.choice)


def _schema(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"request.sampling.json_schema: it is no JSON: {error}") from error


# --- messages -------------------------------------------------------------------------------------------------------


def _messages(messages: Sequence[Mapping[str, Any]], images: Sequence[bytes]) -> list[dict[str, Any]]:
    urls = [_data_url(number, image) for number, image in enumerate(images)]
    marks = sum(part["type"] == "image" for message in messages for part in _parts(message))
    if marks != len(urls):
        raise BadRequestError(f"request.messages: {marks} image parts, but {len(urls)} images are attached")
    left = iter(urls)
    found = []
    for message in messages:
        made = dict(message)
        if isinstance(message["content"], list):
            made["content"] = [
                {"type": "image_url", "image_url": {"url": next(left)}} if part["type"] == "image" else part
                for part in _parts(message)
            ]
        if message.get("tool_calls"):
            calls = message["tool_calls"]
            if not isinstance(calls, list):
                raise BadRequestError("request.messages: tool_calls must be a list of maps")
            made["tool_calls"] = [_call(call, place) for place, call in enumerate(calls)]
        found.append(made)
    return found


def as_json(value: Any) -> str:
    """Return what a user sent as JSON.

    Raises:
        BadRequestError: it has what JSON does not have.
    """
    try:
        return json.dumps(value)
    except TypeError as error:  # such as bytes, which msgpack has
        raise BadRequestError(f"request: it cannot be sent to the server as JSON: {error}") from error


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message["content"]
    return content if isinstance(content, list) else []


def _data_url(number: int, image: bytes) -> str:
    kind = next((kind for begin, kind in _IMAGE_KINDS if image.startswith(begin)), None)
    if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise BadRequestError(f"request: image {number} is neither PNG, JPEG nor WebP")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _call(call: Any, place: int) -> Any:
    """Return a call of an earlier turn as the OpenAI API has it: chat templates know arguments as a map."""
    if not isinstance(call, Mapping):
        raise BadRequestError("request.messages: tool_calls must be a list of maps")
    function = dict(call["function"]) if isinstance(call.get("function"), Mapping) else dict(call)
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = as_json(function.get("arguments") or {})
    return {"id": call.get("id") or f"call_{place}", "type": "function", "function": function}
