"""Decisions in words."""

from __future__ import annotations

from tokenmq.cli.explain import decision_line
from tokenmq.client import Considered, Decision


def test_a_line_tells_who_chose_whom_and_among_which() -> None:
    workers = (Considered("gpu-3", 1, 8, 52.5, 0.0952), Considered("gpu-1", 6, 8, 0.0, 6.0))
    assert decision_line(Decision("west", "shortest-queue", "gpu-3", 4, workers)) == (
        "west: shortest-queue chose gpu-3, one of 4: gpu-3 (load 1 of 8, 52.5 tokens/s, cost 0.0952); "
        "gpu-1 (load 6 of 8, speed unknown, cost 6); and 2 more"
    )


def test_a_choice_among_all_that_were_looked_at_hides_none() -> None:
    line = decision_line(Decision("b", "lottery", "w", 1, (Considered("w", 0, 1, 1.0, 0.0),)))
    assert line == "b: lottery chose w, one of 1: w (load 0 of 1, 1 tokens/s, cost 0)"


def test_without_figures_it_is_still_a_sentence() -> None:
    assert decision_line(Decision("b", "lottery", "w", 3)) == "b: lottery chose w, one of 3"
