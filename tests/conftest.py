"""Options of the test suite."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sim-seed", type=int, default=None, help="run this one simulated schedule")
    parser.addoption("--sim-runs", type=int, default=500, help="how many simulated schedules to run")
