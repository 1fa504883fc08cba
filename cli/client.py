"""zmq-client: talk to a broker from the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import click

from ..client import Stream
from ..client.settings import (
    CONNECT_TIMEOUT_S,
    FIRST_TOKEN_TIMEOUT_S,
    INTER_TOKEN_TIMEOUT_S,
    MAX_ATTEMPTS,
    RECOVERY_TIMEOUT_S,
)
from ..protocol.limits import MAX_PRIORITY, NORMAL_PRIORITY
from ..protocol.payload import Sampling
from ..transport.endpoints import DEFAULT_FRONTEND
from .asking import broker_option, connected, json_option
from .explain import decision_line
from .manage import COMMANDS
from .options import option, settings, version_option

_DEFAULTS = Sampling()


@click.group(context_settings=settings("TOKENMQ_CLIENT"))
@option(
    "--broker", multiple=True, default=(DEFAULT_FRONTEND,), metavar="ENDPOINT",
    help="The broker's frontend. Repeatable: requests go to the first that is there, and over to the next.",
)  # fmt: skip
@option(
    "--connect-timeout", type=click.FloatRange(min=0, min_open=True), default=CONNECT_TIMEOUT_S, metavar="S",
    help="Seconds to wait for a broker to answer.",
)  # fmt: skip
@option(
    "--queue-timeout", type=click.FloatRange(min=0, min_open=True), show_default="none", metavar="S",
    help="Seconds to wait at the broker for a worker.",
)  # fmt: skip
@option(
    "--first-token-timeout", type=click.FloatRange(min=0, min_open=True), default=FIRST_TOKEN_TIMEOUT_S, metavar="S",
    help="Seconds that a worker may take for the first token; then another one is asked.",
)  # fmt: skip
@option(
    "--inter-token-timeout", type=click.FloatRange(min=0, min_open=True), default=INTER_TOKEN_TIMEOUT_S, metavar="S",
    help="The same for each further token.",
)  # fmt: skip
@option(
    "--max-attempts", type=click.IntRange(min=1), default=MAX_ATTEMPTS, metavar="N",
    help="How many attempts of one request may fail at workers.",
)  # fmt: skip
@option(
    "--recovery-timeout", type=click.FloatRange(min=0, min_open=True), default=RECOVERY_TIMEOUT_S, metavar="S",
    help="Seconds that a request may be without a worker after a failure.",
)  # fmt: skip
@version_option
@click.pass_context
def main(
    context: click.Context,
    broker: tuple[str, ...],
    connect_timeout: float,
    queue_timeout: float | None,
    first_token_timeout: float,
    inter_token_timeout: float,
    max_attempts: int,
    recovery_timeout: float,
) -> None:
    """Ask the models behind a broker, or the broker itself."""
    context.obj = {
        "endpoints": list(broker),
        "connect_timeout_s": connect_timeout,
        "queue_timeout_s": queue_timeout,
        "first_token_timeout_s": first_token_timeout,
        "inter_token_timeout_s": inter_token_timeout,
        "max_attempts": max_attempts,
        "recovery_timeout_s": recovery_timeout,
    }


_SAMPLING: list[Callable[[Any], Any]] = [
    option("--max-tokens", type=int, default=_DEFAULTS.max_tokens, metavar="N", help="Most new tokens."),
    option(
        "--temperature", type=float, default=_DEFAULTS.temperature, metavar="X",
        help="0 takes the likeliest token, higher values vary more.",
    ),
    option("--top-k", type=int, default=_DEFAULTS.top_k, metavar="N", help="Only the N likeliest; 0: all."),
    option(
        "--top-p", type=float, default=_DEFAULTS.top_p, metavar="P",
        help="Only the likeliest that together have this probability.",
    ),
    option("--seed", type=int, show_default="a new one", metavar="N", help="Repeat a stream."),
    option("--stop", multiple=True, show_default="none", metavar="TEXT", help="End before this text. Repeatable."),
    option("--ignore-eos", is_flag=True, help="Go on to --max-tokens."),
    option(
        "--deadline", type=float, show_default="never", metavar="S",
        help="Give the request up after so many seconds.",
    ),
    option("--no-resume", is_flag=True, help="Fail when a worker or broker does, instead of going on elsewhere."),
    option(
        "--priority", type=click.IntRange(0, MAX_PRIORITY), default=NORMAL_PRIORITY, metavar="N",
        help="While workers are busy, requests of a greater one are served first.",
    ),
    option(
        "--session", show_default="the beginning of the prompt", metavar="NAME",
        help="Have one worker serve all requests of this name, where the broker's policy goes by it.",
    ),
    option(
        "--hedge-after", type=click.FloatRange(min=0, min_open=True), show_default="never", metavar="S",
        help="Seconds without a first token until a second worker is asked, too; the first to answer goes on.",
    ),
    option("--explain", is_flag=True, help="Say at the end, on standard error, why the worker was chosen."),
]  # fmt: skip


def _sampling_options(command: Any) -> Any:
    for decorate in reversed(_SAMPLING):
        command = decorate(command)
    return command


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
    arguments = {name: values[name] for name in names}
    more = {
        "deadline_s": values["deadline"],
        "resume": not values["no_resume"],
        "priority": values["priority"],
        "session": values["session"],
        "hedge_after_s": values["hedge_after"],
        "explain": values["explain"],
    }
    return {**arguments, **more, "stop": list(values["stop"])}


def _print_stream(stream: Stream, *, as_json: bool) -> str:
    """Print a stream as it comes; return its text."""
    pieces = []
    try:
        for chunk in stream:
            pieces.append(chunk.text)
            if as_json:
                values = {"text": chunk.text, "token_ids": list(chunk.token_ids), "offset": chunk.offset}
                click.echo(json.dumps(values, ensure_ascii=False))
            else:
                click.echo(chunk.text, nl=False)
            sys.stdout.flush()
    finally:
        if pieces and not as_json:
            click.echo()  # an error stands on a line of its own
    if as_json:
        click.echo(json.dumps(_summary(stream), ensure_ascii=False))
    else:
        for decision in stream.timings.routing if stream.timings else ():
            click.echo(decision_line(decision), err=True)
    return "".join(pieces)


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


@main.command()
@click.argument("model")
@click.argument("prompt")
@_sampling_options
@json_option
@broker_option
def generate(model: str, prompt: str, as_json: bool, broker: tuple[str, ...], **values: Any) -> None:
    """Continue PROMPT with MODEL; the text appears as it is generated. PROMPT - reads standard input."""
    with connected(broker) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        _print_stream(client.generate(model, prompt=text, **_arguments(values)), as_json=as_json)


@main.command(short_help="Chat with MODEL: one MESSAGE, or a conversation.")
@click.argument("model")
@click.argument("message", required=False)
@option("--system", show_default="none", metavar="TEXT", help="A system prompt.")
@_sampling_options
@json_option
@broker_option
def chat(
    model: str, message: str | None, system: str | None, as_json: bool, broker: tuple[str, ...], **values: Any
) -> None:
    """Chat with MODEL: one MESSAGE, or a conversation, a line each, until end of input (Ctrl-D)."""
    history: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with connected(broker) as client:
        for line in [message] if message is not None else _lines():
            history.append({"role": "user", "content": line})
            answer = _print_stream(client.chat(model, messages=history, **_arguments(values)), as_json=as_json)
            history.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Yield what the user types, without empty lines; prompt for it on a terminal."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        if prompt:
            click.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            if prompt:
                click.echo(err=True)  # the shell's prompt stands on a line of its own
            return
        if line.strip():
            yield line.strip()


for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
