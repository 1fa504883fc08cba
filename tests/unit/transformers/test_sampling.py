"""Sampling: against exact distributions, and against transformers' own warpers; both pickers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmq.protocol.payload import Sampling
from tokenmq.worker.engines.transformers import pick_device, pick_host
from tokenmq.worker.engines.transformers.sampling import NOT_A_NUMBER, NOTHING_LEFT, Draw, choose, logprobs_of

from .distributions import Pick, assert_drawn_from, warped

both_pickers = pytest.mark.parametrize("pick", [pick_host.pick, pick_device.pick], ids=["host", "device"])


def draw(position: int = 0, **wishes: Any) -> Draw:
    return Draw(Sampling(**wishes), position)


def chosen(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    return [choice.token_id for choice in choose(logits, draws).fetch()]


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


WISHES = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 1.2, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 8, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 12, "min_p": 0.2},
    {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.06},
]


@both_pickers
@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_the_draws_have_the_exact_distribution(wishes: dict[str, float], pick: Pick) -> None:
    count = 20_000
    logits = randn(1, 30, seed=3, scale=2)
    tokens = pick(logits.expand(count, -1), [draw(position, seed=11, **wishes) for position in range(count)])
    assert_drawn_from(tokens.tolist(), warped(logits, Sampling(**wishes))[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("wishes", [{}, {"top_p": 0.9}, {"top_k": 1500, "temperature": 1.2}], ids=str)
def test_the_draws_from_a_shortlist_have_the_exact_distribution(wishes: dict[str, float]) -> None:
    count, vocabulary = 6_000, 2_500
    assert vocabulary * 0.5 > pick_host.SHORTLIST_FROM, "there must be a shortlist"
    logits = randn(1, vocabulary, seed=8, scale=0.5)
    logits[0, :12] += 4  # some that are drawn often
    draws = [draw(position, seed=5, **{"temperature": 1.0, **wishes}) for position in range(count)]
    tokens = pick_host.pick(logits.expand(count, -1), draws)
    wanted = Sampling(**{"temperature": 1.0, **wishes})  # type: ignore[arg-type]
    assert_drawn_from(tokens.tolist(), warped(logits, wanted)[0])


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 64, 65, 200, 1499, 1500, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.1, 0.9]),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
    steps=st.sampled_from([0, 8]),
    masked=st.booleans(),
)
def test_both_pickers_keep_what_the_warpers_keep_and_pick_the_same(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, scale: float, steps: int, masked: bool
) -> None:
    wishes = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = randn(1, 1500, seed=seed, scale=scale)
    if steps:
        logits = (logits * steps).round() / steps  # with many equals
    if masked:
        logits[0, 10:] = logits[0, 10:].masked_fill(randn(1490, seed=seed + 1) > -1, -torch.inf)
    draws = [Draw(wishes, position) for position in range(40)]
    rows = logits.expand(40, -1)
    picked = pick_host.pick(rows, draws).tolist()
    assert picked == pick_device.pick(rows, draws).tolist()

    theirs = warped(logits, wishes)[0]
    for token in set(picked):
        # They keep all equals of the last of the k, and those with the highest ids at the border of p; here it is the
        # lowest. So what is picked must be kept, or as likely as a token that is.
        value = logits[0, token]
        kept = logits[0, theirs > 0]
        # The cut may differ by the token at it, where the mass is p within rounding.
        assert value >= kept.min() or float((logits[0] == value).sum()) > 1 or _is_next(logits[0], kept, value)


def _is_next(logits: torch.Tensor, kept: torch.Tensor, value: torch.Tensor) -> bool:
    return not ((logits > value) & (logits < kept.min())).any()


@both_pickers
@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_every_token_that_is_kept_can_come(wishes: dict[str, float], pick: Pick) -> None:
    logits = randn(1, 30, seed=4, scale=0.3)
    theirs = warped(logits, Sampling(**wishes))[0]  # type: ignore[arg-type]
    tokens = pick(logits.expand(4000, -1), [draw(i, seed=i, **wishes) for i in range(4000)])
    assert set(tokens.tolist()) == set(theirs.nonzero()[:, 0].tolist())


def test_where_the_shortlist_lacks_the_winner_all_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(24, 3000, seed=1, scale=0.3)
    draws = [draw(i, seed=i, temperature=1.0, top_p=(1.0, 0.95)[i % 2]) for i in range(24)]
    usual = chosen(logits, draws)
    assert len(set(usual)) > 12
    monkeypatch.setattr(pick_host, "SHORTLIST_DEPTH", -2.0)  # now it is nearly always empty, or too short
    assert chosen(logits, draws) == usual
    monkeypatch.setattr(pick_host, "SHORTLIST_FROM", 10**9)  # no shortlist at all
    assert chosen(logits, draws) == usual


def test_a_top_k_beyond_the_vocabulary_cuts_nothing() -> None:
    logits = randn(8, 500, seed=6)
    free = chosen(logits, [draw(i, seed=2**63 - 1) for i in range(8)])
    assert len(set(free)) > 4
    for top_k in (500, 2**31 - 1):
        assert not draw(top_k=top_k).restricted(500)
        assert chosen(logits, [draw(i, seed=2**63 - 1, top_k=top_k) for i in range(8)]) == free


@both_pickers
def test_ties_go_to_the_lowest_id(pick: Pick) -> None:
    logits = torch.zeros(1, 2000)
    logits[0, [700, 300, 1500, 900]] = 4.0
    assert pick(logits, [draw(temperature=0.0)]).tolist() == [300]
    assert {int(pick(logits, [draw(i, temperature=1.0, top_k=2)])) for i in range(60)} == {300, 700}
    assert {int(pick(logits, [draw(i, temperature=0.1, top_p=0.49)])) for i in range(60)} == {300, 700}
    # All equal, so that the cut lies among equals.
    assert {int(pick(torch.zeros(1, 2000), [draw(i, temperature=1.0, top_k=3)])) for i in range(60)} == {0, 1, 2}


KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 40},
    {"temperature": 1.1, "min_p": 0.02},
    {"temperature": 1.0, "logprobs": 3},
]


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(7)), size=st.integers(1, 7))
def test_a_row_does_not_depend_on_its_company(order: list[int], size: int) -> None:
    logits = randn(7, 1600, seed=5, scale=2)
    draws = [draw(row, seed=99, **KINDS[row % len(KINDS)]) for row in range(7)]
    alone = [choose(logits[row : row + 1], [draws[row]]).fetch()[0].token_id for row in range(7)]
    some = order[:size]
    assert chosen(logits[some], [draws[row] for row in some]) == [alone[row] for row in some]


def test_seed_and_position_change_the_draw() -> None:
    logits = torch.zeros(1, 1000)
    by_seed = {chosen(logits, [draw(0, seed=seed)])[0] for seed in range(50)}
    by_position = {chosen(logits, [draw(position, seed=1)])[0] for position in range(50)}
    assert len(by_seed) > 40
    assert len(by_position) > 40


@both_pickers
def test_a_tiny_temperature_is_greedy_and_finite(pick: Pick) -> None:
    logits = torch.tensor([[1.0, 50.0, 49.9]])
    for temperature in (1e-30, 1e-300):
        assert pick(logits, [draw(temperature=temperature)]).tolist() == [1]
        assert pick(logits, [draw(temperature=temperature, top_p=0.5)]).tolist() == [1]


@both_pickers
@pytest.mark.parametrize("wishes", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_a_row_that_gives_no_token_is_told_and_leaves_the_others(wishes: dict[str, float], pick: Pick) -> None:
    logits = randn(5, 100, seed=2)
    draws = [draw(row, **wishes) for row in range(5)]
    sane = pick(logits, draws).tolist()
    logits[1, 40] = float("nan")
    logits[2] = -torch.inf
    logits[3, 7] = torch.inf
    assert pick(logits, draws).tolist() == [sane[0], NOT_A_NUMBER, NOTHING_LEFT, NOT_A_NUMBER, sane[4]]


def test_a_problem_is_said_in_words() -> None:
    logits = randn(3, 50, seed=1)
    logits[0, 3] = float("nan")
    logits[1] = -torch.inf
    broken, empty, sane = choose(logits, [draw(logprobs=2)] * 3).fetch()
    assert "not numbers" in str(broken.problem)
    assert "exclude" in str(empty.problem)
    assert (broken.logprobs, empty.logprobs, sane.problem) == (None, None, None)
    assert sane.logprobs is not None


def test_logits_in_half_precision_stay_as_they_are() -> None:
    logits = randn(3, 200, seed=1, scale=3).bfloat16()
    before = logits.clone()
    draws = [draw(i, seed=3) for i in range(3)]
    assert chosen(logits, draws) == chosen(logits.float(), draws)
    assert torch.equal(logits, before)


def test_logprobs_are_those_of_the_model_alone() -> None:
    logits = randn(4, 300, seed=9, scale=3)
    logits[2, [5, 17]] = 30.0  # equals at the top
    exact = logits.double().log_softmax(-1)
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 4},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 0.5, "logprobs": 2},
        {"temperature": 1.5, "top_p": 0.9, "logprobs": 0},
    ]
    choices = choose(logits, [draw(i, seed=1, **wish) for i, wish in enumerate(wishes)]).fetch()
    assert choices[1].logprobs is None
    for row in (0, 2, 3):
        raw = choices[row].logprobs
        assert raw is not None
        assert raw.logprob == pytest.approx(float(exact[row, choices[row].token_id]), abs=1e-5)
        k = wishes[row]["logprobs"]
        best = exact[row].topk(k)
        assert [logprob for _, logprob in raw.top] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [float(exact[row, token]) for token, _ in raw.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    third = choices[2].logprobs
    assert third is not None
    assert [token for token, _ in third.top] == [5, 17]


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    (choice,) = choose(randn(1, 5, seed=1), [draw(logprobs=20)]).fetch()
    assert choice.logprobs is not None
    assert {token for token, _ in choice.logprobs.top} == set(range(5))


@pytest.mark.parametrize("count", [0, 1, 300])
def test_logprobs_of_a_prompt(count: int) -> None:
    logits = randn(count, 40, seed=3, scale=2)
    following = [(7 * i) % 40 for i in range(count)]
    exact = logits.double().log_softmax(-1)
    raws = logprobs_of(logits, following, 2)
    assert len(raws) == count
    for row, raw in enumerate(raws):
        assert raw.logprob == pytest.approx(float(exact[row, following[row]]), abs=1e-5)
        assert [token for token, _ in raw.top] == exact[row].topk(2).indices.tolist()
