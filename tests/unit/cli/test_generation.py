"""What generate, chat and embed make of their options, and how their values must look."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tokenmq.cli import generation
from tokenmq.cli.client import main
from tokenmq.cli.values import bias, json_value
from tokenmq.client import Client

SCHEMA = '{"type": "object"}'


class FakeClient:
    """Takes what the real one takes, and says what it was called with."""

    calls: list[tuple[str, dict[str, Any]]]
    direct: tuple[str, ...]

    def __init__(self) -> None:
        self.calls = []
        self.direct = ()

    def generate(self, model: str, **arguments: Any) -> None:
        self._called(Client.generate, model, arguments)

    def chat(self, model: str, **arguments: Any) -> None:
        self._called(Client.chat, model, {**arguments, "messages": [dict(each) for each in arguments["messages"]]})

    def _called(self, method: Any, model: str, arguments: dict[str, Any]) -> None:
        inspect.signature(method).bind(self, model, **arguments)
        self.calls.append((method.__name__, arguments))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()

    @contextmanager
    def connected(_broker: Any, direct: tuple[str, ...]) -> Iterator[FakeClient]:
        fake.direct = direct
        yield fake

    monkeypatch.setattr(generation, "connected", connected)
    monkeypatch.setattr(generation, "print_stream", lambda *_, **__: "the answer")
    return fake


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


def test_without_options_all_is_as_the_library_has_it(client: FakeClient) -> None:
    assert run("generate", "m", "x").exit_code == 0
    ((_, arguments),) = client.calls
    defaults = {name: each.default for name, each in inspect.signature(Client.generate).parameters.items()}
    odd = {name: value for name, value in arguments.items() if value != defaults[name] and value != ()}
    assert odd == {"prompt": "x", "resume": True, "logit_bias": {}}


def test_every_option_comes_to_its_argument(client: FakeClient, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.touch()
    given = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.4, "seed": 5, "logprobs": 2,
        "regex": "a+", "session": "s", "priority": 7,
    }  # fmt: skip
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--ignore-eos", "--echo", "--explain", "--json-schema", SCHEMA, "--choice", "a", "--choice", "b"]
    options += ["--stop", "x", "--bad-word", "y", "--logit-bias", "7=-5", "--logit-bias", "3=1.5"]
    options += ["--image", str(image), "--deadline", "8", "--no-resume", "--hedge-after", "2"]
    assert run("generate", "m", "-", *options, stdin="the prompt").exit_code == 0
    ((_, arguments),) = client.calls
    assert arguments == {
        **given, "prompt": "the prompt", "ignore_eos": True, "echo": True, "explain": True,
        "json_schema": {"type": "object"}, "choice": ("a", "b"), "stop": ("x",), "bad_words": ("y",),
        "logit_bias": {7: -5.0, 3: 1.5}, "images": (str(image),), "deadline_s": 8.0, "resume": False,
        "hedge_after_s": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_networks_of_workers_are_the_clients(client: FakeClient, command: str) -> None:
    assert run(command, "m", "x").exit_code == 0
    assert client.direct == ()
    assert run(command, "m", "x", "--direct", "10.0.0.0/8", "--direct", "ipc").exit_code == 0
    assert client.direct == ("10.0.0.0/8", "ipc")


def test_images_belong_to_the_first_message_of_a_conversation(client: FakeClient, tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.touch()
    run("chat", "m", "--system", "Be brief.", "--image", str(image), "--tools", "[]", stdin="What?\nAnd?\n")
    (_, first), (_, second) = client.calls
    parts = [{"type": "image", "image": str(image)}, {"type": "text", "text": "What?"}]
    assert first["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": "the answer"},
        {"role": "user", "content": "And?"},
    ]


@pytest.mark.parametrize("command", ["generate", "chat", "embed"])
def test_every_option_has_help_a_default_and_a_variable(command: str) -> None:
    with main.make_context("zmq-client", [command, "--help"]) as context:
        made = click.Context(main.commands[command], context, command)
    for parameter in made.command.params:
        if isinstance(parameter, click.Option) and parameter.name != "broker":
            assert parameter.help, parameter.name
            _, text = parameter.get_help_record(made) or ("", "")
            assert "env var: TOKENMQ_CLIENT_" in text, parameter.name
            assert parameter.is_flag or "default: " in text, parameter.name


# Values


def test_json_stands_in_the_option_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    assert (
        json_value(dict)(SCHEMA)
        == json_value(dict)(f"  {SCHEMA}")
        == json_value(dict)(str(file))
        == {"type": "object"}
    )
    assert json_value(list)("[1]") == [1]


@pytest.mark.parametrize(
    ("kind", "value", "told"),
    [
        (dict, '{"a":', "not valid JSON: Expecting value"),
        (dict, "[1]", r"expected JSON that is an object, \{\.\.\.\}"),
        (list, "{}", r"expected JSON that is a list, \[\.\.\.\]"),
        (dict, "nowhere.json", "'nowhere.json' is neither JSON nor a file that can be read: No such file"),
    ],
)
def test_what_is_no_json_is_said(kind: Any, value: str, told: str) -> None:
    with pytest.raises(click.BadParameter, match=told):
        json_value(kind)(value)
    option = "--tools" if kind is list else "--template"
    done = run("chat", "m", "x", option, value)
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output


@pytest.mark.parametrize("value", ["5", "x=1", "5=", "=1", "5=x"])
def test_a_bias_is_a_token_and_a_number(value: str) -> None:
    assert bias("5=-1.5") == (5, -1.5)
    with pytest.raises(click.BadParameter, match="expected ID=BIAS, such as 50256=-5"):
        bias(value)
