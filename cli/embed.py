"""zmq-client embed."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from .asking import broker_option, connected, json_option
from .generation import request_arguments, request_options
from .printing import print_json
from .tables import table

_COLUMNS = ("text", "numbers", "norm", "begins")
_SHOWN_CHARS = 48
_SHOWN_NUMBERS = 4


@click.command(short_help="Give vectors for texts.")
@click.argument("model")
@click.argument("text", nargs=-1)
@request_options
@json_option
@broker_option
def embed(model: str, text: tuple[str, ...], as_json: bool, broker: tuple[str, ...], **values: Any) -> None:
    """Give MODEL's vector for each TEXT; without one, for each line of standard input that is not empty.

    The table shows how the vectors begin; --json has them whole.
    """
    with connected(broker, values["direct"]) as client:
        texts = list(text) or [line for line in sys.stdin.read().splitlines() if line.strip()]
        found = client.embed(model, texts, **request_arguments(values))
        vectors = [[_short(number) for number in vector] for vector in found]
        if as_json:
            for index, (each, vector) in enumerate(zip(texts, vectors, strict=True)):
                print_json({"index": index, "text": each, "vector": vector})
            print_json({"texts": len(found), "numbers": found.dimension, "prompt_tokens": found.usage.prompt_tokens})
        else:
            rows = [_row(each, vector) for each, vector in zip(texts, vectors, strict=True)]
            click.echo(table(rows, _COLUMNS))


def _short(number: float) -> float:
    """Return the number with the digits that a float32 has: it is the same, and reads shorter."""
    return float(f"{number:.9g}")


def _row(text: str, vector: list[float]) -> dict[str, Any]:
    shown = text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."
    return {
        "text": repr(shown),
        "numbers": len(vector),
        "norm": math.hypot(*vector),
        "begins": " ".join(f"{number:.4f}" for number in vector[:_SHOWN_NUMBERS]),
    }
