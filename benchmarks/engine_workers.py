"""Do several workers on one machine starve one another? One process with the engine against two at the same time.

Each process is a worker's engine with its own torch and OpenMP. Together they should make about as many tokens as one
alone: OpenMP threads that spin at their barriers would leave a fiftieth.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONCURRENT = 8
TOKENS = 48


def measure(dtype: str, rounds: int) -> dict[str, Any]:
    """Measure one and two at a time, in turns; print and return the medians of tokens a second of all."""
    workers = [Worker(dtype) for _ in range(2)]
    rates: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(rounds):
            for count in rates:
                begun = time.perf_counter()
                for worker in workers[:count]:
                    worker.begin()
                made = sum(worker.end() for worker in workers[:count])
                rates[count].append(made / (time.perf_counter() - begun))
    finally:
        for worker in workers:
            worker.close()
    one, two = statistics.median(rates[1]), statistics.median(rates[2])
    print(f"{dtype:9} {CONCURRENT} requests each: one worker {one:.0f} tokens/s, two together {two:.0f}", flush=True)
    return {"one_tokens_per_s": one, "two_tokens_per_s": two}


class Worker:
    """A process that generates when it is told to."""

    def __init__(self, dtype: str) -> None:
        """Start it, and wait until it has loaded the model."""
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__), dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.end()

    def begin(self) -> None:
        """Let it generate once."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)

    def end(self) -> int:
        """Wait for it; return the number of tokens."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a worker has ended")
        return int(json.loads(line))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def serve(dtype: str) -> None:
    """Be such a process."""
    import random

    from engine_rivals import Ours, model_folder

    draw = random.Random(1)
    ours = Ours(model_folder(dtype), dtype, CONCURRENT)
    print(json.dumps(0), flush=True)
    for _ in sys.stdin:
        prompts = [[draw.randrange(1_000, 20_000) for _ in range(16)] for _ in range(CONCURRENT)]
        print(json.dumps(ours.generate(prompts, TOKENS)), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
