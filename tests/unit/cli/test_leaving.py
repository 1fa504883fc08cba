"""`drain --wait`: when a worker has left, and when nobody can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tokenmq.cli import leaving, manage

Rows = list[dict[str, Any]]


def worker(name: str = "A/a1", in_flight: int = 1, incarnation: int = 7) -> dict[str, Any]:
    return {"name": name, "in_flight": in_flight, "incarnation": incarnation}


def broker(name: str = "A", *, answered: bool = True) -> dict[str, Any]:
    return {**worker(name), "answered": answered}


class FakeClient:
    """Shows one list of workers after the other, the last one again and again."""

    def __init__(self, lists: list[Rows]) -> None:
        self.lists = chain(lists, repeat(lists[-1]))

    def workers(self, *, tree: bool) -> Rows:
        return next(self.lists)

    def drain(self, name: str, *, grace_s: float | None, stay: bool) -> dict[str, Any]:
        return {"worker": name, "in_flight": 1}


class FakeTime:
    """A clock that only sleeping moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "time", FakeTime())


def drains(monkeypatch: pytest.MonkeyPatch, name: str, *lists: Rows, stay: bool = False) -> Result:
    @contextmanager
    def connected(_: Any) -> Iterator[FakeClient]:
        yield FakeClient(list(lists))

    monkeypatch.setattr(manage, "connected", connected)
    return CliRunner().invoke(manage.drain, [name, "--wait", "2", *(["--stay"] if stay else [])])


LEFT = "A/a1 drains; requests in flight: 1\nA/a1 has left\n"
SILENT = "error: cannot tell whether A/a1 has left within 2 s: no answer of A\n"


@pytest.mark.parametrize(
    "lists",
    [
        pytest.param([[broker(), worker()], [broker(), worker()], [broker()]], id="it is gone"),
        pytest.param([[broker(), worker()], [broker(), worker(incarnation=8)]], id="it is another one"),
        pytest.param([[broker(), worker()], [broker(answered=False)], [], [broker()]], id="its broker was late"),
        pytest.param([[broker(answered=False)], [broker(answered=False)], [broker()]], id="late from the start"),
        pytest.param([[worker()], []], id="it is here, and has a slash"),
        pytest.param([[broker(), broker("B", answered=False), worker()], [broker(), broker("B", answered=False)]],
                     id="another broker is silent"),
    ],
)  # fmt: skip
def test_a_worker_has_left_when_all_before_it_say_so(monkeypatch: pytest.MonkeyPatch, lists: list[Rows]) -> None:
    result = drains(monkeypatch, "A/a1", *lists)
    assert (result.output, result.exit_code) == (LEFT, 0)


@pytest.mark.parametrize(
    "lists",
    [
        pytest.param([[broker(), worker()], [broker(answered=False)]], id="its broker is silent"),
        pytest.param([[broker(answered=False)]], id="it always was"),
        pytest.param([[broker(), worker()], []], id="its broker is gone"),
    ],
)
def test_a_worker_behind_a_silent_broker_may_be_there(monkeypatch: pytest.MonkeyPatch, lists: list[Rows]) -> None:
    result = drains(monkeypatch, "A/a1", *lists)
    assert (result.stderr, result.exit_code) == (SILENT, 1)
    assert "has left\n" not in result.output


def test_all_brokers_before_it_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [broker(), broker("A/B"), worker("A/B/b1")]
    result = drains(monkeypatch, "A/B/b1", there, [broker(), broker("A/B", answered=False)])
    assert "no answer of A/B\n" in result.stderr
    assert result.exit_code == 1


def test_one_that_was_not_listed_before_has_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    result = drains(monkeypatch, "a1", [], [worker("a1", in_flight=2)])
    assert "error: a1 has not left within 2 s; requests in flight: 2\n" in result.stderr
    assert result.exit_code == 1


def test_with_stay_it_is_enough_that_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [broker(), worker()], [broker(answered=False)], [broker(), worker(in_flight=0)]
    result = drains(monkeypatch, "A/a1", *lists, stay=True)
    assert result.stdout == "A/a1 gets no new requests; requests in flight: 1\nA/a1 has finished\n"
    assert (result.stderr, result.exit_code) == ("A/a1: requests in flight: 0\n", 0)
