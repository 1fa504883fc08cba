"""How a stream looks on the terminal, and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..protocol.log import printable
from .explain import decision_line
from .tables import table

if TYPE_CHECKING:
    from ..client import Chunk, Stream, TokenLogprobs

_LOGPROB_COLUMNS = ("position", "token_id", "text", "logprob", "top")


def print_stream(stream: Stream, *, as_json: bool, index: int = 0) -> str:
    """Print a stream as it comes; return its text. `index` says which of several it is."""
    pieces = []
    rows: list[dict[str, Any]] = []
    try:
        for chunk in stream:
            pieces.append(chunk.text)
            if as_json:
                print_json(_chunk_values(chunk, index))
            else:
                click.echo(_harmless(chunk.text), nl=False)
                rows += [_logprob_row(chunk.offset + place, one) for place, one in enumerate(chunk.logprobs)]
            sys.stdout.flush()
    finally:
        if pieces and not as_json:
            click.echo()  # an error stands on a line of its own
    if as_json:
        print_json({"index": index, **_summary(stream)})
    else:
        if rows:
            click.echo(table(rows, _LOGPROB_COLUMNS))
        for decision in stream.timings.routing if stream.timings else ():
            click.echo(decision_line(decision), err=True)
    return "".join(pieces)


def _harmless(text: str) -> str:
    """Return what a terminal may show of a text: what others wrote must not drive it (ESC and the like)."""
    if text.isprintable() or not sys.stdout.isatty():
        return text  # a file or a pipe gets what there is
    return "".join(c if c in "\n\t" else printable(c) for c in text)


def print_json(values: Any) -> None:
    """Print plain data on a line."""
    click.echo(json.dumps(values, ensure_ascii=False))


def _chunk_values(chunk: Chunk, index: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "index": index,
        "text": chunk.text,
        "token_ids": list(chunk.token_ids),
        "offset": chunk.offset,
    }
    if chunk.prompt_logprobs:
        values["prompt_logprobs"] = [None if one is None else asdict(one) for one in chunk.prompt_logprobs]
    if chunk.logprobs:
        values["logprobs"] = [asdict(one) for one in chunk.logprobs]
    return values


def _logprob_row(position: int, one: TokenLogprobs) -> dict[str, Any]:
    top = [f"{other.text!r} {other.logprob:.3f}" for other in one.top]
    return {
        "position": position,
        "token_id": one.token_id,
        "text": repr(one.text),
        "logprob": one.logprob,
        "top": "  ".join(top) or None,
    }


def _summary(stream: Stream) -> dict[str, Any]:
    usage, timings = stream.usage, stream.timings
    return {
        "request": stream.id,
        "finish_reason": stream.finish_reason,
        "worker": stream.worker,
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
        "routing": [asdict(decision) for decision in timings.routing] if timings else [],
        "attempts": [
            {
                "number": attempt.number,
                "broker": attempt.broker,
                "worker": attempt.worker,
                "first_token": attempt.first_token,
                "error": attempt.error.code if attempt.error else None,
                "hedge": attempt.hedge,
                "cancelled": attempt.cancelled,
            }
            for attempt in stream.attempts
        ],
    }
