"""Tries a grammar in a process of its own, which may be killed.

A few hundred characters of JSON schema can take hours to compile (patterns under `allOf` are intersected, and each
of them doubles the time), others compile at once and take seconds for a mask; nothing stops either in this process.
So a grammar that is new is compiled there first, with the model's tokens, and a few masks are computed, where
processor time and memory are limited. What passes is compiled here again, which takes the same; a later step that
turns out to be too much ends in an error of its matcher, see `LIMITS`.

The process is started with the first grammar and stays for the next; it ends when its input does. Each grammar is
tried in a fork of it, so that one that is killed does not cost the next one a start.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from multiprocessing.connection import wait

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

#: Processor time for one grammar and its first masks. Schemas that people write take a hundredth of it.
LIMIT_CPU_S = 0.25
#: Memory for the process with one grammar, as virtual addresses.
LIMIT_BYTES = 2 * 1024**3
#: How long to wait for an answer on a machine that is busy with other things, the start of the process included.
WAIT_S = 10.0
#: Tokens of each walk through a new grammar: what explodes later does so under `LIMITS`.
WALK_TOKENS = 8
#: What the library may spend, so that a mask takes some tens of milliseconds at most. Schemas that people write
#: take a tenth of it at a step.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000, step_lexer_fuel=50_000, max_lexer_states=50_000, verbose_errors=False
)
TOO_MUCH = "it takes too long to compile or to follow, or too much memory"


class Trial:
    """The process, seen from the one that asks it."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._begin = b""
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], Trial] | None = None

    def start(self, tokenizer: str, tokens: int, end: int) -> None:
        """Start the process.

        Args:
            tokenizer: the model's, as `tokenizers` writes it.
            tokens: of the vocabulary.
            end: the token that stands for an end.
        """
        self.close()
        self._begin = _line([tokenizer, tokens, end])
        with contextlib.suppress(BrokenPipeError):
            self._running()

    def check(self, grammar: str) -> str:
        """Return what is wrong with a grammar of llguidance's; nothing when it may be compiled here.

        It follows `start`.
        """
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(_line(grammar))
            process.stdin.flush()
            if wait([process.stdout.fileno()], WAIT_S):
                answer = process.stdout.readline()
        if answer.endswith(b"\n"):
            problem: str = json.loads(answer)
            return problem
        self.close()
        return TOO_MUCH

    def close(self) -> None:
        """End the process."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(  # noqa: S603 (this file, no shell)
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is meant for the worker; and the forks end with it
            )
            self._end = weakref.finalize(self, _end, self._process)
            assert self._process.stdin is not None
            self._process.stdin.write(self._begin)
            self._process.stdin.flush()
        return self._process


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def main() -> None:
    """Read the tokenizer, then answer each line, a grammar as a JSON string, with what is wrong, as a JSON string."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    written, tokens, end = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(written, n_vocab=tokens, eos_token=end)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            _try(tokenizer, line)
        _, status = os.waitpid(process, 0)
        if status:
            print(json.dumps(TOO_MUCH), flush=True)


def _try(tokenizer: LLTokenizer, line: str) -> None:
    """Answer, and end this process."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    signal.setitimer(signal.ITIMER_PROF, LIMIT_CPU_S)  # the signal kills, whatever the library is at
    status = 1
    try:
        problem = _problem(tokenizer, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(sys.stdout.fileno(), _line(problem))
        status = 0
    finally:
        os._exit(status)  # never back into the loop, whose input is the other's


def _problem(tokenizer: LLTokenizer, grammar: str) -> str:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        return matcher.get_error()
    for place in (0, -1):
        walker = matcher.deep_copy()
        for _ in range(WALK_TOKENS):
            allowed = list(_ids(walker.compute_bitmask()))
            if walker.is_error():
                return walker.get_error()
            if not allowed or not walker.consume_token(allowed[place]):
                break
    return ""


def _ids(mask: bytes) -> Iterator[int]:
    """Yield the first and the last token of a mask."""
    bits = int.from_bytes(mask, "little")
    if bits:
        yield (bits & -bits).bit_length() - 1
        yield bits.bit_length() - 1


if __name__ == "__main__":
    main()
