"""Fixtures: the modules of benchmarks/, which is no package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
_OURS = {path.stem for path in BENCHMARKS.glob("*.py")}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import modules of benchmarks/ by name, and forget them again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    for name in _OURS & sys.modules.keys():
        del sys.modules[name]
