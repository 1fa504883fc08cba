"""SPEC.md says what the code does: its examples, tables of commands, codes, fields and limits are checked."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tokenmq.protocol import limits
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.errors import ErrorCode
from tokenmq.protocol.messages import Command, Decision, DisconnectCode, FinishReason, Load, ModelInfo, WorkerState
from tokenmq.protocol.payload import Generation, Prior, Sampling

ROOT = Path(__file__).parents[3]
SPEC = (ROOT / "protocol" / "SPEC.md").read_text(encoding="utf-8")
EXAMPLES: dict[str, str] = dict(re.findall(r"^```hex (.+)\n((?:.*\n)*?)```$", SPEC, re.MULTILINE))


def frames(block: str) -> list[bytes]:
    first, *parts = block.split("|")
    assert not first.strip()
    return [bytes.fromhex("".join(part.split())) for part in parts]


def section(title: str) -> str:
    found = re.search(rf"^(#+) [\d.]+ {re.escape(title)}\n(.*?)(?=^#{{2,3}} |\Z)", SPEC, re.MULTILINE | re.DOTALL)
    assert found is not None, f"SPEC.md has no section {title}"
    return found[2]


def first_column(text: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def golden(command: Command) -> dict[str, Any]:
    entries = json.loads((ROOT / "tests" / "vectors" / f"{command.name.lower()}.json").read_text(encoding="utf-8"))
    return {entry["name"]: entry["frames"] for entry in entries}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_golden_frames(name: str) -> None:
    message = decode(frames(EXAMPLES[name]))
    assert encode(message) == frames(EXAMPLES[name])
    assert [frame.hex() for frame in frames(EXAMPLES[name])] == golden(message.command)[name]


def test_every_command_has_an_example() -> None:
    assert {decode(frames(block)).command for block in EXAMPLES.values()} == set(Command)
    assert SPEC.count("```hex") == len(EXAMPLES)


def test_commands() -> None:
    rows = re.findall(r"^\| (0x\w\w) \| (\w+) \|", SPEC, re.MULTILINE)
    assert {name: int(code, 16) for code, name in rows} == {command.name: command.value for command in Command}


@pytest.mark.parametrize("command", [Command.HELLO, Command.WELCOME, Command.READY, Command.REQUEST, Command.FINISH,
                                     Command.ERROR, Command.CREDIT, Command.CANCEL, Command.QUERY, Command.REPLY,
                                     Command.HEARTBEAT, Command.DISCONNECT, Command.STARTED,
                                     Command.DRAIN])  # fmt: skip
def test_fields(command: Command) -> None:
    message = next(found for block in EXAMPLES.values() if (found := decode(frames(block))).command is command)
    record: Any = getattr(message, "envelope", message)
    names = {item.name for item in dataclasses.fields(record)} - {"id"}
    text = section(command.name)
    if command is Command.READY:
        names |= {item.name for kind in (ModelInfo, Load) for item in dataclasses.fields(kind)}
    if command is Command.FINISH:
        names |= {item.name for item in dataclasses.fields(Decision)}
    if command is Command.DISCONNECT:
        names |= {code.value for code in DisconnectCode}
    assert first_column(text) == names


def test_enumerations() -> None:
    assert all(f"`{state.value}`" in section("READY") for state in WorkerState)
    assert all(f"`{reason.value}`" in section("FINISH") for reason in FinishReason)
    assert first_column(section("Errors")) == {code.value for code in ErrorCode}


def test_payload() -> None:
    names = {item.name for kind in (Generation, Prior, Sampling) for item in dataclasses.fields(kind)}
    assert first_column(section("Payload")) == names
    defaults = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (\S+) \|", section("Payload"), re.MULTILINE))
    words = {"empty": (), "false": False, "none": None}
    for item in dataclasses.fields(Sampling):
        text = defaults[item.name]
        assert words.get(text, text) == item.default or float(text) == item.default


def test_limits() -> None:
    rows = re.findall(r"^\| (MAX_\w+) \| (\d+) \|", SPEC, re.MULTILINE)
    stated = {name: int(value) for name, value in rows}
    # Those that are part of a type are stated with the types.
    with_types = {"MAX_COUNT", "MAX_SECONDS", "MAX_INTEGER"}
    names = {name for name in vars(limits) if name.startswith("MAX_")} - with_types
    assert stated == {name: getattr(limits, name) for name in names}


def test_speeds() -> None:
    stated = re.findall(r"`speed`(?: \||:) number from (\S+) to (\d\S*?)(?:,|\)| )", SPEC)
    bounds = (limits.SLOWEST_TOKENS_PER_S, limits.FASTEST_TOKENS_PER_S)
    assert [tuple(map(float, each)) for each in stated] == [bounds, bounds]  # in READY and in set_speed
