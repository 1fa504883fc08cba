"""Prompts with images, token for token what `generate` gives: alone, in company, resumed, put back."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import EngineLoadError, Job
from tokenmq.worker.engines.transformers import vision as vision_module
from tokenmq.worker.engines.transformers.chat import ContentForms
from tokenmq.worker.engines.transformers.engine import TransformersEngine

from .conftest import Record, job, make_tokenizer, resumed, run
from .eyes import MARKS, generated, make_eyes, picture

KINDS = tuple(MARKS)
Make = Callable[..., TransformersEngine]
#: Of several shapes, which for Qwen2-VL are several numbers of tokens.
FILES = [picture(1, 50, 40), picture(2, 90, 40, "JPEG"), picture(3, 40, 120, "WEBP"), picture(4, 60, 60)]


@pytest.fixture(scope="module")
def tiny_eyes() -> Callable[[str], tuple[Any, Any]]:
    """Return a maker of tiny models with eyes that makes each once."""
    made: dict[str, tuple[Any, Any]] = {}

    def make(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            made[kind] = make_eyes(kind, make_tokenizer())
        return made[kind]

    return make


@pytest.fixture
def make_seeing(tiny_eyes: Callable[[str], tuple[Any, Any]]) -> Make:
    """Return a maker of loaded engines around a tiny model with eyes."""

    def make(kind: str = "llava", **settings: Any) -> TransformersEngine:
        model, processor = tiny_eyes(kind)
        settings = {"slots": 4, "prefill_tokens": 16, **settings}
        engine = TransformersEngine.from_loaded(
            model, processor.tokenizer, name="tiny", processor=processor, **settings
        )
        [info] = engine.load()
        assert info.images
        return engine

    return make


def seeing(ticket: int, text: str, files: Sequence[bytes], **sampling: Any) -> Job:
    """Return a greedy job with images."""
    return replace(job(ticket, text, **sampling), attachments=tuple(files))


def chat(ticket: int, messages: Sequence[dict[str, Any]], files: Sequence[bytes] = (), **sampling: Any) -> Job:
    """Return a greedy job of messages."""
    wishes = Sampling(**{"max_tokens": 8, "temperature": 0.0, **sampling})
    return Job(ticket, "tiny", Generation(messages=tuple(messages), sampling=wishes), tuple(files))


def refused(engine: TransformersEngine, wrong: Job) -> str:
    """Return why a job is refused, at once and for good."""
    record = Record()
    record.take(engine.submit(wrong))
    failed = record.failed(wrong.ticket)
    assert failed.code == "bad_request"
    assert not failed.retryable
    return failed.message


def prompts(kind: str) -> list[tuple[str, list[bytes]]]:
    """Return texts with their images; some have none, and one is longer than a step's prefill."""
    mark = MARKS[kind]
    return [
        (f"a {mark} b", FILES[:1]),
        ("the sea is wide", []),
        (f"{mark} {mark}two", FILES[1:3]),
        ("the sky is blue and the sea is wide and the sky is blue", []),
        (f"and then the sea is wide {mark} and the sky is blue, said the sea", FILES[3:]),
        (f"a {mark} b", FILES[1:2]),  # the same text as the first one: nothing but the image tells them apart
        ("x", []),
    ]


# ------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_texts_join_and_leave(
    kind: str, make_seeing: Make, tiny_eyes: Callable[[str], tuple[Any, Any]]
) -> None:
    engine = make_seeing(kind, slots=3, prefix_tokens=64)
    model, processor = tiny_eyes(kind)
    chance = random.Random(5)
    order = [chance.choice(prompts(kind)) for _ in range(14)]
    lengths = [chance.randrange(1, 24) for _ in order]
    record, left = Record(), list(enumerate(zip(order, lengths, strict=True)))
    cancelled = set()
    while left or engine.next_step_in() is not None:
        while left and chance.random() < 0.4:
            ticket, ((text, files), tokens) = left.pop(0)
            record.take(engine.submit(seeing(ticket, text, files, max_tokens=tokens)))
        record.take(engine.step())
        engine.validate()
        if chance.random() < 0.05:
            [gone] = chance.sample(range(len(order)), 1)
            outputs = engine.cancel(gone)
            cancelled |= {gone} if outputs else set()
            record.take(outputs)
    assert len(record.ends) == len(order)
    for ticket, ((text, files), tokens) in enumerate(zip(order, lengths, strict=True)):
        expected = generated(model, processor, text, files, tokens)
        got = record.ids.get(ticket, [])
        assert got == expected[: len(got)], (ticket, text)
        assert ticket in cancelled or got == expected, (ticket, text)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_matters(kind: str, tiny_eyes: Callable[[str], tuple[Any, Any]]) -> None:
    model, processor = tiny_eyes(kind)
    answers = {tuple(generated(model, processor, f"a {MARKS[kind]} b", [file], 12)) for file in FILES}
    assert len(answers) == len(FILES), "the tests here would not see a mistake"


@pytest.mark.parametrize("way", ["prefill", "replay"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_wherever_it_was_cut(
    kind: str, way: str, make_seeing: Make, tiny_eyes: Callable[[str], tuple[Any, Any]]
) -> None:
    engine = make_seeing(kind, resume=way)
    mark_id = tiny_eyes(kind)[1].tokenizer.convert_tokens_to_ids(MARKS[kind])
    # With a mark among the tokens of the prior, as a model of random weights may put out one: it is no image.
    whole = seeing(0, f"a {MARKS[kind]} b", FILES[1:2], max_tokens=16, ignore_eos=True)
    record = Record()
    record.take(engine.submit(whole))
    ids = run(engine, record).ids[0]
    assert len(ids) == 16
    for ticket, cut in enumerate(range(1, 16, 3), 1):
        record.take(engine.submit(resumed(ticket, whole, ids[:cut])))
    record.take(engine.submit(resumed(99, whole, [mark_id, *ids[:4]])))
    run(engine, record)
    for ticket, cut in enumerate(range(1, 16, 3), 1):
        assert record.ids[ticket] == ids[cut:]
        assert record.done(ticket).completion_tokens == 16
    assert record.done(99).completion_tokens == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_put_back_begins_anew(
    kind: str,
    make_seeing: Make,
    tiny_eyes: Callable[[str], tuple[Any, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_seeing(kind, slots=4, max_context=128, cache_tokens=320, prefix_tokens=0)
    model, processor = tiny_eyes(kind)
    jobs = [(f"a {MARKS[kind]} b", [file]) for file in FILES]
    record = Record()
    with caplog.at_level(logging.INFO, "tokenmq.worker"):
        for ticket, (text, files) in enumerate(jobs):
            record.take(engine.submit(seeing(ticket, text, files, max_tokens=100, ignore_eos=True)))
        run(engine, record)
    assert "put back" in caplog.text
    model.generation_config.eos_token_id = None
    for ticket, (text, files) in enumerate(jobs):
        assert record.ids[ticket] == generated(model, processor, text, files, 100)
    model.generation_config.eos_token_id = 0


# ----------------------------------------------------------------------------------------------------------- chat

IMAGE = {"type": "image"}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_images_stand_in_the_turns_of_a_chat(make_seeing: Make, tiny_eyes: Callable[[str], tuple[Any, Any]]) -> None:
    engine = make_seeing()
    model, processor = tiny_eyes("llava")
    messages = [
        {"role": "system", "content": "be brief"},  # the template takes parts only
        {"role": "user", "content": [text_part("one "), IMAGE, text_part(" and "), IMAGE]},
        {"role": "bot", "content": [text_part("the sea")]},
        {"role": "user", "content": "and <image>?"},  # as LLaVA's clients write it
    ]
    record = Record()
    record.take(engine.submit(chat(0, messages, FILES[:3])))
    run(engine, record)
    text = "<|system|>be brief<|user|>one <image> and <image><|bot|>the sea<|user|>and <image>?<|bot|>"
    assert record.ids[0] == generated(model, processor, text, FILES[:3], 8, special=False)


def test_a_template_that_takes_strings_gets_the_mark(
    make_seeing: Make, tiny_eyes: Callable[[str], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny_eyes("llava")
    monkeypatch.setattr(processor.tokenizer, "chat_template", make_tokenizer().chat_template)
    engine = make_seeing()
    record = Record()
    record.take(engine.submit(chat(0, [{"role": "user", "content": [IMAGE, text_part("what?")]}], FILES[:1])))
    run(engine, record)
    text = "<|user|><image>\nwhat?\n<|bot|>"
    assert record.ids[0] == generated(model, processor, text, FILES[:1], 8, special=False)


@pytest.mark.parametrize(
    ("template", "forms"),
    [
        (None, ContentForms(strings=True, parts=False)),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ContentForms(strings=True, parts=False)),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", ContentForms(strings=True, parts=False)),
        (
            "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
            ContentForms(strings=False, parts=True),
        ),
        (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{{ m.content[0].text }}{% endif %}{% endfor %}",
            ContentForms(strings=True, parts=True),
        ),
        ("{{ raise_exception('never') }}", ContentForms(strings=True, parts=False)),
    ],
)
def test_a_template_shows_what_it_takes(template: str | None, forms: ContentForms) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert ContentForms.of(tokenizer) == forms


# --------------------------------------------------------------------------------------------------------- errors


def test_marks_and_images_must_match(make_seeing: Make) -> None:
    engine = make_seeing()
    assert "2 places for images" in refused(engine, seeing(0, "<image> <image>", FILES[:1]))
    assert "1 image came with it" in refused(engine, seeing(1, "no mark", FILES[:1]))
    assert "1 place for images" in refused(engine, seeing(2, "<image> <image>"[:7], []))
    parts = {"role": "user", "content": [IMAGE, IMAGE]}
    assert "2 places" in refused(engine, chat(3, [parts], FILES[:3]))
    assert engine.next_step_in() is None


def test_what_cannot_be_combined_is_said(make_seeing: Make, make_engine: Make) -> None:
    engine = make_seeing()
    assert "cannot come with token ids" in refused(engine, replace(job(0, [5, 6]), attachments=(FILES[0],)))
    echo = seeing(1, "<image>", FILES[:1], logprobs=1)
    echo = replace(echo, generation=replace(echo.generation, echo=True))
    assert "leave echo or logprobs out" in refused(engine, echo)
    blind = make_engine()
    assert "takes text only, no images" in refused(blind, seeing(2, "<image>", FILES[:1]))
    assert "takes text only, no images" in refused(blind, chat(3, [{"role": "user", "content": [IMAGE]}]))


def test_a_bad_image_fails_its_request_alone(make_seeing: Make) -> None:
    engine = make_seeing()
    record = Record()
    record.take(engine.submit(seeing(0, "a <image> b", FILES[:1])))
    assert "image 1: " in refused(engine, seeing(1, "<image><image>", [FILES[0], FILES[1][:200]]))
    assert "65 images" in refused(engine, seeing(2, "<image>" * 65, FILES[:1] * 65))
    assert record.ids == {}
    assert run(engine, record).done(0).completion_tokens > 0


def test_what_the_model_cannot_number_is_refused(make_seeing: Make) -> None:
    engine = make_seeing("qwen2-vl")
    mark = MARKS["qwen2-vl"]
    # Its positions are told apart by what stands between two images; transformers raises where nothing does.
    assert "rejects the images" in refused(engine, seeing(0, f"{mark}{mark}", FILES[:2]))


def test_image_tokens_count_as_the_prompts(make_seeing: Make) -> None:
    engine = make_seeing(max_context=32)
    record = Record()
    record.take(engine.submit(seeing(0, "<image>" * 6, FILES[:1] * 6)))  # four tokens each
    assert run(engine, record).done(0).prompt_tokens == 24
    assert "the prompt has 32 tokens" in refused(engine, seeing(1, "<image>" * 8, FILES[:1] * 8))


def test_an_echo_has_the_text_as_it_was_given(make_seeing: Make) -> None:
    engine = make_seeing()
    whole = seeing(0, "a <image> b", FILES[:1])
    record = Record()
    record.take(engine.submit(replace(whole, generation=replace(whole.generation, echo=True))))
    assert run(engine, record).text[0].startswith("a <image> b")


# ----------------------------------------------------------------------------------------------------------- load


def test_a_folder_is_served_with_its_processor(tiny_eyes: Callable[[str], tuple[Any, Any]], tmp_path: Path) -> None:
    model, processor = tiny_eyes("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    engine = TransformersEngine(model=tmp_path, name="tiny", slots=2, device="cpu")
    [info] = engine.load()
    assert info.images
    assert info.chat
    record = Record()
    record.take(engine.submit(seeing(0, "a <image> b", FILES[:1], max_tokens=12)))
    assert run(engine, record).ids[0] == generated(model, processor, "a <image> b", FILES[:1], 12)


def test_a_folder_without_a_processor_is_refused(tiny_eyes: Callable[[str], tuple[Any, Any]], tmp_path: Path) -> None:
    model, processor = tiny_eyes("llava")
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EngineLoadError, match="processor"):
        TransformersEngine(model=tmp_path, name="tiny", device="cpu").load()


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
def test_a_processor_that_needs_torchvision_says_so(
    tiny_eyes: Callable[[str], tuple[Any, Any]], tmp_path: Path
) -> None:
    model, processor = tiny_eyes("qwen2-vl")
    model.save_pretrained(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor"}')
    with pytest.raises(EngineLoadError, match="package: torchvision"):
        TransformersEngine(model=tmp_path, name="tiny", device="cpu").load()


def test_wrong_positions_are_found_at_load(make_seeing: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    look = vision_module.Vision.look

    def unshifted(self: Any, *args: Any, **how: Any) -> Any:
        return replace(look(self, *args, **how), shift=0)

    monkeypatch.setattr(vision_module.Vision, "look", unshifted)
    with pytest.raises(EngineLoadError, match="other results behind an image"):
        make_seeing("qwen2-vl")


def test_a_context_without_room_for_an_image_is_refused(make_seeing: Make) -> None:
    with pytest.raises(EngineLoadError, match="tokens of one small image, and the context is 8"):
        make_seeing(max_context=8)
