"""Random requests, cancels and nonsense for the engine, for as long as you like: memory stays flat, no row leaks.

    python benchmarks/engine_soak.py --model FOLDER_OR_GGUF --minutes 30

Requests of all kinds come and go: long and short prompts, shared beginnings, sampled and greedy, with penalties,
grammars, logprobs and echoes, resumed ones, prompts that are too long, priorities, cancels before, in and after a
prefill. The cache is small, so that rows are put back all the time. After each minute the engine is drained: every
request has come to exactly one end, no row, no token and no queue is left. The process's memory is printed; from the
first third of the time to the last it may grow by what libraries keep, not with the number of requests. Exits with 1
where anything of that does not hold.
"""

# The worker's package sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

import argparse
import json
import random
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tokenmq.protocol.payload import Generation, Prior, Sampling
from tokenmq.worker.engines.base import Done, Failed, Job, Tokens
from tokenmq.worker.engines.transformers.engine import TransformersEngine

#: Growth of the memory that is no leak: allocators keep some of what the largest step took.
ALLOWED_GROWTH = 0.05
SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]})


class Soak:
    """Drives one engine and keeps the books."""

    def __init__(self, engine: TransformersEngine, seed: int) -> None:
        """Begin with nothing under way."""
        self.engine = engine
        self.random = random.Random(seed)
        self.tickets = 0
        self.live: dict[int, Job] = {}
        self.tokens: dict[int, list[int]] = {}
        self.ends = {"done": 0, "cancelled": 0, "refused": 0}
        self.steps = 0
        self.beginnings = [self._ids(self.random.randint(40, 200)) for _ in range(6)]
        self.finished: list[tuple[Job, list[int]]] = []

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.randrange(100, 40_000) for _ in range(count))

    def job(self) -> Job:
        """Return some request."""
        choose = self.random
        self.tickets += 1
        wishes: dict[str, Any] = {"max_tokens": choose.choice([1, 5, 20, 60]), "seed": choose.randrange(2**40)}
        wishes["temperature"] = choose.choice([0.0, 0.7, 1.3])
        if choose.random() < 0.3:
            wishes |= {"top_p": 0.9, "top_k": choose.choice([0, 40])}
        if choose.random() < 0.15:
            wishes |= {
                "repetition_penalty": 1.2,
                "presence_penalty": 0.3,
                "logit_bias": ((choose.randrange(40_000), 3.0),),
            }
        if choose.random() < 0.1:
            wishes |= choose.choice([{"json_schema": SCHEMA}, {"regex": "[a-z]{3,9}"}, {"choice": ("yes", "no")}])
        if choose.random() < 0.1:
            wishes |= {"stop": (" the", "\n"), "min_tokens": 1, "logprobs": 3}
        prompt: tuple[int, ...] = self._ids(choose.choice([1, 3, 20, 90, 300]))
        if choose.random() < 0.5:
            prompt = choose.choice(self.beginnings) + prompt
        if choose.random() < 0.02:
            prompt = self._ids(5000)  # longer than the context
        generation = Generation(token_ids=prompt, sampling=Sampling(**wishes), echo=choose.random() < 0.05)
        if self.finished and choose.random() < 0.1:
            before, tokens = choose.choice(self.finished)
            if len(tokens) > 1:
                prior = Prior(tuple(tokens[: choose.randrange(1, len(tokens))]))
                generation = Generation(
                    token_ids=before.generation.token_ids, sampling=before.generation.sampling, prior=prior
                )
        return Job(self.tickets, "soak", generation, priority=choose.randrange(10))

    def take(self, outputs: Any) -> None:
        """Keep the books; raises AssertionError for an output that must not be."""
        for output in outputs:
            assert output.ticket in self.live, f"an output for {output.ticket}, which is not there"
            if isinstance(output, Tokens):
                self.tokens[output.ticket].extend(output.token_ids)
                continue
            job, tokens = self.live.pop(output.ticket), self.tokens.pop(output.ticket)
            if isinstance(output, Failed):
                assert output.code == "bad_request", output
                self.ends["refused"] += 1
                continue
            assert isinstance(output, Done), output
            self.ends["cancelled" if output.reason.value == "cancelled" else "done"] += 1
            if output.reason.value != "cancelled" and job.generation.prior is None:
                assert output.completion_tokens == len(tokens), output
                self.finished = [*self.finished[-50:], (job, tokens)]

    def submit(self) -> None:
        """Let a request come."""
        job = self.job()
        self.live[job.ticket], self.tokens[job.ticket] = job, []
        self.take(self.engine.submit(job))

    def run(self, until: float) -> None:
        """Let requests come and go until then."""
        while time.monotonic() < until:
            while len(self.live) < 24 and self.random.random() < 0.4:
                self.submit()
            if self.live and self.random.random() < 0.05:
                self.take(self.engine.cancel(self.random.choice(list(self.live))))
            if self.engine.next_step_in() is not None:
                self.take(self.engine.step())
                self.engine.validate()
                self.steps += 1

    def drain(self) -> None:
        """Let all that is there end, and look whether anything is left."""
        while self.engine.next_step_in() is not None:
            self.take(self.engine.step())
        stats = self.engine.stats()
        assert not self.live, f"without an end: {sorted(self.live)}"
        assert (stats.running, stats.waiting, stats.kv_use) == (0, 0, 0.0), stats


def resident_mb() -> float:
    """Return the memory of this process, in MB of 10**6 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def touch(engine: TransformersEngine) -> None:
    """Write all of the caches: the system gives out their pages when they are first written, which is no leak."""
    assert engine._runner is not None
    for layer in engine._runner.cache.layers:
        for memory in vars(layer).values():
            if isinstance(memory, torch.Tensor):
                memory.zero_()


def main() -> int:
    """Soak; return 1 where memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a .gguf file")
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (default: 30)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16 (default: float32)")
    parser.add_argument("--seed", type=int, default=1, help="of the requests (default: 1)")
    given = parser.parse_args()
    engine = TransformersEngine(
        model=given.model,
        name="soak",
        slots=8,
        dtype=given.dtype,
        cache_tokens=3000,
        max_context=1500,
        prefix_tokens=2000,
    )
    engine.load()
    touch(engine)
    soak = Soak(engine, given.seed)
    seen: list[float] = []
    rounds = max(3, round(given.minutes))
    for _ in range(rounds):
        soak.run(time.monotonic() + given.minutes * 60 / rounds)
        soak.drain()
        seen.append(resident_mb())
        stats = engine.stats()
        hits = stats.cached_tokens / max(1, stats.prompt_tokens)
        print(f"{seen[-1]:7.0f} MB  {soak.steps} steps  {soak.ends}  prefix hits {hits:.0%}", flush=True)
    third = max(1, rounds // 3)
    first, last = statistics.median(seen[:third]), statistics.median(seen[-third:])
    grown = last / first - 1
    print(f"memory: {first:.0f} MB in the first third, {last:.0f} MB in the last: {grown:+.1%}")
    return 0 if grown <= ALLOWED_GROWTH else 1


if __name__ == "__main__":
    sys.exit(main())
