"""Structured output: JSON schema, regular expression or choice, as a mask over the tokens of each step.

The library is `llguidance`. It needs no other package, and one wheel a platform serves every Python (abi3);
`xgrammar` brings pydantic, triton and a layer for its kernels along, `outlines-core` has a wheel for each Python.
And it compiles lazily, where the other two work the whole vocabulary into each new grammar: for one schema of seven
fields and 49,152 tokens, in processor time, llguidance 1.9.1 had its first mask after 4 ms; xgrammar 0.2.8 and
outlines-core 0.2.14 were ready after 0.8 s each, in which all running rows would stand still.

A mask is computed between two steps of all rows, so its cost is bounded three times over: `LIMITS` is the library's
own fuel, `MAX_PATTERN_CHARS` bounds what one unit of that fuel can cost (a derivative is not interrupted), and
`trial` compiles and walks each new grammar in a process that may be killed.

A grammar's state follows from the tokens so far, so that it comes to be the same in a worker that resumes a stream.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from ....protocol.errors import BadRequestError
from ....protocol.payload import Sampling
from .devices import first_line
from .trial import LIMITS, Trial

#: Compiled grammars that are kept: a service asks with the same few again and again.
KEPT_GRAMMARS = 32
#: Characters of a regular expression, and of all patterns of a JSON schema together. The derivative of an expression
#: may take the square of its length, and no limit of the library's stops it in the middle: a mask of "a?" a thousand
#: times takes 0.01 s of processor time, 4,000 times 0.2 s, 20,000 times more than 25 s.
MAX_PATTERN_CHARS = 2_048
#: Characters of all choices together. Each step takes time by the length of what is left of them.
MAX_CHOICE_CHARS = 65_536
#: A model that likes white space, or a hot one, would else never leave a place where JSON allows any of it.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
#: The token that says "the grammar allows an end here". It is not the model's, of which a request may have several
#: end tokens, others, or none.
END = "<|end of structured output|>"
#: Keys of regular expressions in a schema, the library's own options included.
_PATTERN_KEYS = frozenset({"pattern", "whitespace_pattern", "item_separator", "key_separator"})
#: What the library says of a schema whose references lead back to themselves.
_ENDLESS = "NoExtensionBias"
#: Characters of what the library says that a user is told.
MAX_PROBLEM_CHARS = 400


class Grammar:
    """What one request's completion must be, and how far it has come."""

    def __init__(self, book: GrammarBook, matcher: LLMatcher) -> None:
        """Begin; see `GrammarBook.make`."""
        self.book = book
        self.matcher = matcher
        self._ended = False

    def accept(self, token_id: int, *, ends: bool) -> None:
        """Take the next token.

        Args:
            token_id: the model's.
            ends: it ends the completion, where the grammar allows an end.

        Raises:
            BadRequestError: it is not allowed here.
        """
        if self.matcher.is_error():
            return  # known already, see `problem`
        if not self.finished and token_id < self.book.tokens and self.matcher.validate_tokens([token_id]):
            self.matcher.consume_token(token_id)
        elif ends and not self._ended and self.matcher.is_accepting():
            self._ended = True
        else:
            raise BadRequestError(f"token {token_id} does not go on as the request's structured output must")

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._ended or (self.matcher.is_stopped() and not self.matcher.is_error())

    @property
    def problem(self) -> str | None:
        """Why it cannot go on; None while it can."""
        return _short(self.matcher.get_error()) if self.matcher.is_error() else None


def allowed_tokens(
    grammars: Sequence[Grammar], ends: Sequence[frozenset[int]], vocabulary: int
) -> tuple[NDArray[np.bool_], list[bool]]:
    """Compute which tokens may come next.

    Args:
        grammars: of one book, one or more.
        ends: each request's end tokens; they may come where its grammar allows an end.
        vocabulary: tokens of a row of logits.

    Returns:
        Bool [grammars, vocabulary], nothing true for a grammar with a problem; and of each grammar whether it allows
        nothing but an end.
    """
    book = grammars[0].book
    words = np.zeros((len(grammars), -(-book.tokens // 32)), np.int32)
    fill_next_token_bitmask_par(book.executor, [(one.matcher, row) for row, one in enumerate(grammars)], words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=book.tokens, bitorder="little").view(np.bool_)
    bits[[one.matcher.is_error() for one in grammars]] = False
    may_end = bits[:, book.end].copy()
    bits[:, book.end] = False
    complete = may_end & ~bits.any(1)
    allowed = np.zeros((len(grammars), vocabulary), np.bool_)
    allowed[:, : book.tokens] = bits[:, :vocabulary]
    for row in np.flatnonzero(may_end).tolist():
        allowed[row, [token for token in ends[row] if token < vocabulary]] = True
    return allowed, complete.tolist()


class GrammarBook:
    """Compiles grammars for one model's tokens.

    Attributes:
        tokens: the masks' width: the model's vocabulary and at least one more.
        end: the token that stands for an end.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        """Compile for a model; see `RuleBook`."""
        self._hf_tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._trial = Trial()

    def make(self, sampling: Sampling) -> Grammar | None:
        """Return a request's grammar at its begin, None where it has none.

        Raises:
            BadRequestError: it is not valid, not supported, too large, or takes too long to compile.
        """
        if sampling.json_schema is not None:
            name, text = "json_schema", _of_schema(sampling.json_schema)
        elif sampling.regex is not None:
            _bound("regex", len(sampling.regex), MAX_PATTERN_CHARS, "")
            name, text = "regex", LLMatcher.grammar_from_regex(sampling.regex)
        elif sampling.choice:
            name, text = "choice", _of_choice(sampling.choice)
        else:
            return None
        matcher = self._compiled.pop(text, None) or self._compile(name, text)
        self._compiled[text] = matcher
        if len(self._compiled) > KEPT_GRAMMARS:
            self._compiled.popitem(last=False)
        return Grammar(self, matcher.deep_copy())

    def close(self) -> None:
        """End the process that tries grammars."""
        self._trial.close()

    def _compile(self, name: str, text: str) -> LLMatcher:
        tokenizer = self._tokenizer or self._make_tokenizer(name)
        problem = self._trial.check(text)
        if not problem:
            matcher = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
            if not matcher.is_error():
                matcher.compute_bitmask()  # what is too complex shows at the first step, and that one is done
            if not matcher.is_error():
                return matcher
            problem = matcher.get_error()
        raise BadRequestError(f"{name}: {_short(problem)}")

    def _make_tokenizer(self, name: str) -> LLTokenizer:
        """Give the library the tokenizer, with an end token of our own."""
        try:
            backend = Tokenizer.from_str(self._hf_tokenizer.backend_tokenizer.to_str())
            backend.no_padding()
            backend.no_truncation()
            backend.add_special_tokens([AddedToken(END, special=True)])
            self.end = backend.get_vocab_size() - 1  # the newest
            self.tokens = max(self._vocabulary, self.end + 1)
            written = backend.to_str()
            self._trial.start(written, self.tokens, self.end)  # it reads it while this process does
            self._tokenizer = LLTokenizer(written, n_vocab=self.tokens, eos_token=self.end)
        except Exception as error:
            raise BadRequestError(
                f"{name}: this model's tokenizer cannot be used for structured output: {first_line(error)}"
            ) from error
        self.executor = LLExecutor()
        return self._tokenizer


def _of_schema(text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refuse)
        schema = {} if schema is True else schema  # the same, and the options below have a place in it
        if not isinstance(schema, dict):
            raise ValueError("expected an object")
        _bound("json_schema", sum(_pattern_chars(schema)), MAX_PATTERN_CHARS, "its patterns have ")
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
    except (ValueError, RecursionError, TypeError) as error:
        raise BadRequestError(f"json_schema: not a JSON schema: {first_line(error)}") from error


def _pattern_chars(schema: Any) -> Iterator[int]:
    """Yield the length of each regular expression, wherever a schema may have one."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key in _PATTERN_KEYS and isinstance(value, str):
                yield len(value)
            elif key == "patternProperties" and isinstance(value, dict):
                yield from map(len, value)
            yield from _pattern_chars(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _pattern_chars(value)


def _bound(name: str, chars: int, most: int, what: str) -> None:
    if chars > most:
        raise BadRequestError(f"{name}: {what}{chars} characters, more than the {most} that can be followed in time")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _of_choice(choice: Sequence[str]) -> str:
    _bound("choice", sum(map(len, choice)), MAX_CHOICE_CHARS, "")
    # As one terminal: alternatives of a rule would be items of the parser, of which a row has 2,000.
    words = " | ".join(json.dumps(one, ensure_ascii=False) for one in choice)
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {words}")


def _short(problem: str) -> str:
    """Return what the library says on one line, without where it came from."""
    if _ENDLESS in problem:
        return "no text can match it: a $ref leads back to itself"
    line = " ".join(problem.split("\n<state>")[0].split())
    return line if len(line) <= MAX_PROBLEM_CHARS else line[:MAX_PROBLEM_CHARS] + "..."
