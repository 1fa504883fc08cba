"""What commands print of models, of engines, and of workers that are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from tokenmq.cli import manage


class FakeClient:
    def status(self, *, tree: bool) -> dict[str, Any]:
        remembered = [
            {"worker": "gpu-1", "held": True, "speed_set": None},
            {"worker": "gpu-2", "held": True, "speed_set": 40.0},
        ]
        return {"broker": "b", "remembered": remembered, "waiting": []}

    def models(self, *, order: str | None) -> list[dict[str, Any]]:
        can = {"generates": True, "chat": False, "images": True, "embeds": False}
        cannot = dict.fromkeys(can, False)
        return [{"name": "a", "context_tokens": 9, **can}, {"name": "b", "context_tokens": 9, **cannot}]

    def workers(self, *, tree: bool) -> list[dict[str, Any]]:
        row = {
            "name": "gpu-1", "running": 3, "tokens_per_s": 80.04, "steps_per_s": 25.06, "prefill_use": 0.123,
            "decode_use": 0.8, "prefix_hits": 1.0, "kv_use": 0.0, "memory_used_bytes": 3 * 2**30,
            "memory_bytes": 2**34,
        }  # fmt: skip
        return [row, {**row, "name": "gpu-2", "depth": 1, "memory_bytes": 0}]

    def set_speed(self, worker: str, speed: float | None) -> dict[str, Any]:
        return {"worker": worker, "speed": speed, "speed_set": speed}


@pytest.fixture(autouse=True)
def connect(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected(_: Any) -> Iterator[FakeClient]:
        yield FakeClient()

    monkeypatch.setattr(manage, "connected", connected)


def test_status_tells_what_still_holds_for_them() -> None:
    lines = CliRunner().invoke(manage.status, []).output.splitlines()
    assert lines[1:] == [
        "remembered  gpu-1, which is gone: held",
        "remembered  gpu-2, which is gone: held, speed set to 40",
    ]


def test_their_speed_is_forgotten() -> None:
    assert CliRunner().invoke(manage.set_speed, ["gpu-2", "auto"]).output == "gpu-2 is gone; its speed is forgotten\n"
    assert CliRunner().invoke(manage.set_speed, ["gpu-2", "5"]).output == "gpu-2 is reckoned with 5 tokens/s\n"


def test_models_tell_what_they_can() -> None:
    lines = CliRunner().invoke(manage.models, []).output.splitlines()
    assert [line.split()[-1] for line in lines] == ["CAN", "generate,image", "-"]


def test_engines_tell_parts_in_percent_and_memory_where_it_is_known() -> None:
    lines = CliRunner().invoke(manage.workers, ["--engine"]).output.splitlines()
    assert lines[1].split() == ["gpu-1", "3", "80", "25.1", "12%", "80%", "100%", "0%", "3.0", "of", "16.0", "GiB"]
    assert lines[2].startswith("  gpu-2 ")
    assert lines[2].split()[-1] == "-"
