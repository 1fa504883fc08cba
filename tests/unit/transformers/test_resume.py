"""A stream that another worker has begun goes on as if nothing had happened: tokens, text, counts and ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tokenmq.protocol.messages import FinishReason
from tokenmq.worker.engines.base import Done, EngineLoadError, Failed, Job, Tokens
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.resume import Resume, choose_way
from tokenmq.worker.engines.transformers.sampling import Picked

from .conftest import CONTEXT, VOCABULARY, Record, batch_of, byte_chars, job, resumed, run

Make = Callable[..., TransformersEngine]
WAYS = ["prefill", "replay"]
PROMPT = [(5 + 7 * step + step * step) % 300 + 1 for step in range(9)]
MOST = 24
#: (what, the job's wishes)
STREAMS = {
    "greedy": {},
    "free": {"temperature": 1.0, "seed": 3},
    "restricted": {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 4},
}


@dataclass
class Stream:
    """An undisturbed stream: tokens with the text that each brought, and its end."""

    tokens: list[int]
    pieces: list[str]
    done: Done

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def undisturbed(engine: TransformersEngine, whole: Job) -> Stream:
    """Run a job alone."""
    stream = Stream([], [], Done(0, FinishReason.CANCELLED, 0, 0))
    assert list(engine.submit(whole)) == []
    while engine.next_step_in() is not None:
        for output in engine.step():
            if isinstance(output, Tokens):
                stream.tokens += output.token_ids
                stream.pieces.append(output.text)
            else:
                assert isinstance(output, Done)
                stream.done = output
        engine.validate()
    assert len(stream.pieces) == len(stream.tokens) == stream.done.completion_tokens
    return stream


def assert_goes_on(record: Record, ticket: int, stream: Stream, cut: int, text_chars: int) -> None:
    """Check that a stream which was resumed at `cut` brought the rest, and nothing else."""
    assert record.ids.get(ticket, []) == stream.tokens[cut:]
    assert record.text.get(ticket, "") == stream.text[text_chars:]
    done = record.done(ticket)
    assert done.reason is stream.done.reason
    assert done.prompt_tokens == stream.done.prompt_tokens
    assert done.completion_tokens == stream.done.completion_tokens


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """Return a way to resume."""
    return str(request.param)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_goes_on_from_every_cut(kind: str, stream: str, way: str, make_engine: Make) -> None:
    whole = job(0, PROMPT, max_tokens=MOST, ignore_eos=True, **STREAMS[stream])
    engine = make_engine(kind, resume=way)
    want = undisturbed(engine, whole)
    assert len(set(want.tokens)) > 5
    for cut in range(1, MOST + 1):
        sent = len("".join(want.pieces[:cut]))
        for text_chars in {0, sent // 2, sent}:
            record = Record()
            record.take(engine.submit(resumed(1, whole, want.tokens[:cut], text_chars)))
            assert_goes_on(run(engine, record), 1, want, cut, text_chars)


@pytest.mark.parametrize("budget", [3, 16, 64])
def test_streams_go_on_in_company(budget: int, way: str, make_engine: Make) -> None:
    # Resumed ones, undisturbed ones and ones that wait for a slot; some prompts with their priors exceed the budget.
    engine = make_engine(slots=3, prefill_tokens=budget, resume=way)
    jobs = [
        job(number, PROMPT[: 1 + number % 9] * (1 + number % 3), max_tokens=MOST, temperature=number % 2, seed=number)
        for number in range(9)
    ]
    streams = [undisturbed(engine, whole) for whole in jobs]
    cuts = [0 if number % 4 == 3 else 1 + 5 * number % (len(streams[number].tokens) - 1) for number in range(9)]
    record = Record()
    for number, (whole, stream, cut) in enumerate(zip(jobs, streams, cuts, strict=True)):
        sent = len("".join(stream.pieces[:cut]))
        record.take(engine.submit(resumed(number, whole, stream.tokens[:cut], sent) if cut else whole))
        if number == 4:
            for _ in range(3):
                record.take(engine.step())
                engine.validate()
    run(engine, record)
    for number, (stream, cut) in enumerate(zip(streams, cuts, strict=True)):
        assert_goes_on(record, number, stream, cut, len("".join(stream.pieces[:cut])))


def test_a_stream_can_break_again_and_again(way: str, make_engine: Make) -> None:
    engine = make_engine(resume=way)
    whole = job(0, PROMPT, max_tokens=MOST, temperature=1.0, seed=8, ignore_eos=True)
    want = undisturbed(engine, whole)
    got: list[int] = []
    text = ""
    for _ in range(8):
        engine.submit(resumed(0, whole, got, len(text)) if got else whole)
        brought = 0
        while brought < 3:
            for output in engine.step():
                assert isinstance(output, Tokens)
                got += output.token_ids
                text += output.text
                brought += 1
            engine.validate()
        engine.reset()
        if len(got) > MOST - 4:
            break
    record = Record()
    record.take(engine.submit(resumed(0, whole, got, len(text))))
    run(engine, record)
    assert got + record.ids[0] == want.tokens
    assert text + record.text[0] == want.text


# ------------------------------------------------------------------------------------------------------- text


def test_no_seam_inside_a_half_matched_stop(way: str, make_engine: Make) -> None:
    engine = make_engine(resume=way)
    plain = undisturbed(engine, job(0, PROMPT, max_tokens=MOST, ignore_eos=True))
    at = next(at for at in range(6, len(plain.text) - 6) if "\ufffd" not in plain.text[at : at + 5])
    stop, near = plain.text[at : at + 5], plain.text[at - 4 : at] + "\x00"
    whole = job(0, PROMPT, max_tokens=MOST, ignore_eos=True, stop=(near, stop))
    want = undisturbed(engine, whole)
    assert want.done.reason is FinishReason.STOP
    assert want.text == plain.text[: plain.text.index(stop)]
    held = 0
    for cut in range(1, len(want.tokens) + 1):
        sent = len("".join(want.pieces[:cut]))
        held += "".join(want.pieces[:cut]) != "".join(plain.pieces[:cut])
        record = Record()
        record.take(engine.submit(resumed(1, whole, want.tokens[:cut], sent)))
        assert_goes_on(run(engine, record), 1, want, cut, sent)
    assert held >= 2, "some cuts must fall where text is held back"


def byte_fallback_tokenizer() -> Any:
    """Return a tokenizer like Llama 2's, whose tokens are bytes and one word."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hi": 256, "<unk>": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


_ids = st.one_of(
    st.lists(st.integers(0, 257), min_size=2, max_size=20),
    st.text("aé中🙂", min_size=1, max_size=6).map(lambda text: list(text.encode())).filter(lambda ids: len(ids) > 1),
)


def scripted(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, script: list[int], start: int) -> None:
    """Let the engine's model choose these tokens, whatever it computes; the first is at position `start`."""
    monkeypatch.setattr(
        "tokenmq.worker.engines.transformers.batch.choose",
        lambda logits, draws: Picked(torch.tensor([script[draw.position - start] for draw in draws]), None, draws),
    )


@pytest.mark.parametrize("fallback", [True, False])
def test_pieces_join_in_any_text(
    fallback: bool, tiny: Callable[[str], Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = byte_fallback_tokenizer() if fallback else tokenizer
    engine = TransformersEngine.from_loaded(tiny("llama"), chosen, name="tiny", slots=2, resume="prefill")
    engine.load()
    byte_of = {} if fallback else {byte: tokenizer.backend_tokenizer.token_to_id(char) for byte, char in byte_chars()}

    # Byte for byte, so that characters and byte runs are cut in the middle.
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(_ids)
    def joined(ids: list[int]) -> None:
        script = [byte_of.get(token, token) for token in ids]
        scripted(engine, monkeypatch, script, 1)
        whole = job(0, [3], max_tokens=len(script), ignore_eos=True)
        want = undisturbed(engine, whole)
        assert want.tokens == script
        for cut in range(1, len(script) + 1):
            sent = len("".join(want.pieces[:cut]))
            for text_chars in {sent, max(0, sent - 1)}:
                record = Record()
                record.take(engine.submit(resumed(1, whole, script[:cut], text_chars)))
                assert_goes_on(run(engine, record), 1, want, cut, text_chars)

    joined()


# ------------------------------------------------------------------------------------------------------- ends


def test_a_prior_that_is_complete_ends_at_once(way: str, make_engine: Make, tokenizer: Any) -> None:
    engine = make_engine(resume=way)
    plain = undisturbed(engine, job(0, PROMPT, max_tokens=MOST, ignore_eos=True))
    at = next(i for i in range(3, MOST) if plain.tokens[i] not in plain.tokens[:i])
    text = plain.text
    start = next(at for at in range(3, len(text) - 2) if "\ufffd" not in text[at : at + 2])
    ends: list[tuple[FinishReason, dict[str, Any]]] = [
        (FinishReason.LENGTH, {"max_tokens": 7, "ignore_eos": True}),
        (FinishReason.STOP, {"max_tokens": MOST, "ignore_eos": True, "stop_token_ids": (plain.tokens[at],)}),
        (FinishReason.STOP, {"max_tokens": MOST, "ignore_eos": True, "stop": (text[start : start + 2],)}),
        # What is held back when the end comes is released with it: here all of the text.
        (FinishReason.LENGTH, {"max_tokens": 7, "ignore_eos": True, "stop": (text + "\x00",)}),
    ]
    for reason, wishes in ends:
        whole = job(0, PROMPT, **wishes)
        want = undisturbed(engine, whole)
        assert want.done.reason is reason
        for text_chars in {0, len("".join(want.pieces[:-1])), len(want.text)}:
            outputs = list(engine.submit(resumed(1, whole, want.tokens, text_chars)))
            left = want.text[text_chars:]
            assert outputs[:-1] == ([Tokens(1, (), left)] if left else [])
            done = outputs[-1]
            assert isinstance(done, Done)
            assert (done.reason, done.completion_tokens, done.prompt_tokens) == (
                reason,
                len(want.tokens),
                len(PROMPT),
            )
            assert (done.queue_s, done.prefill_s, done.decode_s) == (0, 0, 0)
            assert engine.next_step_in() is None


def test_the_context_ends_a_resumed_completion(way: str, make_engine: Make) -> None:
    engine = make_engine(max_context=20, resume=way)
    whole = job(0, PROMPT, max_tokens=500, ignore_eos=True)
    want = undisturbed(engine, whole)
    assert len(want.tokens) == 20 - len(PROMPT)
    for cut in range(1, len(want.tokens) + 1):
        record = Record()
        record.take(engine.submit(resumed(1, whole, want.tokens[:cut])))
        assert_goes_on(run(engine, record), 1, want, cut, 0)


def refused(engine: TransformersEngine, wrong: Job, code: str = "bad_request") -> str:
    (failed,) = engine.submit(wrong)
    assert isinstance(failed, Failed)
    assert failed.code == code
    assert failed.retryable == (code == "cannot_resume")
    assert engine.next_step_in() is None
    return failed.message


def test_a_prior_that_cannot_be_is_refused_in_words(way: str, make_engine: Make) -> None:
    engine = make_engine(max_context=30, resume=way)
    whole = job(0, PROMPT, max_tokens=500, ignore_eos=True, stop_token_ids=(7,), stop=("##",))
    assert "ended after 2" in refused(engine, resumed(1, whole, [5, 7, 9]))
    hashes = engine_token(engine, "#")
    assert "ended after 3" in refused(engine, resumed(1, whole, [5, hashes, hashes, 9]))
    few = replace(whole, generation=replace(whole.generation, sampling=job(0, [1], max_tokens=2).generation.sampling))
    assert "ended after 2" in refused(engine, resumed(1, few, [5, 6, 9]))
    too_long = refused(engine, resumed(1, whole, [5] * 22), "cannot_resume")  # a larger worker may have begun it
    assert "9 tokens and its prior 22; the context is 30" in too_long
    assert f"token id {VOCABULARY} is unknown" in refused(engine, resumed(1, whole, [5, VOCABULARY]))
    assert "give 1 characters, not 4" in refused(engine, resumed(1, whole, [hashes + 1], 4))
    assert "a context of 30" in refused(engine, resumed(1, job(0, [5] * 30), [5]))
    record = Record()
    record.take(engine.submit(resumed(1, whole, [5] * 20)))
    assert record.ends == {}
    assert run(engine, record).done(1).completion_tokens == 21


def engine_token(engine: TransformersEngine, text: str) -> int:
    """Return the only token of a text."""
    assert engine._loaded is not None
    (token,) = engine._loaded.tokenizer(text).input_ids
    return int(token)


# -------------------------------------------------------------------------------------------------- the batch


def test_cancel_in_the_middle_of_a_replay_leaves_the_others_alone(make_engine: Make) -> None:
    engine = make_engine(slots=3, prefill_tokens=4, resume="replay")
    jobs = [job(number, PROMPT[: 3 + number], max_tokens=40, ignore_eos=True) for number in range(3)]
    streams = [undisturbed(engine, whole) for whole in jobs]
    for victim in range(3):
        record = Record()
        for number, (whole, stream) in enumerate(zip(jobs, streams, strict=True)):
            record.take(engine.submit(resumed(number, whole, stream.tokens[:30])))
        while not any(0 < row.length - 1 - row.stored < 29 for row in batch_of(engine).scheduler.running):
            record.take(engine.step())
        row = batch_of(engine).scheduler.find(victim)
        assert row is not None
        assert row.first_at is None, "it must still be on its way"
        (done,) = engine.cancel(victim)
        assert isinstance(done, Done)
        assert (done.reason, done.completion_tokens) == (FinishReason.CANCELLED, 30)
        engine.validate()
        run(engine, record)
        for number, stream in enumerate(streams):
            if number != victim:
                assert_goes_on(record, number, stream, 30, 0)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
def test_a_replay_leaves_in_the_cache_what_decoding_does(tokens: int, make_engine: Make) -> None:
    runner = batch_of(make_engine("llama", slots=3))._runner
    ids = [1 + (11 * step + step * step) % 300 for step in range(5 + tokens)]
    for slot in (0, 2):
        runner.extend(slot, [0], [ids[:5]])
    for at in range(5, 5 + tokens):
        runner.decode([ids[at]], [at])
    runner.replay(2, 5, ids[5:])
    for layer in runner.cache._slot_layers:
        for kept in (layer.keys, layer.values):
            torch.testing.assert_close(kept[2, :, : 5 + tokens], kept[0, :, : 5 + tokens], rtol=1e-4, atol=1e-4)
            assert not kept[2, :, 5 + tokens :].any(), "nothing behind the tokens"


def test_a_replay_that_fails_fails_alone(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(slots=3, prefill_tokens=64, resume="replay")
    jobs = [job(number, PROMPT[: 3 + number], max_tokens=20, ignore_eos=True) for number in range(3)]
    streams = [undisturbed(engine, whole) for whole in jobs]
    runner, calls = batch_of(engine)._runner, 0
    replay = runner.replay

    def breaking(slot: int, start: int, token_ids: list[int], *more: Any) -> None:
        nonlocal calls
        calls += 1
        if len(token_ids) == 9:
            raise RuntimeError("a broken kernel")
        replay(slot, start, token_ids, *more)

    monkeypatch.setattr(runner, "replay", breaking)
    record = Record()
    for number, (whole, stream) in enumerate(zip(jobs, streams, strict=True)):
        record.take(engine.submit(resumed(number, whole, stream.tokens[: 9 + number])))
    run(engine, record)
    assert calls == 3
    # The prefill's step brings nothing; the next one replays all known tokens but the newest: 8, 9 and 10.
    assert "a broken kernel" in record.failed(1).message
    assert_goes_on(record, 0, streams[0], 9, 0)
    assert_goes_on(record, 2, streams[2], 11, 0)


def test_a_replay_brings_nothing_until_it_is_done(make_engine: Make) -> None:
    engine = make_engine(slots=2, prefill_tokens=16, resume="replay")
    whole = job(0, PROMPT, max_tokens=60, ignore_eos=True)
    want = undisturbed(engine, whole)
    other = job(5, PROMPT[:4], max_tokens=50, ignore_eos=True)
    engine.submit(other)
    engine.step()
    engine.submit(resumed(1, whole, want.tokens[:55]))
    first: dict[int, int] = {}
    for step in range(60):
        for output in engine.step():
            first.setdefault(output.ticket, step)
        engine.validate()
        if 1 in first:
            break
    assert first[5] == 0, "the other row goes on meanwhile"
    assert first[1] == 1 + 54 // 16, "the prompt's step, then as many known tokens in each as the budget allows"


def test_the_times_of_a_resumed_stream(way: str, make_engine: Make) -> None:
    engine = make_engine(slots=1, prefill_tokens=5, resume=way)
    whole = job(0, PROMPT, max_tokens=MOST, ignore_eos=True)
    want = undisturbed(engine, whole)
    engine.submit(resumed(1, whole, want.tokens[: MOST - 2]))
    done = run(engine).done(1)
    assert done.prefill_s > done.decode_s > 0, "all that is computed again counts as prefill"


# ---------------------------------------------------------------------------------------------------- settings


def test_the_engine_says_how_it_resumes(make_engine: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tokenmq.worker")
    for way in WAYS:
        make_engine(resume=way)
        assert f"resumed by {way}" in caplog.text
        caplog.clear()
    with pytest.raises(EngineLoadError, match="resume must be one of auto, prefill, replay"):
        make_engine(resume="magic")
    assert make_engine(max_context=CONTEXT).load()[0].resumes


@pytest.mark.parametrize(
    ("device", "dtype", "mkl", "way"),
    [
        ("cpu", torch.bfloat16, "", Resume.REPLAY),
        ("cpu", torch.float16, "", Resume.PREFILL),
        ("cpu", torch.float32, "", Resume.PREFILL),
        ("cpu", torch.float32, "AUTO", Resume.PREFILL),
        ("cpu", torch.float32, "AVX2,STRICT", Resume.REPLAY),
        ("cuda", torch.bfloat16, "AUTO,STRICT", Resume.PREFILL),
    ],
)
def test_auto_replays_where_that_is_exact(
    device: str, dtype: torch.dtype, mkl: str, way: Resume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MKL_CBWR", mkl)
    assert choose_way("auto", torch.device(device), dtype) is way
    for wish in Resume:
        assert choose_way(wish.value, torch.device(device), dtype) is wish
