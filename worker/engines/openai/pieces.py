"""An event of a streamed completion as a value, checked: nothing of what a server sends is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ....protocol.limits import MAX_COUNT, MAX_TOKEN_ID
from ....protocol.messages import TokenLogprob, TokenLogprobs
from .faults import engine_failed, of_event

#: The end of a stream.
DONE = b"[DONE]"
#: For minus infinity, and what no logarithm of a probability is.
_LEAST_LOGPROB = -9999.0
_ID_PREFIX = "token_id:"


@dataclass(frozen=True, slots=True)
class Call:
    """A part of a tool call; `name` comes once, `arguments` in parts."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event tells.

    Attributes:
        text: of the answer.
        reasoning: text that the server has told apart as the model's reasoning.
        calls: tool calls that it has read from the model's text.
        token_ids: the tokens; None where the server does not tell them.
        logprobs: of the tokens, where they were asked for.
        reason: why the completion ends, in the server's word; "" while it goes on.
        prompt_tokens, completion_tokens, cached_tokens: usage; None where the event has none.
    """

    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    token_ids: tuple[int, ...] | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = 0

    @property
    def speaks(self) -> bool:
        """Whether it has anything that took a token."""
        return bool(self.text or self.reasoning or self.calls)

    @property
    def chars(self) -> int:
        """Characters in it, all together."""
        called = sum(len(call.name) + len(call.arguments) for call in self.calls)
        return len(self.text) + len(self.reasoning) + called


def parse(data: bytes, server: str, top: int) -> Piece:
    """Return what an event says.

    Args:
        data: the event's data; not DONE.
        server: who sent it, for error messages.
        top: likeliest tokens that were asked for with each logprob.

    Raises:
        ServerError: it tells of an error, or is no event of a completion.
    """
    try:
        event = json.loads(data)
        if isinstance(event, Mapping):
            return _piece(event, server, top)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise engine_failed(f"{server} sent what is no event of a completion: {data[:80].decode('utf-8', 'replace')!r}")


def _piece(event: Mapping[str, Any], server: str, top: int) -> Piece:
    if event.get("error"):
        raise of_event(server, event["error"])
    usage = event.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    counts = {
        "prompt_tokens": _count(usage.get("prompt_tokens")),
        "completion_tokens": _count(usage.get("completion_tokens")),
        "cached_tokens": _count(cached) or 0,
    }
    choices = event.get("choices")
    if not choices:
        return Piece(**counts)  # type: ignore[arg-type]
    choice = choices[0]
    delta = choice.get("delta")
    said = choice if delta is None else delta
    ids = choice.get("token_ids")
    token_ids = None if ids is None else tuple(_token_id(one) for one in ids)
    return Piece(
        text=_text(choice.get("text") if delta is None else delta.get("content")),
        reasoning=_text(said.get("reasoning_content") or said.get("reasoning")),
        calls=tuple(_call(one) for one in said.get("tool_calls") or ()),
        token_ids=token_ids,
        logprobs=_logprobs(choice.get("logprobs") or {}, token_ids, top),
        reason=_text(choice.get("finish_reason")),
        **counts,  # type: ignore[arg-type]
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError("not a text")
    return value


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _token_id(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TOKEN_ID:
        raise ValueError("not a token id")
    return value


def _call(value: Any) -> Call:
    function = value.get("function") or {}
    index = value.get("index")
    return Call(index if type(index) is int else 0, _text(function.get("name")), _text(function.get("arguments")))


# --- logprobs -------------------------------------------------------------------------------------------------------


def _logprobs(value: Any, token_ids: tuple[int, ...] | None, top: int) -> tuple[TokenLogprobs, ...]:
    """Return one for each token: from a list `content` (chats; llama.cpp always), or from lists side by side."""
    content = value.get("content")
    if content is not None:
        found = [(*_told(one), [_told(other) for other in one.get("top_logprobs") or ()]) for one in content]
    else:
        texts, chances = value.get("tokens") or (), value.get("token_logprobs") or ()
        tops = value.get("top_logprobs") or [{}] * len(texts)
        found = [
            (*_token(text), _logprob(chance), [(*_token(key), _logprob(one)) for key, one in (others or {}).items()])
            for text, chance, others in zip(texts, chances, tops, strict=True)
        ]
    known = token_ids if token_ids is not None and len(token_ids) == len(found) else None
    told = []
    for place, (token_id, text, logprob, others) in enumerate(found):
        own = known[place] if known else token_id
        likeliest = sorted(others, key=lambda other: -other[2])[:top]
        alternatives = tuple(TokenLogprob(own if name == text else at, name, p) for at, name, p in likeliest)
        told.append(TokenLogprobs(own, text, logprob, alternatives))
    return tuple(told)


def _told(entry: Any) -> tuple[int, str, float]:
    token_id, text = _token(entry["token"])
    return (_token_id(entry["id"]) if "id" in entry else token_id), text, _logprob(entry["logprob"])


def _token(text: Any) -> tuple[int, str]:
    """Return id and text of a token; 0 for the id unless the text is one: vLLM can be set to write them so."""
    told = _text(text)
    number = told.removeprefix(_ID_PREFIX)
    if number != told and number.isascii() and number.isdigit():
        return _token_id(int(number)), ""
    return 0, told


def _logprob(value: Any) -> float:
    if value is None:
        return _LEAST_LOGPROB
    number = float(value)
    return min(0.0, max(_LEAST_LOGPROB, number)) if number == number else _LEAST_LOGPROB
