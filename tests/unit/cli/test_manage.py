"""What commands print of workers that are gone."""

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
        "remembered gpu-1, which is gone: held",
        "remembered gpu-2, which is gone: held, speed set to 40",
    ]


def test_their_speed_is_forgotten() -> None:
    assert CliRunner().invoke(manage.set_speed, ["gpu-2", "auto"]).output == "gpu-2 is gone; its speed is forgotten\n"
    assert CliRunner().invoke(manage.set_speed, ["gpu-2", "5"]).output == "gpu-2 is reckoned with 5 tokens/s\n"
