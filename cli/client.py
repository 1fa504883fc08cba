"""zmq-client: talk to a broker from the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from ..client import Client, Stream
from ..client.settings import (
    CONNECT_TIMEOUT_S,
    FIRST_TOKEN_TIMEOUT_S,
    INTER_TOKEN_TIMEOUT_S,
    MAX_ATTEMPTS,
    RECOVERY_TIMEOUT_S,
)
from ..protocol.errors import TokenmqError
from ..protocol.limits import MAX_PRIORITY, NORMAL_PRIORITY
from ..protocol.payload import Sampling
from ..transport.endpoints import DEFAULT_FRONTEND, EndpointError
from .explain import decision_line
from .lifecycle import fail
from .options import option, settings, version_option
from .tables import table

_DEFAULTS = Sampling()
_EXIT_INTERRUPTED = 130
#: How often `drain --wait` looks whether the worker has left.
_LOOK_S = 0.1


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


def _broker_option(command: Any) -> Any:
    """Let --broker stand behind the command's name too, where people type it."""
    return option(
        "--broker", multiple=True, metavar="ENDPOINT", show_envvar=False, help="As before the command's name."
    )(command)


def _json_option(command: Any) -> Any:
    return option(
        "--json", "as_json", is_flag=True, envvar="TOKENMQ_CLIENT_JSON", help="Print JSON, one object a line."
    )(command)


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


@contextmanager
def _client(broker: tuple[str, ...]) -> Iterator[Client]:
    """Give a client; end the command with one line on an error, after a cancel on Ctrl-C."""
    chosen: dict[str, Any] = dict(click.get_current_context().obj)
    if broker:
        chosen["endpoints"] = list(broker)
    try:
        with Client(**chosen) as client:
            yield client
    except TokenmqError as error:
        request = f" [request {error.request_id}]" if error.request_id else ""
        fail(f"{error.message} ({error.code}){request}")
    except EndpointError as error:
        fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone (head, less): no complaint, as other tools do
        sys.exit(1)
    except OSError as error:
        fail(f"cannot read or write: {error.strerror}")
    except UnicodeError as error:
        fail(f"cannot read or write: {error}")
    except KeyboardInterrupt:
        click.echo(err=True)  # what follows stands below the terminal's ^C; the output gets no line more
        sys.exit(_EXIT_INTERRUPTED)


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
@_json_option
@_broker_option
def generate(model: str, prompt: str, as_json: bool, broker: tuple[str, ...], **values: Any) -> None:
    """Continue PROMPT with MODEL; the text appears as it is generated. PROMPT - reads standard input."""
    with _client(broker) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        _print_stream(client.generate(model, prompt=text, **_arguments(values)), as_json=as_json)


@main.command(short_help="Chat with MODEL: one MESSAGE, or a conversation.")
@click.argument("model")
@click.argument("message", required=False)
@option("--system", show_default="none", metavar="TEXT", help="A system prompt.")
@_sampling_options
@_json_option
@_broker_option
def chat(
    model: str, message: str | None, system: str | None, as_json: bool, broker: tuple[str, ...], **values: Any
) -> None:
    """Chat with MODEL: one MESSAGE, or a conversation, a line each, until end of input (Ctrl-D)."""
    history: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with _client(broker) as client:
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


@main.command()
@_json_option
@_broker_option
def models(as_json: bool, broker: tuple[str, ...]) -> None:
    """List the models that the broker's workers serve."""
    with _client(broker) as client:
        columns = ("name", "workers", "ready", "slots", "running", "waiting", "context_tokens", "chat")
        _print_rows(client.models(), columns, as_json=as_json)


@main.command()
@_json_option
@_broker_option
def workers(as_json: bool, broker: tuple[str, ...]) -> None:
    """List the broker's workers with their load."""
    with _client(broker) as client:
        columns = ("name", "state", "engine", "models", "slots", "in_flight", "waiting", "speed", "tokens_per_s")
        rows = client.workers()
        if not as_json:
            rows = [{**row, "tokens_per_s": round(row["tokens_per_s"], 1)} for row in rows]
        _print_rows(rows, columns, as_json=as_json)


@main.command()
@_json_option
@_broker_option
def status(as_json: bool, broker: tuple[str, ...]) -> None:
    """Show the broker's state and counters."""
    with _client(broker) as client:
        values = client.status()
        if as_json:
            click.echo(json.dumps(values, ensure_ascii=False))
        else:
            for name, value in values.items():
                click.echo(f"{name:<10} {_status_text(value)}")


@main.command()
@click.argument("worker")
@option(
    "--grace", type=click.FloatRange(min=0), show_default="the worker's own", metavar="S",
    help="Seconds that its running requests get; what is left then goes on at other workers.",
)  # fmt: skip
@option(
    "--wait", type=click.FloatRange(min=0), default=0.0, metavar="S",
    help="Wait so many seconds at most until it has left; exit with 1 if it has not.",
)  # fmt: skip
@_broker_option
def drain(worker: str, grace: float | None, wait: float, broker: tuple[str, ...]) -> None:
    """Have WORKER (a name that `workers` lists) finish what it holds and exit.

    No request fails by it while others serve its model.
    """
    with _client(broker) as client:
        before = _worker_row(client, worker)
        held = client.drain(worker, grace_s=grace)["in_flight"]
        click.echo(f"{worker} drains; requests in flight: {held}")
        until = time.monotonic() + wait
        while wait:
            row = _worker_row(client, worker)
            if row is None or before is None or row["incarnation"] != before["incarnation"]:
                click.echo(f"{worker} has left")
                return
            if row["in_flight"] != held:
                held = row["in_flight"]
                click.echo(f"{worker}: requests in flight: {held}", err=True)
            if time.monotonic() > until:
                fail(f"{worker} has not left within {wait:g} s; requests in flight: {held}")
            time.sleep(_LOOK_S)


def _worker_row(client: Client, name: str) -> dict[str, Any] | None:
    return next((row for row in client.workers() if row["name"] == name), None)


def _status_text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{inner}={number}" for inner, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            click.echo(json.dumps(row, ensure_ascii=False))
    else:
        click.echo(table(rows, columns))


if __name__ == "__main__":
    main()
