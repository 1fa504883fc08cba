"""Detokenising and stop strings: exact, whatever the chunks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tokenmq.worker.engines.stops import StopMatcher
from tokenmq.worker.engines.transformers.detokenize import MOST_HELD, Detokenizer
from tokenmq.worker.engines.transformers.textstream import TextStream

from .conftest import VOCABULARY, byte_chars, make_tokenizer

TOKENIZER = make_tokenizer()


def pieces(ids: list[int], tokenizer: Any = TOKENIZER) -> list[str]:
    stream = Detokenizer(tokenizer.backend_tokenizer)
    return [*(stream.feed(token) for token in ids), stream.flush()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=40))
def test_random_ids_give_the_full_decode(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_text_comes_back_in_whole_characters(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    got = pieces(ids)
    assert "".join(got) == TOKENIZER.decode(ids, skip_special_tokens=True)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got[:-1]), "half a character"


def test_emoji_and_chinese_are_whole() -> None:
    text = "a 🧜‍♀️ 世界 ñ 👩‍👩‍👧‍👦!"
    ids = TOKENIZER(text).input_ids
    assert len(ids) > len(text), "the text must be made of byte tokens"
    got = pieces(ids)
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)
    assert sum(map(bool, got)) > 8, "it must come as it goes, not at the end"


def test_half_a_character_comes_at_the_end() -> None:
    ids = TOKENIZER("ok🙈").input_ids[:-1]
    got = pieces(ids)
    assert got[-1] == "\ufffd"
    assert "".join(got) == "ok\ufffd"


def test_special_tokens_and_unknown_ids_have_no_text() -> None:
    ids = [*TOKENIZER("the").input_ids, 0, VOCABULARY + 50, *TOKENIZER(" sea").input_ids]
    assert "".join(pieces(ids)) == "the sea"


def test_byte_fallback_does_not_take_back_what_was_sent() -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁hi": 256, "<unk>": 257}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    stream = Detokenizer(backend)
    good = [*"中文".encode(), 256, *"🙂".encode()]
    assert "".join([*map(stream.feed, good), stream.flush()]) == "中文 hi🙂"
    stream = Detokenizer(backend)
    text = "".join([*map(stream.feed, [*"中".encode(), 0xFF, 256, 256]), stream.flush()])
    assert text.startswith("中")
    assert text.endswith("hi"), "it must go on after the broken byte"


@pytest.mark.parametrize("tail", ["", "é", "\ufffd!", "🙂 end"])
@pytest.mark.parametrize("broken", [b"\xa2", b"\xf0\x9f", b"\xe4\xb8"])
def test_a_long_run_of_broken_bytes_comes_as_it_goes(broken: bytes, tail: str) -> None:
    byte_ids = {byte: TOKENIZER.backend_tokenizer.token_to_id(char) for byte, char in byte_chars()}
    ids = [byte_ids[byte] for byte in b"ok" + broken * 300 + tail.encode()]
    got = pieces(ids)
    assert "".join(got) == TOKENIZER.decode(ids)
    held = most = 0
    for piece in got[:-1]:
        held = 0 if piece else held + 1
        most = max(most, held)
    assert most <= MOST_HELD + 4, "the work for a token must not grow with the run"


def test_special_tokens_do_not_reach_the_decoder() -> None:
    stream = Detokenizer(TOKENIZER.backend_tokenizer)
    assert [stream.feed(0) for _ in range(1000)] == [""] * 1000
    assert stream._token_ids == [], "a run of them would be decoded again with each"
    assert stream.feed(TOKENIZER("the").input_ids[0]) + stream.flush() == "the"


# ------------------------------------------------------------------------------------------------ stop strings


def plain_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """Return the text up to the stop that is complete first, by trying every end."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    chunks=st.lists(st.text("abc", max_size=6), max_size=10),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_the_first_complete_stop_wins_whatever_the_chunks(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    got = "".join(matcher.feed(chunk) for chunk in chunks) + matcher.flush()
    assert (got, matcher.stopped) == plain_stop("".join(chunks), stops)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=20), stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_nothing_is_held_that_cannot_become_a_stop(text: str, stops: list[str]) -> None:
    matcher, out = StopMatcher(stops), ""
    for end in range(1, len(text) + 1):
        out += matcher.feed(text[end - 1])
        if matcher.stopped:
            break
        held = text[len(out) : end]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
        longer = [n for n in range(len(held) + 1, end + 1) if any(s.startswith(text[end - n : end]) for s in stops)]
        assert not longer, "a possible stop was let out"


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("xabcd", ["abc", "b"], "xa"),  # b is complete first, although abc begins earlier
        ("xabc", ["bc", "abc"], "x"),  # complete at once: the earlier start
        ("aab", ["ab"], "a"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("no stop", ["stopping"], "no stop"),
    ],
)
def test_examples(text: str, stops: list[str], left: str) -> None:
    for chunks in ([text], list(text)):
        matcher = StopMatcher(stops)
        assert "".join(map(matcher.feed, chunks)) + matcher.flush() == left


def test_a_stop_within_the_flushed_tail_stops() -> None:
    ids = TOKENIZER("ok🙈").input_ids[:-1]
    stream = TextStream(TOKENIZER.backend_tokenizer, ["\ufffd"])
    out = "".join(map(stream.feed, ids))
    assert not stream.stopped
    assert out + stream.flush() == "ok"
    assert stream.stopped
