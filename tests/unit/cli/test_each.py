"""`zmq-client ... --each`: every broker is asked once, and one that fails keeps nobody from the next."""

from __future__ import annotations

import json
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tokenmq.cli.asking import EXIT_INTERRUPTED
from tokenmq.cli.each import each_broker

GIVEN = ["tcp://a:1", "tcp://b:1", "tcp://c:1"]


def run(*line: str, exits: dict[str, int] | None = None) -> tuple[list[str], Any]:
    """Run a command with these options; return the brokers that it asked, and click's result."""
    asked: list[str] = []

    @click.group()
    @click.pass_context
    def group(context: click.Context) -> None:
        context.obj = {"endpoints": GIVEN}

    @group.command()
    @click.option("--broker", multiple=True)
    @click.option("--json", "as_json", is_flag=True)
    def ask(broker: tuple[str, ...], as_json: bool) -> None:
        asked.append(",".join(broker or GIVEN))
        click.echo(f"answer {as_json}")
        if exits and asked[-1] in exits:
            raise SystemExit(exits[asked[-1]])

    each_broker(ask)
    return asked, CliRunner().invoke(group, ["ask", *line])


def test_without_it_the_client_chooses() -> None:
    asked, result = run()
    assert (asked, result.output, result.exit_code) == ([",".join(GIVEN)], "answer False\n", 0)


def test_each_is_asked_and_named() -> None:
    asked, result = run("--each")
    assert asked == GIVEN
    assert result.output == "".join(f"{endpoint}:\nanswer False\n" for endpoint in GIVEN)
    assert result.exit_code == 0


def test_those_behind_the_commands_name_count() -> None:
    assert run("--each", "--broker", "tcp://x:1", "--broker", "tcp://y:1")[0] == ["tcp://x:1", "tcp://y:1"]


def test_json_tells_whose_the_lines_are_in_json() -> None:
    told = [line for line in run("--each", "--json")[1].output.splitlines() if line != "answer True"]
    assert [json.loads(line) for line in told] == [{"endpoint": f"tcp://{name}:1"} for name in "abc"]


@pytest.mark.parametrize("at", GIVEN)
def test_one_that_fails_keeps_nobody_from_the_next_and_is_told_by_the_exit_code(at: str) -> None:
    asked, result = run("--each", exits={at: 1})
    assert (asked, result.exit_code) == (GIVEN, 1)


def test_an_interrupt_ends_it_all() -> None:
    asked, result = run("--each", exits={GIVEN[1]: EXIT_INTERRUPTED})
    assert (asked, result.exit_code) == (GIVEN[:2], EXIT_INTERRUPTED)
