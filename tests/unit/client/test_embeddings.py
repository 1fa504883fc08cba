"""Vectors as they are returned, and the work of putting them together from several requests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest

from tokenmq.client import Embeddings, embedwork
from tokenmq.client.embedwork import AT_ONCE, REQUEST_CHARS, EmbedWork
from tokenmq.protocol import limits
from tokenmq.protocol.errors import BadRequestError, BusyError, ProtocolError
from tokenmq.protocol.messages import NO_ID, Chunk, Details, Usage


def packed(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}f", *numbers)


def embeddings(*vectors: tuple[float, ...]) -> Embeddings:
    dimension = len(vectors[0]) if vectors else 0
    return Embeddings(bytearray(b"".join(packed(*vector) for vector in vectors)), dimension, Usage(7, 0))


# What is returned


def test_it_is_a_sequence_of_vectors() -> None:
    found = embeddings((1.0, 2.0), (3.0, 4.0), (-0.5, 0.25))
    assert (len(found), found.dimension, found.usage.prompt_tokens) == (3, 2, 7)
    assert [list(vector) for vector in found] == found.tolist() == [[1.0, 2.0], [3.0, 4.0], [-0.5, 0.25]]
    assert list(found[-1]) == [-0.5, 0.25]
    assert [list(vector) for vector in found[1:]] == [[3.0, 4.0], [-0.5, 0.25]]
    assert found[0].format == "f"
    with pytest.raises(IndexError):
        found[3]
    assert repr(found) == "<Embeddings: 3 vectors of 2>"


def test_without_texts_it_is_empty() -> None:
    assert (len(embeddings()), list(embeddings()), embeddings().tolist()) == (0, [], [])


def test_numpy_sees_a_matrix_in_the_same_memory() -> None:
    numpy = pytest.importorskip("numpy")
    found = embeddings((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    matrix = numpy.asarray(found)
    assert (matrix.shape, matrix.dtype) == ((2, 3), numpy.float32)
    assert matrix.tolist() == found.tolist()
    matrix[1, 2] = 9.0
    assert found[1][2] == 9.0
    assert numpy.shares_memory(numpy.asarray(found[1]), matrix)


# The work


class FakeStream:
    """A request as EmbedWork sees it; `vectors` are what its reader gets."""

    def __init__(self, texts: Sequence[str], deadline_s: float | None) -> None:
        self.texts = list(texts)
        self.deadline_s = deadline_s
        self.cancelled = False
        self.usage = Usage(len(texts), 0)

    def chunks(self) -> list[Chunk]:
        """The vector of a text is its number, and its length; the last one comes first. A text `busy` fails."""
        if "busy" in self.texts:
            raise BusyError("it is full")
        vectors = [packed(float(text), len(text)) for text in self.texts]
        found = [Chunk(NO_ID, 1, n, 0, (), "", Details(vector=vector)) for n, vector in enumerate(vectors)]
        return found[::-1]

    def cancel(self) -> None:
        self.cancelled = True


class Begun:
    """All requests that were begun."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []

    def __call__(self, texts: Sequence[str], deadline_s: float | None) -> Any:
        self.streams.append(FakeStream(texts, deadline_s))
        return self.streams[-1]


def embed(texts: Sequence[str], begun: Begun, deadline_s: float | None = None) -> Embeddings:
    with EmbedWork[Any](texts, begun, deadline_s) as work:
        for stream in work:
            for chunk in stream.chunks():
                work.take(chunk)
    return work.result


def test_a_long_list_is_divided_and_comes_back_in_order() -> None:
    begun = Begun()
    texts = [str(number) for number in range(2 * limits.MAX_TEXTS + 3)]
    found = embed(texts, begun)
    assert [len(stream.texts) for stream in begun.streams] == [limits.MAX_TEXTS, limits.MAX_TEXTS, 3]
    assert found.tolist() == [[float(text), float(len(text))] for text in texts]
    assert found.usage == Usage(len(texts), 0)


def test_long_texts_are_divided_by_their_length() -> None:
    half = "1" * (REQUEST_CHARS // 2)
    begun = Begun()
    work = EmbedWork[Any]([half, half, "2", 3 * half, "3"], begun, None)
    assert len(list(work)) == 4
    assert [list(map(len, stream.texts)) for stream in begun.streams] == [
        [len(half), len(half)], [1], [3 * len(half)], [1],
    ]  # fmt: skip


def test_only_some_requests_are_under_way_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_TEXTS", 1)
    begun = Begun()
    ahead = []
    with EmbedWork[Any]([str(number) for number in range(20)], begun, None) as work:
        for number, _ in enumerate(work):
            ahead.append(len(begun.streams) - number)
    assert ahead == [AT_ONCE] * 13 + list(range(7, 0, -1))


def test_what_is_under_way_is_cancelled_when_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_TEXTS", 2)
    begun = Begun()
    with pytest.raises(BusyError, match=r"^texts\[2:4\]: it is full$"):
        embed(["1", "2", "busy", "4", "5"], begun)
    assert [stream.cancelled for stream in begun.streams] == [False, True, True]


def test_an_error_of_a_single_request_says_nothing_of_parts() -> None:
    with pytest.raises(BusyError, match=r"^it is full$"):
        embed(["busy"], Begun())


def test_the_deadline_is_that_of_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_TEXTS", 1)
    now = 100.0
    monkeypatch.setattr(embedwork.time, "monotonic", lambda: now)
    begun = Begun()
    with EmbedWork[Any]([str(number) for number in range(AT_ONCE + 2)], begun, 5.0) as work:
        for _ in work:
            now += 3.0
    assert [stream.deadline_s for stream in begun.streams] == [5.0] * AT_ONCE + [2.0, 0.0]
    begun = Begun()
    embed(["1", "2"], begun)
    assert [stream.deadline_s for stream in begun.streams] == [None, None]


def test_vectors_of_two_lengths_do_not_go_together() -> None:
    chunk = Chunk(NO_ID, 1, 0, 0, (), "", Details(vector=packed(1.0, 2.0)))
    longer = Chunk(NO_ID, 1, 1, 0, (), "", Details(vector=packed(1.0, 2.0, 3.0)))
    with EmbedWork[Any](["1", "2"], Begun(), None) as work:
        for _ in work:
            work.take(chunk)
            with pytest.raises(ProtocolError, match=r"of texts\[1\] has 3 numbers, those before it have 2"):
                work.take(longer)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ("text", "request.texts: expected a list of strings, got str"),
        (["a", ""], r"request.texts\[1\]: expected a string of 1 to"),
        (["a", 7], r"request.texts\[1\]: expected a string"),
    ],
)
def test_what_is_no_text_is_named_before_anything_leaves(texts: Any, told: str) -> None:
    begun = Begun()
    with pytest.raises(BadRequestError, match=told):
        embed(texts, begun)
    assert begun.streams == []
