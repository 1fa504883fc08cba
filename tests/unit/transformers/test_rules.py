"""Penalties, biases, bad words, min_tokens: against transformers' own processors, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.payload import Sampling
from tokenmq.worker.engines.transformers import pick_device, pick_host
from tokenmq.worker.engines.transformers.badwords import BadWords
from tokenmq.worker.engines.transformers.history import History
from tokenmq.worker.engines.transformers.processing import process
from tokenmq.worker.engines.transformers.rules import RuleBook, Rules
from tokenmq.worker.engines.transformers.sampling import NOTHING_LEFT, Draw, choose

from .conftest import VOCABULARY, make_tokenizer
from .distributions import Pick, assert_drawn_from, ruled, warped

SMALL = 12
ENDS = frozenset({0, 3})


def words_of(sequences: Sequence[Sequence[int]], vocabulary: int = SMALL) -> BadWords:
    """Return bad words that are these token sequences, whatever stands before them."""
    texts = {f"w{i}": list(sequence) for i, sequence in enumerate(sequences)}
    return BadWords(list(texts), lambda text: texts.get(text.strip(), []), vocabulary, frozenset())


def rules_of(wishes: Sampling, bad: Sequence[Sequence[int]] = ()) -> Rules:
    return Rules(wishes, words_of(bad), None, ENDS)


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


_tokens = st.lists(st.integers(0, SMALL - 1), max_size=10)
_penalties = st.sampled_from([0.0, 0.0, 0.6, -1.5])
_wishes = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=_penalties,
    frequency_penalty=_penalties,
    logit_bias=st.dictionaries(st.integers(0, SMALL - 1), st.sampled_from([-100.0, -1.0, 2.5]), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    min_tokens=st.sampled_from([0, 0, 3, 8]),
)
_bad = st.lists(st.lists(st.integers(0, SMALL - 1), min_size=1, max_size=3), max_size=4, unique_by=tuple)
_rows = st.lists(
    st.tuples(_wishes, _bad, st.lists(st.integers(0, SMALL - 1), min_size=1, max_size=8), _tokens), max_size=5
)


@settings(max_examples=250, deadline=None)
@given(rows=_rows, seed=st.integers(0, 1000))
def test_rules_make_what_transformers_processors_make(
    rows: list[tuple[Sampling, list[list[int]], list[int], list[int]]], seed: int
) -> None:
    logits = randn(len(rows) + 1, SMALL, seed=seed, scale=3)
    before = logits.clone()
    draws = [
        Draw(wishes, 0, prompt, generated, ENDS, rules_of(wishes, bad)) for wishes, bad, prompt, generated in rows
    ]
    ours = process(logits, [*draws, Draw(Sampling(), 0)])
    assert torch.equal(logits, before), "the model's own logits are still needed"
    assert torch.equal(ours[-1], logits[-1]), "a row without rules"
    for row, (wishes, bad, prompt, generated) in enumerate(rows):
        theirs = ruled(logits[row : row + 1], wishes, prompt, generated, bad, sorted(ENDS))
        assert torch.allclose(ours[row], theirs[0], atol=1e-5)


def test_rows_without_rules_are_not_even_copied() -> None:
    logits = randn(3, 9, seed=1)
    assert process(logits, [Draw(Sampling(), 0)] * 3) is logits


def test_penalties_from_step_to_step_equal_those_counted_anew() -> None:
    wishes = Sampling(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.7)
    kept, prompt, generated = rules_of(wishes), [1, 2, 2], list[int]()
    for step in range(200):  # beyond the first size of its lists
        logits = randn(1, 150, seed=step, scale=2)
        fresh = rules_of(wishes)
        ours = process(logits, [Draw(wishes, 0, prompt, generated, ENDS, kept)])
        assert torch.equal(ours, process(logits, [Draw(wishes, 0, prompt, generated, ENDS, fresh)]))
        generated.append(step * 7 % 149)


def test_history_of_a_completion_leaves_out_the_prompt() -> None:
    ids, counts = History(with_prompt=False).follow([5, 6], [7, 7, 5])
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {7: 2.0, 5: 1.0}
    ids, counts = History(with_prompt=True).follow([5, 6], [7, 7, 5])
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {5: 1.0, 6: 0.0, 7: 2.0}


RULED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "top_p": 0.9},
    {"logit_bias": ((4, 2.0), (7, -3.0)), "top_k": 6},
    {"repetition_penalty": 0.7, "logit_bias": ((2, 1.0),), "min_p": 0.1, "temperature": 1.4},
    {"min_tokens": 9, "frequency_penalty": -0.5, "top_k": 8, "top_p": 0.95},
]


@pytest.mark.parametrize("pick", [pick_host.pick, pick_device.pick], ids=["host", "device"])
@pytest.mark.parametrize("wanted", RULED, ids=str)
def test_the_draws_under_rules_have_the_exact_distribution(wanted: dict[str, Any], pick: Pick) -> None:
    count, prompt, generated, bad = 8_000, [1, 2, 9], [4, 4, 2, 8], [[6], [8, 5]]
    logits = randn(1, SMALL, seed=6, scale=1.5)
    wishes = Sampling(seed=77, **wanted)
    rules = rules_of(wishes, bad)
    draws = [Draw(wishes, position, prompt, generated, ENDS, rules) for position in range(count)]
    tokens = pick(process(logits.expand(count, -1), draws), draws)
    expected = warped(ruled(logits, wishes, prompt, generated, bad, sorted(ENDS)), wishes)[0]
    assert expected[5] == expected[6] == 0
    assert_drawn_from(tokens.tolist(), expected)


def test_greedy_rows_obey_too() -> None:
    logits = torch.arange(SMALL).float()[None]
    wishes = Sampling(temperature=0.0, logit_bias=((10, -5.0),))
    (choice,) = choose(logits, [Draw(wishes, 0, [1], [2, 3], ENDS, rules_of(wishes, [[11], [3, 9]]))]).fetch()
    assert choice.token_id == 8


def test_where_all_is_banned_there_is_no_token_and_the_others_go_on() -> None:
    wishes = Sampling(temperature=0.7)
    everything = rules_of(wishes, [[token] for token in range(SMALL)])
    logits = randn(2, SMALL, seed=1)
    none, one = choose(logits, [Draw(wishes, 0, rules=everything), Draw(wishes, 0)]).fetch()
    assert none.token_id == NOTHING_LEFT
    assert "exclude" in str(none.problem)
    assert one.token_id >= 0


def test_tokens_that_the_model_cannot_put_out_are_passed_over() -> None:
    wishes = Sampling(repetition_penalty=1.5, logit_bias=((11, 3.0),), min_tokens=5)
    logits = randn(1, SMALL - 2, seed=1)
    rules = rules_of(wishes, [[11]])
    ours = process(logits, [Draw(wishes, 0, [1, 11], [11, 10], frozenset({0, 11}), rules)])
    theirs = ruled(logits, Sampling(repetition_penalty=1.5, min_tokens=5), [1], [1], [], [0])
    assert torch.allclose(ours, theirs)


@pytest.fixture(scope="module")
def book() -> RuleBook:
    """Return the rule book of the tiny tokenizer."""
    return RuleBook(make_tokenizer(), VOCABULARY, frozenset({0}))


def test_who_needs_no_rules_has_none(book: RuleBook) -> None:
    assert book.make(Sampling(temperature=0.3, top_p=0.5, stop=("x",), logprobs=2), ENDS) is None
    for wanted in ({"min_tokens": 1}, {"presence_penalty": 0.1}, {"bad_words": ("sea",)}, {"choice": ("a",)}):
        assert book.make(Sampling(**wanted), ENDS) is not None  # type: ignore[arg-type]
    book.close()


def test_a_bad_word_does_not_come_as_itself_nor_behind_a_space(book: RuleBook) -> None:
    tokenizer = make_tokenizer()
    rules = book.make(Sampling(bad_words=("sky",)), ENDS)
    assert rules is not None
    for text in ("the sky", "sky", "\nsky", "a sky"):
        *before, last = tokenizer(text).input_ids
        assert last in rules.bad_words.completed_by(before[:1], before[1:]), text
        assert last in rules.bad_words.completed_by(before, []), text
    *before, last = tokenizer("the sea").input_ids
    assert last not in rules.bad_words.completed_by(before, [])


def test_a_bad_word_that_is_the_end_token_bans_nothing(book: RuleBook) -> None:
    rules = book.make(Sampling(bad_words=("<eos>",)), ENDS)
    assert rules is not None
    assert 0 not in rules.bad_words.completed_by([5], [6])


def test_what_the_model_does_not_have_is_refused_by_name() -> None:
    book = RuleBook(make_tokenizer(), 100, frozenset({0}))  # a model with fewer ids than its tokenizer
    with pytest.raises(BadRequestError, match=r"logit_bias: token 100 is unknown; the model's ids end at 99"):
        book.make(Sampling(logit_bias=((99, 1.0), (100, 1.0))), ENDS)
    with pytest.raises(BadRequestError, match=r"bad_words: 'sky' has the token \d+; the model's ids end at 99"):
        book.make(Sampling(bad_words=("sky",)), ENDS)
    with pytest.raises(BadRequestError, match="has no tokens"):
        words_of([[]])
