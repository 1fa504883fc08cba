"""Where the shards of the benchmark and their ends run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def shards(load: Callable[[str], Any]) -> Any:
    return load("shards")


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (7, [1, 2, 4]), (16, [1, 2, 4, 8, 16])])
def test_as_many_shards_as_cores_can_hold(shards: Any, cores: int, counts: list[int]) -> None:
    assert shards.numbers(cores) == counts


def test_ends_have_cores_of_their_own_where_there_is_room_and_their_shards_where_not(shards: Any) -> None:
    assert shards.places(2, [3, 5, 8, 9], apart=True) == [(3, 8), (5, 9)]
    assert shards.places(2, [3, 5], apart=False) == [(3, 3), (5, 5)]


@pytest.mark.parametrize(("count", "apart"), [(2, True), (4, False)])
def test_too_few_cores_are_an_error(shards: Any, count: int, apart: bool) -> None:
    with pytest.raises(shards.BenchmarkError, match=r"shards need \d cores; here are 3"):
        shards.places(count, [0, 1, 2], apart=apart)
