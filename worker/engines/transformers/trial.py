"""Tries a grammar in a process of its own, which may be killed.

A few hundred characters of JSON schema can take hours to compile (patterns under `allOf` are intersected, and each
of them doubles the time), and nothing stops a compilation that runs in this process. So a grammar that is new is
compiled there first, where processor time and memory are limited. What passes is compiled here again: that is
bounded, too, since what remains then, and every later step, runs under llguidance's own limits.

The process is started with the first grammar and stays for the next; it ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from multiprocessing.connection import wait

import llguidance

#: Processor time for one grammar. Schemas that people write take a hundredth of it.
LIMIT_CPU_S = 0.25
#: Memory for the process with one grammar, as virtual addresses.
LIMIT_BYTES = 2 * 1024**3
#: How long to wait for an answer on a machine that is busy with other things, the start of the process included.
WAIT_S = 10.0


class Trial:
    """The process, seen from the one that asks it."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], Trial] | None = None

    def check(self, grammar: str) -> str:
        """Return what is wrong with a grammar of llguidance's; nothing when it may be compiled here."""
        process = self._running()
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(grammar).encode() + b"\n")
            process.stdin.flush()
            if wait([process.stdout.fileno()], WAIT_S):
                answer = process.stdout.readline()
        if answer.endswith(b"\n"):
            problem: str = json.loads(answer)
            return problem
        self.close()
        return "it takes too long to compile, or too much memory"

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
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def main() -> None:
    """Answer each line of input, a grammar as a JSON string, with a line, what is wrong with it as a JSON string."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the worker, which ends this one itself
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LIMIT_CPU_S)  # the signal kills, whatever the library is at
        problem = llguidance.LLMatcher.validate_grammar(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
