"""zmq-client generate and chat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ..protocol.limits import MAX_COMPLETIONS, MAX_LOGPROBS, MAX_PRIORITY, NORMAL_PRIORITY
from ..protocol.payload import Sampling
from .asking import broker_option, connected, json_option
from .options import option
from .printing import print_stream
from .values import bias, json_value

_DEFAULTS = Sampling()

#: The options that are arguments of generate and chat under the same name.
_SAMPLING: list[Callable[[Any], Any]] = [
    option("--max-tokens", type=int, default=_DEFAULTS.max_tokens, metavar="N", help="Most new tokens."),
    option(
        "--min-tokens", type=int, default=_DEFAULTS.min_tokens, metavar="N",
        help="Nothing but --max-tokens ends the text before it has so many.",
    ),
    option(
        "--temperature", type=float, default=_DEFAULTS.temperature, metavar="X",
        help="0 takes the likeliest token, higher values vary more.",
    ),
    option("--top-k", type=int, default=_DEFAULTS.top_k, metavar="N", help="Only the N likeliest; 0: all."),
    option(
        "--top-p", type=float, default=_DEFAULTS.top_p, metavar="P",
        help="Only the likeliest that together have this probability.",
    ),
    option(
        "--min-p", type=float, default=_DEFAULTS.min_p, metavar="P",
        help="Only those with at least this part of the likeliest one's probability.",
    ),
    option(
        "--repetition-penalty", type=float, default=_DEFAULTS.repetition_penalty, metavar="X",
        help="Above 1: what prompt or text have is less likely to come again.",
    ),
    option(
        "--presence-penalty", type=float, default=_DEFAULTS.presence_penalty, metavar="X",
        help="Taken off the logits of tokens that the text has.",
    ),
    option(
        "--frequency-penalty", type=float, default=_DEFAULTS.frequency_penalty, metavar="X",
        help="The same, times how often it has them.",
    ),
    option("--seed", type=int, show_default="a new one", metavar="N", help="Repeat a stream."),
    option("--ignore-eos", is_flag=True, help="Go on to --max-tokens."),
    option(
        "--logprobs", type=int, show_default="none", metavar="N",
        help=f"Tell the logprob of each token, and of the N likeliest, 0 to {MAX_LOGPROBS}. --json has them in full.",
    ),
    option(
        "--json-schema", type=json_value(dict), show_default="none", metavar="FILE_OR_JSON",
        help="The text is JSON that this schema allows.",
    ),
    option("--regex", show_default="none", metavar="REGEX", help="The whole text matches it."),
    option(
        "--choice", multiple=True, show_default="none", metavar="TEXT",
        help="The text is one of these. Repeatable.",
    ),
    option("--stop", multiple=True, show_default="none", metavar="TEXT", help="End before this text. Repeatable."),
    option("--echo", is_flag=True, help="Begin with the prompt's text."),
    option(
        "--session", show_default="the beginning of the prompt", metavar="NAME",
        help="Have one worker serve all requests of this name, where the broker's policy goes by it.",
    ),
    option("--explain", is_flag=True, help="Say at the end, on standard error, why the worker was chosen."),
]  # fmt: skip
_SAME_NAMES = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "ignore_eos", "logprobs", "json_schema", "regex", "choice", "stop", "echo",
    "session", "explain",
)  # fmt: skip

_RENAMED: list[Callable[[Any], Any]] = [
    option(
        "--logit-bias", type=bias, multiple=True, show_default="none", metavar="ID=BIAS",
        help="Add this to a token's logit. Repeatable.",
    ),
    option("--bad-word", multiple=True, show_default="none", metavar="TEXT", help="It must not come. Repeatable."),
    option(
        "--image", type=click.Path(exists=True, dir_okay=False), multiple=True, show_default="none", metavar="FILE",
        help="A PNG, JPEG or WebP file; several in the order of their marks. Repeatable.",
    ),
]  # fmt: skip

#: Options of every kind of request.
_REQUEST: list[Callable[[Any], Any]] = [
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
        "--hedge-after", type=click.FloatRange(min=0, min_open=True), show_default="never", metavar="S",
        help="Seconds without an answer until a second worker is asked, too; the first to answer goes on.",
    ),
    option(
        "--direct", multiple=True, show_default="none", metavar="NETWORK", envvar="TOKENMQ_CLIENT_DIRECT",
        help="Take the answer past the broker from workers that offer it in this network: 10.0.0.0/8, an address, a "
        "host's name, or ipc. Others are not dialled. Repeatable. See docs/direct.md.",
    ),
]  # fmt: skip


def request_options(command: Any) -> Any:
    """Add the options of every kind of request; `request_arguments` takes their values."""
    return _with(command, _REQUEST)


def request_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Return what the client's methods are called with."""
    return {
        "deadline_s": values["deadline"],
        "resume": not values["no_resume"],
        "priority": values["priority"],
        "hedge_after_s": values["hedge_after"],
    }


def _generation_options(command: Any) -> Any:
    return _with(request_options(command), [*_SAMPLING, *_RENAMED])


def _with(command: Any, options: Sequence[Callable[[Any], Any]]) -> Any:
    for decorate in reversed(options):
        command = decorate(command)
    return command


def _arguments(values: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: values[name] for name in _SAME_NAMES},
        **request_arguments(values),
        "logit_bias": dict(values["logit_bias"]),
        "bad_words": values["bad_word"],
    }


@click.command()
@click.argument("model")
@click.argument("prompt")
@option("--n", type=click.IntRange(1, MAX_COMPLETIONS), default=1, metavar="N", help="How many completions.")
@_generation_options
@json_option
@broker_option
def generate(model: str, prompt: str, n: int, as_json: bool, broker: tuple[str, ...], **values: Any) -> None:
    """Continue PROMPT with MODEL; the text appears as it is generated. PROMPT - reads standard input."""
    with connected(broker, values["direct"]) as client:
        text = sys.stdin.read() if prompt == "-" else prompt
        arguments = {"prompt": text, "images": values["image"], **_arguments(values)}
        if n == 1:
            print_stream(client.generate(model, **arguments), as_json=as_json)
            return
        for index, stream in enumerate(client.generate_n(n, model, **arguments)):
            if not as_json:
                click.echo(f"--- {index + 1} of {n}")
            print_stream(stream, as_json=as_json, index=index)


@click.command(short_help="Chat with MODEL: one MESSAGE, or a conversation.")
@click.argument("model")
@click.argument("message", required=False)
@option("--system", show_default="none", metavar="TEXT", help="A system prompt.")
@option(
    "--tools", type=json_value(list), show_default="none", metavar="FILE_OR_JSON",
    help="A JSON list of what the model may call.",
)  # fmt: skip
@option(
    "--template", type=json_value(dict), show_default="none", metavar="FILE_OR_JSON",
    help="Further arguments of the model's chat template, as a JSON object.",
)  # fmt: skip
@_generation_options
@json_option
@broker_option
def chat(
    model: str,
    message: str | None,
    system: str | None,
    tools: list[Any] | None,
    template: dict[str, Any] | None,
    as_json: bool,
    broker: tuple[str, ...],
    **values: Any,
) -> None:
    """Chat with MODEL: one MESSAGE, or a conversation, a line each, until end of input (Ctrl-D).

    Images belong to the first message.
    """
    history: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    images = [{"type": "image", "image": file} for file in values["image"]]
    arguments = {**_arguments(values), "tools": tools or (), "template": template}
    with connected(broker, values["direct"]) as client:
        for line in [message] if message is not None else _lines():
            content = [*images, {"type": "text", "text": line}] if images else line
            history.append({"role": "user", "content": content})
            answer = print_stream(client.chat(model, messages=history, **arguments), as_json=as_json)
            history.append({"role": "assistant", "content": answer})
            images = []


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
