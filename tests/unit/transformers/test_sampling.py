"""Sampling: against exact distributions, and against transformers' own warpers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tokenmq.protocol.payload import Sampling
from tokenmq.worker.engines.transformers import sampling as module
from tokenmq.worker.engines.transformers.sampling import NOT_A_NUMBER, Draw, choose, nucleus


def draw(position: int = 0, **wishes: float) -> Draw:
    return Draw(Sampling(**wishes), position)  # type: ignore[arg-type]


def warped(logits: torch.Tensor, wishes: Sampling) -> torch.Tensor:
    """Return the probabilities that transformers' warpers leave, [rows, vocabulary]."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(wishes.temperature)(ids, logits.double())
    if wishes.top_k:
        scores = TopKLogitsWarper(min(wishes.top_k, logits.shape[1]))(ids, scores)
    if wishes.top_p < 1:
        scores = TopPLogitsWarper(wishes.top_p)(ids, scores)
    return scores.softmax(-1)


WISHES = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.01},
]


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_the_draws_have_the_exact_distribution(wishes: dict[str, float]) -> None:
    count = 20_000
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(3)) * 2
    expected = warped(logits, Sampling(**wishes))[0] * count  # type: ignore[arg-type]
    tokens = choose(logits.expand(count, -1), [draw(position, seed=11, **wishes) for position in range(count)])
    observed = torch.bincount(torch.tensor(tokens), minlength=30).double()
    assert not observed[expected == 0].any(), "a token was drawn that is cut off"
    usual = expected >= 5  # chi-square needs some in each class; the rare ones make one class
    classes = torch.cat([expected[usual], expected[~usual].sum()[None]])
    seen = torch.cat([observed[usual], observed[~usual].sum()[None]])
    present = classes > 0
    chi = float(((seen - classes)[present] ** 2 / classes[present]).sum())
    freedom = int(present.sum()) - 1
    # Mean + 4 standard deviations of chi-square; the seed is fixed, so that this passes always or never.
    assert chi <= freedom + 4 * (2 * max(freedom, 1)) ** 0.5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 64, 65, 200, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
)
def test_it_keeps_what_the_warpers_keep(
    seed: int, temperature: float, top_k: int, top_p: float, scale: float
) -> None:
    wishes = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.randn(1, 1500, generator=torch.Generator().manual_seed(seed)) * scale
    theirs = warped(logits, wishes)[0]
    tempered = (logits - logits.max()) / temperature
    for width in (64, 1024, 1500):
        ids, kept, settled = nucleus(tempered, [Draw(wishes, 0)], width)
        if settled.item():
            break
    ours = torch.zeros(1500, dtype=torch.float64)
    ours[ids[0][kept[0]]] = tempered[0].double()[ids[0][kept[0]]].exp()
    ours /= ours.sum()
    differing = (ours > 0) != (theirs > 0)
    # The cut may differ by the token at it, where the mass is p within rounding.
    assert int(differing.sum()) <= 1
    assert float(theirs[differing].sum() + ours[differing].sum()) < 0.05
    if not differing.any():
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_widening_gives_what_a_full_sort_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(12, 3000, generator=torch.Generator().manual_seed(1)) * 0.3  # flat: a nucleus of thousands
    draws = [draw(i, seed=i, temperature=1.0, top_p=0.95, top_k=(0, 900)[i % 2]) for i in range(12)]
    narrow = choose(logits, draws)
    monkeypatch.setattr(module, "FIRST_WIDTH", 3000)
    assert choose(logits, draws) == narrow
    assert len(set(narrow)) > 6


def test_a_top_k_beyond_the_vocabulary_costs_no_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(6))
    free = choose(logits, [draw(i, seed=2**63 - 1) for i in range(8)])
    assert len(set(free)) > 4
    monkeypatch.setattr(module, "nucleus", lambda *_: pytest.fail("sorted"))
    for top_k in (500, 2**31 - 1):
        assert choose(logits, [draw(i, seed=2**63 - 1, top_k=top_k) for i in range(8)]) == free


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(1, 2000)
    logits[0, [700, 300, 1500, 900]] = 4.0
    assert choose(logits, [draw(temperature=0.0)]) == [300]
    seen = {choose(logits, [draw(i, temperature=1.0, top_k=2)])[0] for i in range(60)}
    assert seen == {300, 700}
    # All equal, so the cut lies among equals whatever the width.
    seen = {choose(torch.zeros(1, 2000), [draw(i, temperature=1.0, top_k=3)])[0] for i in range(60)}
    assert seen == {0, 1, 2}


def test_a_row_does_not_depend_on_its_company() -> None:
    logits = torch.randn(6, 400, generator=torch.Generator().manual_seed(5)) * 2
    kinds = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8, "top_k": 40}]
    draws = [draw(row, seed=99, **kinds[row % 3]) for row in range(6)]
    together = choose(logits, draws)
    assert together == [choose(logits[row : row + 1], [draws[row]])[0] for row in range(6)]
    assert together[::-1] == choose(logits.flip(0), draws[::-1])


def test_seed_and_position_change_the_draw() -> None:
    logits = torch.zeros(1, 1000)
    by_seed = {choose(logits, [draw(0, seed=seed)])[0] for seed in range(50)}
    by_position = {choose(logits, [draw(position, seed=1)])[0] for position in range(50)}
    assert len(by_seed) > 40
    assert len(by_position) > 40


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[1.0, 50.0, 49.9]])
    assert choose(logits, [draw(temperature=1e-30)]) == [1]
    assert choose(logits, [draw(temperature=1e-30, top_p=0.5)]) == [1]


@pytest.mark.parametrize("wishes", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_row_of_nan_is_told_and_leaves_the_others(wishes: dict[str, float]) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(2))
    sane = choose(logits, [draw(row, **wishes) for row in range(3)])
    logits[1, 40] = float("nan")
    assert choose(logits, [draw(row, **wishes) for row in range(3)]) == [sane[0], NOT_A_NUMBER, sane[2]]
