"""An option of `zmq-worker` that the engine would ignore is refused, and no other."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from tokenmq.cli.engine_options import ENGINES_OF, refuse_foreign
from tokenmq.cli.worker import main

NAMES = {parameter.name: parameter for parameter in main.params}


@pytest.mark.parametrize(
    ("engine", "options", "says"),
    [
        (
            "synthetic",
            ["--cache-tokens", "5"],
            "--cache-tokens: it is for the engine transformers, not for synthetic",
        ),
        ("synthetic", ["--no-compile"], "--compile: it is for the engine transformers, not for synthetic"),
        (
            "openai",
            ["--dtype", "float32"],
            "--dtype: it is for the engines transformers, embeddings and vllm, not",
        ),
        ("a.b:C", ["--base-url", "http://h/v1"], "--base-url: it is for the engine openai, not for a.b:C"),
    ],
)
def test_what_another_engine_takes_is_refused(engine: str, options: list[str], says: str) -> None:
    context = main.make_context("zmq-worker", ["--model", "m", *options])
    with context, pytest.raises(ValueError, match="not for") as caught:
        refuse_foreign(context, engine)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ENGINES_OF)
def test_each_is_an_option_and_goes_with_its_engines(name: str) -> None:
    parameter = NAMES[name]
    assert isinstance(parameter, click.Option)
    value = [] if parameter.is_flag else ["replay" if name == "resume" else "auto" if name == "dialect" else "3"]
    context = main.make_context("zmq-worker", ["--model", "m", parameter.opts[0], *value])
    with context:
        for engine in ENGINES_OF[name]:
            refuse_foreign(context, engine)


def test_the_environment_may_mean_other_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMQ_WORKER_CACHE_TOKENS", "64")
    context = main.make_context("zmq-worker", ["--model", "m"])
    assert context.params["cache_tokens"] == 64
    with context:
        refuse_foreign(context, "synthetic")


def test_the_command_says_it_in_one_line() -> None:
    result = CliRunner().invoke(main, ["--engine", "synthetic", "--model", "m", "--prefill-tokens", "8"])
    assert result.exit_code == 2
    assert result.stderr == "error: --prefill-tokens: it is for the engine transformers, not for synthetic\n"
