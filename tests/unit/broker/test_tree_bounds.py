"""What brokers below say is a message each; the answer that is made of it must be one, too."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.broker.core import BrokerCore
from tokenmq.broker.errands import Errand
from tokenmq.broker.events import FromWorker
from tokenmq.broker.settings import BrokerSettings
from tokenmq.broker.tree import workers_below
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.limits import MAX_CONTAINERS
from tokenmq.protocol.messages import Load, Ready, Reply


def core_with(*children: str) -> BrokerCore:
    core = BrokerCore(BrokerSettings(), software="test", now=0.0)
    for child in children:
        ready = Ready(child, 1, "test", (), 1, "broker", Load(), brokers=(child,))
        core.handle(FromWorker(child.encode(), ready), 0.0)
    return core


def answer_of(core: BrokerCore, answers: dict[str, Reply]) -> list[dict[str, Any]]:
    errand = workers_below(core, 0.0, 1.0)
    assert isinstance(errand, Errand)
    found: list[dict[str, Any]] = errand.finish(answers)
    return found


@pytest.mark.parametrize("inner", [{}, [[[]]]])
def test_rows_without_end_are_left_out(inner: Any) -> None:
    row = {"name": "", "depth": 0, "x": inner}
    each = 4 if inner else 2
    rows = [row] * (6 * MAX_CONTAINERS // 10 // each)
    found = answer_of(core_with("a", "b"), {name: Reply(bytes(16), rows) for name in "ab"})
    assert [each["answered"] for each in found if "answered" in each] == [True, False]
    reply = Reply(bytes(16), found)
    assert decode(encode(reply)) == reply


def test_what_fits_is_told() -> None:
    rows = [{"name": "w", "depth": 0}] * 1000
    found = answer_of(core_with("a", "b"), {name: Reply(bytes(16), rows) for name in "ab"})
    assert [each["answered"] for each in found if each["depth"] == 0] == [True, True]
    assert len(found) == 2002
    assert {each["name"] for each in found} == {"a", "b", "a/w", "b/w"}
