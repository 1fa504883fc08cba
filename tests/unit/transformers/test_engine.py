"""The engine against `model.generate`, and how it treats requests: joining, leaving, ending."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmq.protocol.messages import FinishReason, ModelInfo
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import Job, Tokens
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.prompt import HEAD_CHARS

from .conftest import CONTEXT, VOCABULARY, Record, batch_of, job, make_model, make_tokenizer, reference, run

Make = Callable[..., TransformersEngine]
KINDS = ["llama", "gpt2", "qwen2"]
LENGTHS = [1, 2, 5, 9, 14, 17, 33, 50, 16, 70]
MOST = 14


def prompt_of(number: int) -> list[int]:
    """Return a prompt of ordinary tokens; the number says which."""
    return [1 + (31 * number + 7 * step + step * step) % 300 for step in range(LENGTHS[number])]


_REFERENCES: dict[tuple[str, int], list[int]] = {}


def expected(model: Any, kind: str, number: int) -> list[int]:
    """Return the greedy continuation of a prompt, made once."""
    if (kind, number) not in _REFERENCES:
        _REFERENCES[kind, number] = reference(model, prompt_of(number), MOST, [0])
    return _REFERENCES[kind, number]


def test_the_references_are_worth_comparing_with(tiny: Callable[[str], Any]) -> None:
    for kind in KINDS:
        all_of_them = [tuple(expected(tiny(kind), kind, number)) for number in range(len(LENGTHS))]
        assert len(set(all_of_them)) == len(LENGTHS)
        assert sum(len(set(ids)) for ids in all_of_them) > 4 * len(LENGTHS), "the model must not just repeat itself"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("slots", "budget"), [(3, 16), (8, 128), (1, 5)])
def test_ragged_prompts_equal_generate(
    kind: str, slots: int, budget: int, make_engine: Make, tiny: Callable[[str], Any]
) -> None:
    engine = make_engine(kind, slots=slots, prefill_tokens=budget)
    for number in range(len(LENGTHS)):
        assert engine.submit(job(number, prompt_of(number), max_tokens=3 + number)) == []
    record, most, chunked = Record(), 0, False
    while engine.next_step_in() is not None:
        record.take(engine.step())
        engine.validate()
        most = max(most, engine.stats().running)
        chunked = chunked or batch_of(engine).scheduler.partial is not None
    assert most == slots, "the batch must have been full once"
    assert chunked == (budget < max(LENGTHS)), "a prompt beyond the budget goes in chunks"
    for number, length in enumerate(LENGTHS):
        want = expected(tiny(kind), kind, number)[: 3 + number]
        assert record.ids[number] == want, f"prompt {number} of {length} tokens"
        assert record.done(number).completion_tokens == len(want)
        assert record.done(number).prompt_tokens == length


_action = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(LENGTHS) - 1), st.integers(1, MOST)),
    st.tuples(st.just("cancel"), st.integers(0, 6), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 5), st.just(0)),
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_schedule_of_joining_and_leaving_equals_generate(kind: str, tiny: Callable[[str], Any]) -> None:
    model, tokenizer = tiny(kind), make_tokenizer()
    ended = {"stop": 0, "length": 0, "cancelled": 0}

    # derandomized: of millions of random tokens, one may have two best logits within rounding.
    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        actions=st.lists(_action, min_size=6, max_size=40),
        slots=st.integers(1, 4),
        budget=st.sampled_from([3, 16, 64, 200]),
    )
    def schedule(actions: list[tuple[str, int, int]], slots: int, budget: int) -> None:
        engine = TransformersEngine.from_loaded(model, tokenizer, name="tiny", slots=slots, prefill_tokens=budget)
        engine.load()
        record = Record()
        jobs: list[tuple[int, int]] = []
        for what, number, most in actions:
            if what == "submit":
                record.take(engine.submit(job(len(jobs), prompt_of(number), max_tokens=most)))
                jobs.append((number, most))
            elif what == "cancel":
                ticket = len(jobs) - 1 - number
                open_before = ticket >= 0 and ticket not in record.ends
                outputs = engine.cancel(ticket)
                assert len(outputs) == open_before
                record.take(outputs)
            else:
                for _ in range(number):
                    record.take(engine.step())
                    engine.validate()
            engine.validate()
        run(engine, record)
        assert set(record.ends) == set(range(len(jobs)))
        assert engine.stats().kv_use == 0
        for ticket, (number, most) in enumerate(jobs):
            want = expected(model, kind, number)[:most]
            done, got = record.done(ticket), record.ids.get(ticket, [])
            ended[done.reason.value] += 1
            if done.reason is FinishReason.CANCELLED:
                assert got == want[: len(got)]
            else:
                assert got == want
            assert done.completion_tokens == len(got)
            assert done.reason is FinishReason.CANCELLED or record.text[ticket] == tokenizer.decode(
                got, skip_special_tokens=True
            )

    schedule()
    assert ended["length"] > 200
    assert ended["cancelled"] > 40


# ------------------------------------------------------------------------------------------- sampled streams


def sampled(ticket: int, prompt: list[int], seed: int, most: int = 12) -> Job:
    return job(ticket, prompt, temperature=1.0, top_p=0.95, seed=seed, max_tokens=most, ignore_eos=True)


def test_a_sampled_stream_does_not_depend_on_its_company(make_engine: Make) -> None:
    alone = {}
    for number in range(6):
        engine = make_engine()
        engine.submit(sampled(0, prompt_of(number), seed=5))
        alone[number] = run(engine).ids[0]
    engine = make_engine(slots=4, prefill_tokens=128)
    for number in range(6):
        engine.submit(sampled(number, prompt_of(number), seed=5))
    assert run(engine).ids == alone
    engine.submit(sampled(0, prompt_of(0), seed=6))
    assert run(engine).ids[0] != alone[0], "the seed must matter"


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_sampled_stream_resumes_where_it_was_cut(cut: int, make_engine: Make) -> None:
    engine = make_engine()
    engine.submit(sampled(0, prompt_of(4), seed=9))
    whole = run(engine).ids[0]
    engine.submit(sampled(1, prompt_of(4) + whole[:cut], seed=9, most=12 - cut))
    assert run(engine).ids[1] == whole[cut:]


# ------------------------------------------------------------------------------------------- places in the batch


def test_beyond_the_slots_jobs_wait(make_engine: Make) -> None:
    engine = make_engine(slots=2, prefill_tokens=64)
    for ticket in range(5):
        engine.submit(job(ticket, prompt_of(2), max_tokens=4))
    assert (engine.stats().running, engine.stats().waiting) == (0, 5)
    record = Record()
    record.take(engine.step())
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    assert sorted(record.ids) == [0, 1], "first come, first served"
    run(engine, record)
    assert len(record.ends) == 5
    assert record.done(4).queue_s > record.done(0).queue_s


def test_slots_change_within_what_the_cache_was_made_for(make_engine: Make) -> None:
    engine = make_engine(slots=3, prefill_tokens=64)
    for ticket in range(6):
        engine.submit(job(ticket, prompt_of(2), max_tokens=4))
    engine.step()
    assert engine.resize(1) == 1
    record = run(engine, Record())
    assert len(record.ends) == 6
    for ticket in range(6, 12):
        engine.submit(job(ticket, prompt_of(2), max_tokens=4))
    engine.step()
    assert engine.stats().running == 1
    assert engine.resize(9) == 3
    engine.step()
    assert engine.stats().running == 3


def test_cancel_frees_the_row_at_once(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    engine.submit(job(1, prompt_of(2), max_tokens=50))
    engine.submit(job(2, prompt_of(3), max_tokens=50))
    engine.step()
    engine.step()
    (done,) = engine.cancel(1)
    assert (done.reason, done.completion_tokens) == (FinishReason.CANCELLED, 2)
    engine.validate()
    assert engine.stats().running == 0
    assert [output.ticket for output in engine.step()] == [2]
    assert engine.cancel(1) == []
    assert engine.cancel(99) == []


def test_cancel_while_waiting_and_in_the_middle_of_the_prefill(make_engine: Make) -> None:
    engine = make_engine(slots=2, prefill_tokens=16)
    engine.submit(job(1, prompt_of(9), max_tokens=5))  # 70 tokens: five steps
    engine.submit(job(2, prompt_of(2), max_tokens=5))
    assert engine.step() == []
    assert engine.stats().running == 1
    (waiting,) = engine.cancel(2)
    (partial,) = engine.cancel(1)
    assert waiting.completion_tokens == partial.completion_tokens == 0
    assert waiting.prefill_s == 0
    assert engine.next_step_in() is None
    engine.validate()


def test_a_long_prompt_does_not_stall_running_rows(make_engine: Make, tiny: Callable[[str], Any]) -> None:
    engine = make_engine(slots=3, prefill_tokens=16)
    engine.submit(job(1, prompt_of(2), max_tokens=14))
    engine.submit(job(2, prompt_of(3), max_tokens=2))
    record = Record()
    record.take(engine.step())
    engine.submit(job(3, prompt_of(9), max_tokens=4))
    for step in range(5):  # 70 tokens at 16 a step
        before = len(record.ids[1])
        record.take(engine.step())
        engine.validate()
        assert len(record.ids[1]) == before + 1, "the running row gets a token in every step"
        assert (3 in record.ids) == (step == 4)
    run(engine, record)
    for ticket, number, most in ((1, 2, 14), (2, 3, 2), (3, 9, 4)):
        assert record.ids[ticket] == expected(tiny("llama"), "llama", number)[:most]


def test_the_share_of_the_cache_in_use(make_engine: Make) -> None:
    engine = make_engine(slots=2, max_context=50, prefill_tokens=64)
    engine.submit(job(1, prompt_of(4), max_tokens=20))
    assert engine.stats().kv_use == 0
    engine.step()
    assert engine.stats().kv_use == pytest.approx(14 / 100)
    engine.step()
    assert engine.stats().kv_use == pytest.approx(15 / 100)


# ------------------------------------------------------------------------------------------------------- ends


def greedy_text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_stop_strings_cut_the_text(make_engine: Make, tiny: Callable[[str], Any], tokenizer: Any) -> None:
    ids = expected(tiny("llama"), "llama", 3)
    text = greedy_text(tokenizer, ids)
    start = next(at for at in range(3, len(text) - 2) if "\ufffd" not in text[at : at + 2])
    stop = text[start : start + 2]
    engine = make_engine()
    engine.submit(job(1, prompt_of(3), max_tokens=MOST, stop=("never there", stop)))
    record = run(engine)
    assert record.done(1).reason is FinishReason.STOP
    assert record.text[1] == text[: text.index(stop)]
    assert record.ids[1] == ids[: len(record.ids[1])]
    assert stop in greedy_text(tokenizer, record.ids[1])
    assert stop not in greedy_text(tokenizer, record.ids[1][:-1])


def test_a_stop_token_counts_and_has_no_text(make_engine: Make, tiny: Callable[[str], Any], tokenizer: Any) -> None:
    ids = expected(tiny("llama"), "llama", 3)
    at = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    engine = make_engine()
    engine.submit(job(1, prompt_of(3), max_tokens=MOST, stop_token_ids=(ids[at],)))
    record = run(engine)
    assert record.ids[1] == ids[: at + 1]
    assert record.text[1] == greedy_text(tokenizer, ids[:at])
    assert (record.done(1).reason, record.done(1).completion_tokens) == (FinishReason.STOP, at + 1)


def test_the_models_end_token_ends_unless_ignored(tokenizer: Any) -> None:
    model = make_model("llama")
    ids = reference(model, prompt_of(3), MOST)
    at = next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])
    model.generation_config.eos_token_id = [ids[at], 319]
    engine = TransformersEngine.from_loaded(model, tokenizer, name="tiny", slots=2)
    engine.load()
    engine.submit(job(1, prompt_of(3), max_tokens=MOST))
    engine.submit(job(2, prompt_of(3), max_tokens=MOST, ignore_eos=True))
    engine.submit(job(3, prompt_of(3), max_tokens=MOST, ignore_eos=True, stop_token_ids=(ids[1],)))
    record = run(engine)
    assert (record.ids[1], record.done(1).reason) == (ids[: at + 1], FinishReason.STOP)
    assert (record.ids[2], record.done(2).reason) == (ids, FinishReason.LENGTH)
    assert record.done(3).reason is FinishReason.STOP


def test_the_context_ends_a_completion(make_engine: Make) -> None:
    engine = make_engine(max_context=20)
    engine.submit(job(1, prompt_of(5), max_tokens=500, ignore_eos=True))  # 17 tokens
    engine.submit(job(2, [*prompt_of(5), 1, 2], max_tokens=500, ignore_eos=True))  # room for one
    record = run(engine)
    assert (len(record.ids[1]), record.done(1).reason) == (3, FinishReason.LENGTH)
    assert (len(record.ids[2]), record.done(2).reason) == (1, FinishReason.LENGTH)


def test_a_completion_fills_the_models_whole_context(make_engine: Make, tiny: Callable[[str], Any]) -> None:
    engine = make_engine("gpt2")  # learned positions: one too many would be an index error
    engine.submit(job(1, prompt_of(9), max_tokens=500, ignore_eos=True))
    assert run(engine).ids[1] == reference(tiny("gpt2"), prompt_of(9), CONTEXT - 70)


def test_the_times_add_up(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    for ticket in (1, 2):
        engine.submit(job(ticket, prompt_of(7), max_tokens=6))
    record = run(engine)
    for ticket in (1, 2):
        assert record.done(ticket).prefill_s > 0
        assert record.done(ticket).decode_s > 0
    first = record.done(1)
    assert record.done(2).queue_s >= first.prefill_s + first.decode_s


# ---------------------------------------------------------------------------------------------------- prompts


def refused(engine: TransformersEngine, generation: Generation, attachments: tuple[bytes, ...] = ()) -> str:
    (failed,) = engine.submit(Job(1, "tiny", generation, attachments))
    assert failed.code == "bad_request"
    assert not failed.retryable
    assert engine.next_step_in() is None
    return str(failed.message)


def test_what_cannot_run_is_refused_in_words(make_engine: Make, tiny: Callable[[str], Any]) -> None:
    engine = make_engine(max_context=30)
    assert "30 tokens; model 'tiny' has a context of 30" in refused(engine, Generation(token_ids=(5,) * 30))
    assert "token id 320 is unknown" in refused(engine, Generation(token_ids=(5, 320)))
    assert "no tokens" in refused(engine, Generation(prompt=""))
    assert "text only" in refused(engine, Generation(prompt="hi"), (b"image",))
    plain = TransformersEngine.from_loaded(tiny("llama"), make_tokenizer(chat=False), name="tiny", slots=1)
    assert plain.load() == [ModelInfo("tiny", CONTEXT, chat=False, resumes=True)]
    messages = ({"role": "user", "content": "hi"},)
    assert "no chat template" in refused(plain, Generation(messages=messages))


def test_a_template_that_rejects_is_a_bad_request(tiny: Callable[[str], Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    engine = TransformersEngine.from_loaded(tiny("llama"), tokenizer, name="tiny", slots=1)
    engine.load()
    assert "roles must alternate" in refused(engine, Generation(messages=({"role": "user", "content": "hi"},)))


def test_ids_that_the_tokenizer_has_and_the_model_has_not_are_refused(tiny: Callable[[str], Any]) -> None:
    # On cuda such an index would end the process's use of the device, for everybody.
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([*(f"one{i}more" for i in range(9)), "brandnew"])
    engine = TransformersEngine.from_loaded(tiny("llama"), tokenizer, name="tiny", slots=1)
    engine.load()
    assert max(tokenizer("brandnew").input_ids) >= VOCABULARY
    assert "is unknown" in refused(engine, Generation(prompt="a brandnew sea"))
    assert "is unknown" in refused(engine, Generation(messages=({"role": "user", "content": "brandnew"},)))


def test_text_that_has_no_encoding_is_a_bad_request(make_engine: Make) -> None:
    engine = make_engine()
    assert "tokenizer" in refused(engine, Generation(prompt="a\ud800"))
    assert "tokenizer" in refused(engine, Generation(messages=({"role": "user", "content": "\udfff"},)))


def test_megabytes_are_refused_by_their_head(make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    assert engine._serving is not None
    tokenise, seen = engine._serving.prompts._tokenise, []

    def counting(text: str, **how: Any) -> tuple[int, ...]:
        seen.append(len(text))
        return tokenise(text, **how)

    monkeypatch.setattr(engine._serving.prompts, "_tokenise", counting)
    assert f"more than {2 * CONTEXT} tokens" in refused(engine, Generation(prompt="sea " * 10_000))
    message = {"role": "user", "content": "sea " * 10_000}
    assert f"more than {2 * CONTEXT} tokens" in refused(engine, Generation(messages=(message,)))
    assert max(seen) <= CONTEXT * HEAD_CHARS
    blank = " " * (CONTEXT * HEAD_CHARS)
    assert f"a context of {CONTEXT}" in refused(engine, Generation(prompt=blank))  # at the border: in whole
    assert seen[-1] == len(blank)


def test_text_and_messages_become_the_tokenizers_ids(make_engine: Make, tokenizer: Any) -> None:
    engine = make_engine()
    greedy = Sampling(max_tokens=6, temperature=0.0)
    ids = tuple(tokenizer("the sea 🌊").input_ids)
    chat = tuple(tokenizer("<|user|>the sky\n<|bot|>").input_ids)
    engine.submit(Job(1, "tiny", Generation(prompt="the sea 🌊", sampling=greedy)))
    engine.submit(Job(2, "tiny", Generation(token_ids=ids, sampling=greedy)))
    engine.submit(Job(3, "tiny", Generation(messages=({"role": "user", "content": "the sky"},), sampling=greedy)))
    engine.submit(Job(4, "tiny", Generation(token_ids=chat, sampling=greedy)))
    record = run(engine)
    assert record.ids[1] == record.ids[2]
    assert record.ids[3] == record.ids[4]
    assert record.ids[1] != record.ids[3]
    assert record.done(3).prompt_tokens == len(chat)


def test_each_step_brings_one_token_a_row(make_engine: Make) -> None:
    engine = make_engine(slots=3, prefill_tokens=64)
    for ticket in range(3):
        engine.submit(job(ticket, prompt_of(ticket), max_tokens=5, ignore_eos=True))
    for _ in range(4):
        outputs = engine.step()
        assert sorted(output.ticket for output in outputs) == [0, 1, 2]
        assert all(isinstance(output, Tokens) and len(output.token_ids) == 1 for output in outputs)


# ------------------------------------------------------------------------------------------------------- prefixes


def test_a_beginning_that_was_found_is_not_overwritten_by_those_who_start_beside_it(
    make_engine: Make, tiny: Callable[[str], Any]
) -> None:
    engine = make_engine(prefill_tokens=64, prefix_tokens=64)
    known = [1 + (11 * step + step * step) % 300 for step in range(70)]
    fresh = [3 + (7 * step + 2 * step * step) % 300 for step in range(40)]
    engine.submit(job(0, known, max_tokens=1, ignore_eos=True))
    run(engine)
    engine.submit(job(1, fresh, max_tokens=6, ignore_eos=True))
    engine.submit(job(2, known, max_tokens=6, ignore_eos=True))
    record = run(engine)
    assert engine.stats().cached_tokens == 64, "the store was full of what the second one needs"
    assert record.ids[1] == reference(tiny("llama"), fresh, 6)
    assert record.ids[2] == reference(tiny("llama"), known, 6)
    engine.submit(job(3, known, max_tokens=6, ignore_eos=True))
    assert run(engine).ids[3] == reference(tiny("llama"), known, 6)


def test_a_beginning_that_several_share_is_computed_once(make_engine: Make, tiny: Callable[[str], Any]) -> None:
    engine = make_engine(slots=4, prefill_tokens=64)
    shared = [1 + (11 * step + step * step) % 300 for step in range(64)]
    prompts = [[*shared, 5 + number, 9] for number in range(4)]
    for ticket, prompt in enumerate(prompts):
        engine.submit(job(ticket, prompt, max_tokens=8, ignore_eos=True))
    record = run(engine)
    for ticket, prompt in enumerate(prompts):
        assert record.ids[ticket] == reference(tiny("llama"), prompt, 8)
    assert engine.stats().cached_tokens == 3 * 64
    assert engine.stats().prompt_tokens == 4 * 66


def test_rules_that_exclude_everything_are_the_users_mistake(make_engine: Make, tiny: Callable[[str], Any]) -> None:
    engine = make_engine()
    engine.submit(job(1, [5, 6, 7], max_tokens=6, choice=("a",), bad_words=("a",)))
    engine.submit(job(2, [5, 6, 7], max_tokens=6, ignore_eos=True))
    record = run(engine)
    failed = record.failed(1)
    assert (failed.code, failed.retryable) == ("bad_request", False)
    assert "the request's rules exclude all of them" in failed.message
    assert record.ids[2] == reference(tiny("llama"), [5, 6, 7], 6)
