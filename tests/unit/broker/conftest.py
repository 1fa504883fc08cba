"""Stages whose cores are validated in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .stage import Stage


@pytest.fixture
def stages() -> Iterator[Callable[..., Stage]]:
    """Make stages with settings of their own."""
    made: list[Stage] = []

    def make(**settings: object) -> Stage:
        made.append(Stage(**settings))
        return made[-1]

    yield make
    for stage in made:
        stage.core.validate()


@pytest.fixture
def stage(stages: Callable[..., Stage]) -> Stage:
    return stages()
