"""What running readers feel while long prompts arrive: chunked prefill against whole prompts at once.

Eight readers run. Each second a prompt of 1,500 tokens arrives, and asks for one token. Told are the times between
two tokens of a reader, and the times to the first token of the prompts that were answered; on a machine that needs
longer than a second for such a prompt, they queue, and some stay unanswered.
"""

from __future__ import annotations

import random
import time
from typing import Any

from engine_rivals import Ours, model_folder

from tokenmq.worker.engines.base import Tokens

READERS = 8
PROMPT_TOKENS = 1_500
EVERY_S = 1.0
SECONDS = 30.0
CONTEXT = 4_096
#: Whole prompts: the budget of a step is more than any prompt.
BUDGETS = {"chunked": None, "whole": CONTEXT}


def measure(dtype: str) -> dict[str, Any]:
    """Measure with and without chunks; print and return the figures."""
    figures = {}
    for name, budget in BUDGETS.items():
        ours = Ours(
            model_folder(dtype),
            dtype,
            READERS * 2,
            prefill_tokens=budget,
            max_context=CONTEXT,
            cache_tokens=READERS * 2 * CONTEXT,
        )
        with ours:
            gaps, firsts, open_prompts = run(ours)
        figures[name] = {
            "itl_p50_s": quantile(gaps, 0.5),
            "itl_p99_s": quantile(gaps, 0.99),
            "itl_worst_s": max(gaps),
            "ttft_p50_s": quantile(firsts, 0.5),
            "ttft_p99_s": quantile(firsts, 0.99),
            "answered": len(firsts),
            "unanswered": open_prompts,
        }
        print(
            f"{dtype:9} {name:8} between tokens: p50 {quantile(gaps, 0.5) * 1e3:5.0f} ms, "
            f"p99 {quantile(gaps, 0.99) * 1e3:5.0f} ms, longest {max(gaps) * 1e3:5.0f} ms; "
            f"first token of the prompts: p50 {quantile(firsts, 0.5):5.2f} s, p99 {quantile(firsts, 0.99):5.2f} s, "
            f"{len(firsts)} answered, {open_prompts} not",
            flush=True,
        )
    return figures


def run(ours: Ours) -> tuple[list[float], list[float], int]:
    """Return gaps between tokens, times to first tokens, and how many prompts are not answered, after `SECONDS`."""
    draw = random.Random(7)
    readers = {ours.submit(ids(draw, 16), CONTEXT - 64) for _ in range(READERS)}
    last: dict[int, float] = {}
    while len(last) < READERS:
        last.update((output.ticket, time.perf_counter()) for output in ours.step() if isinstance(output, Tokens))
    gaps: list[float] = []
    firsts: list[float] = []
    arrived: dict[int, float] = {}
    begun = now = time.perf_counter()
    due = begun
    while now < begun + SECONDS:
        while now >= due:  # in time of their arrival, though a step was too long to take them in
            arrived[ours.submit(ids(draw, PROMPT_TOKENS), 1)] = due
            due += EVERY_S
        outputs = ours.step()
        now = time.perf_counter()
        for output in outputs:
            if not isinstance(output, Tokens):
                continue
            if output.ticket in readers:
                gaps.append(now - last[output.ticket])
                last[output.ticket] = now
            elif output.ticket in arrived:
                firsts.append(now - arrived.pop(output.ticket))
    return gaps, firsts, len(arrived)


def ids(draw: random.Random, count: int) -> list[int]:
    """Draw a prompt."""
    return [draw.randrange(1_000, 20_000) for _ in range(count)]


def quantile(values: list[float], part: float) -> float:
    """Return the value below which that part of them lies; NaN where there are none."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else float("nan")
