"""Which texts go together: the budget, lengths, turns and priorities."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tokenmq.worker.engines.transformers.embedding_queue import (
    MAX_ROWS,
    SHORT_TOKENS,
    EmbeddingQueue,
    Text,
    TextsJob,
)


def texts_job(ticket: int, lengths: Sequence[int], priority: int = 5) -> TextsJob:
    return TextsJob(ticket, priority, tuple((7,) * length for length in lengths))


def finish(queue: EmbeddingQueue, texts: list[Text]) -> list[tuple[int, int]]:
    """Do a step's texts; return (ticket, length) of each."""
    for text in texts:
        text.job.left -= 1
        if not text.job.left:
            queue.remove(text.job)
    queue.validate()
    return [(text.job.ticket, len(text.ids)) for text in texts]


def step(queue: EmbeddingQueue) -> list[tuple[int, int]]:
    return finish(queue, queue.take())


def test_texts_of_like_length_go_together_whoever_sent_them() -> None:
    queue = EmbeddingQueue(8, 400)
    queue.add(texts_job(1, [100, 20, 90]))
    queue.add(texts_job(2, [95, 18]))
    assert sorted(step(queue)) == [(1, 90), (1, 100), (2, 95)]
    assert sorted(step(queue)) == [(1, 20), (2, 18)]
    assert step(queue) == []


def test_a_text_longer_than_the_budget_goes_alone() -> None:
    queue = EmbeddingQueue(8, 50)
    queue.add(texts_job(1, [90, 40]))
    assert step(queue) == [(1, 90)]
    assert step(queue) == [(1, 40)]


def test_turns_go_round_and_a_newcomer_does_not_overtake_for_ever() -> None:
    queue = EmbeddingQueue(8, 40)
    queue.add(texts_job(1, [40, 40, 40]))
    queue.add(texts_job(2, [40, 40, 40]))
    assert [step(queue)[0][0] for _ in range(2)] == [1, 2]
    served = []
    for ticket in range(10, 16):  # one more comes before each step
        queue.add(texts_job(ticket, [40]))
        served.append(step(queue)[0][0])
    assert served.count(1) == 2


def test_priority_first_and_what_is_left_of_the_budget_to_others() -> None:
    queue = EmbeddingQueue(8, 120)
    queue.add(texts_job(1, [40, 40, 40], priority=1))
    queue.add(texts_job(2, [40, 40], priority=9))
    assert sorted(step(queue)) == [(1, 40), (2, 40), (2, 40)]
    queue.add(texts_job(3, [30, 18], priority=9))
    assert sorted(step(queue)) == [(3, 18), (3, 30)], "texts nearer in length, but less urgent, went first"


def test_no_more_jobs_run_than_slots_and_the_most_urgent_first() -> None:
    queue = EmbeddingQueue(1, 10)
    for ticket, priority in [(1, 5), (2, 5), (3, 9)]:
        queue.add(texts_job(ticket, [10, 10], priority))
    assert [step(queue) for _ in range(6)] == [[(ticket, 10)] for ticket in (3, 3, 1, 1, 2, 2)]


def test_slots_that_are_taken_away_let_the_running_ones_end() -> None:
    queue = EmbeddingQueue(3, 10)
    for ticket in (1, 2, 3, 4):
        queue.add(texts_job(ticket, [10, 10]))
    step(queue)
    queue.slots = 1
    order = [step(queue)[0][0] for _ in range(7)]
    assert order[-2:] == [4, 4]
    assert sorted(order[:5]) == [1, 2, 2, 3, 3]


def test_rows_are_bounded() -> None:
    queue = EmbeddingQueue(8, 1_000_000)
    queue.add(texts_job(1, [3] * (MAX_ROWS + 5)))
    assert len(step(queue)) == MAX_ROWS
    assert len(step(queue)) == 5


@given(
    jobs=st.lists(st.tuples(st.lists(st.integers(1, 200), min_size=1, max_size=20), st.integers(0, 9)), max_size=8),
    slots=st.integers(1, 4),
    budget=st.integers(1, 600),
)
def test_every_text_once_within_budget_and_padding(
    jobs: list[tuple[list[int], int]], slots: int, budget: int
) -> None:
    queue = EmbeddingQueue(slots, budget)
    for ticket, (lengths, priority) in enumerate(jobs):
        queue.add(texts_job(ticket, lengths, priority))
    done = []
    while queue.running or queue.waiting:
        texts = queue.take()
        lengths_of_step = [len(text.ids) for text in texts]
        assert texts
        assert len(texts) == 1 or len(texts) * max(lengths_of_step) <= budget
        assert max(lengths_of_step) <= max(SHORT_TOKENS, 2 * min(lengths_of_step))
        assert len({text.job.ticket for text in texts}) <= slots
        most = max(job.priority for job in queue.running)
        assert any(text.job.priority == most for text in texts)
        done += [(text.job.ticket, text.number) for text in texts]
        finish(queue, texts)
    assert sorted(done) == [
        (ticket, number) for ticket, (lengths, _) in enumerate(jobs) for number in range(len(lengths))
    ]
