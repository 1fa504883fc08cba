"""Brokers of a group: where a client's requests go, and that many clients spread evenly."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmq.client.events import Action, Close, Send
from tokenmq.client.sessions import GATHER_S
from tokenmq.protocol.messages import Draining, Goodbye, Query

from .story import ONE, TWO, Story, failure, heartbeats, history, key, requests

THREE = "tcp://127.0.0.1:3"
ALL = (ONE, TWO, THREE)


def drawing(*ranks: float) -> Callable[[], float]:
    """Return a source whose first numbers are these: what decides the order in which a client prefers brokers."""
    numbers = list(ranks)
    return lambda: numbers.pop(0) if numbers else 1.0


def opened(*ranks: float, group: str = "g") -> Story:
    """Return a client that has a session with each of three brokers, and has drawn these ranks for them."""
    story = Story(*ALL, random=drawing(*ranks))
    story.tick()
    for at in ALL:
        story.open(at, group)
    return story


def where(actions: list[Action]) -> list[str]:
    return [endpoint for endpoint, _ in requests(actions)]


def test_without_a_group_the_clients_order_counts() -> None:
    story = opened(0.9, 0.5, 0.1, group="")
    assert where(story.submit(1)) == [ONE]


def test_in_a_group_the_drawn_one_has_all_requests() -> None:
    story = opened(0.9, 0.1, 0.5)
    assert [where(story.submit(number)) for number in range(1, 6)] == [[TWO]] * 5


def test_who_is_first_in_the_clients_order_decides_which_group_it_is() -> None:
    story = Story(*ALL, random=drawing(0.5, 0.1, 0.9))
    story.tick()
    story.open(ONE, "g")
    story.open(TWO, "")
    story.open(THREE, "g")
    assert where(story.submit(1)) == [ONE]
    assert where(story.submit(2)) == [ONE]
    assert where(story.lose(ONE)) == [TWO, TWO], "the first that takes requests decides, and that one stands alone"


def test_a_broker_that_stands_alone_and_comes_first_is_preferred_to_a_group() -> None:
    story = Story(*ALL, random=drawing(0.9, 0.1, 0.5))
    story.tick()
    story.open(TWO, "g")
    story.open(THREE, "g")
    assert where(story.tick(GATHER_S)) == []
    assert where(story.submit(1)) == [TWO]
    story.open(ONE)
    assert where(story.submit(2)) == [ONE]


def test_who_loses_its_broker_goes_on_at_the_next_drawn_one_and_comes_back_with_new_requests_only() -> None:
    story = opened(0.9, 0.1, 0.5)
    assert where(story.submit(1)) == [TWO]
    story.started(at=TWO)
    story.chunk(0, 3, at=TWO)
    actions = story.lose(TWO)
    assert where(actions) == [THREE]
    assert [attempt.first_token for attempt in history(actions)] == [0, 3]
    heartbeats(story)
    assert where(story.reopen(TWO, "g")) == [], "what runs stays where it runs"
    assert where(story.submit(2)) == [TWO]


def test_a_broker_that_drains_gets_nothing_new() -> None:
    story = opened(0.9, 0.1, 0.5)
    story.submit(1)
    story.receive(Draining(), TWO)
    assert where(story.submit(2)) == [THREE]
    story.receive(Draining(), THREE)
    assert where(story.submit(3)) == [ONE]
    story.receive(Draining(), ONE)
    assert where(story.submit(4)) == []


def test_the_first_request_waits_for_the_drawn_one_and_not_for_who_answers_first() -> None:
    story = Story(*ALL, random=drawing(0.9, 0.1, 0.5))
    story.tick()
    story.submit(1)
    assert where(story.open(ONE, "g")) == []
    assert where(story.open(THREE, "g")) == []
    assert where(story.open(TWO, "g")) == [TWO]


def test_it_does_not_wait_for_those_that_were_drawn_later() -> None:
    story = Story(*ALL, random=drawing(0.9, 0.1, 0.5))
    story.tick()
    story.submit(1)
    assert where(story.open(TWO, "g")) == [TWO]


def test_one_that_does_not_answer_is_waited_for_a_moment_once() -> None:
    story = Story(*ALL, random=drawing(0.9, 0.1, 0.5))
    story.tick()
    story.submit(1)
    story.open(ONE, "g")
    story.open(THREE, "g")
    assert where(story.tick(0.9 * GATHER_S)) == []
    assert where(story.sleep()) == [THREE]
    assert where(story.submit(2)) == [THREE]
    assert where(story.open(TWO, "g")) == []
    assert where(story.submit(3)) == [TWO]


def test_one_that_refuses_is_not_waited_for() -> None:
    story = Story(*ALL, random=drawing(0.9, 0.1, 0.5))
    story.tick()
    story.submit(1)
    story.open(ONE, "g")
    story.open(THREE, "g")
    assert where(story.lose(TWO)) == [THREE]


def test_the_wait_is_no_longer_for_a_session_that_ends_meanwhile() -> None:
    """The connect timeout counts from the request, whatever sessions do."""
    story = Story(ONE, TWO, random=drawing(0.9, 0.1), connect_timeout_s=5.0)
    story.tick()
    story.submit(1)
    story.open(ONE, "g")
    story.lose(ONE)
    began, ends = story.now, list[Action]()
    while not ends:
        ends = [action for action in story.sleep() if getattr(action, "id", None) == key(1)]
    assert "no broker answered" in failure(ends).message
    assert story.now == pytest.approx(began + 5.0)


def test_closing_ends_the_wait_too() -> None:
    story = Story(ONE, TWO, random=drawing(0.9, 0.1))
    story.tick()
    story.submit(1)
    story.open(ONE, "g")
    assert failure(story.handle(Close())).code == "client_closed"
    assert story.core.next_deadline() is None


def test_questions_go_to_the_first_in_the_clients_order() -> None:
    story = opened(0.9, 0.1, 0.5)
    (send,) = story.ask()
    assert isinstance(send, Send)
    assert (send.endpoint, type(send.message)) == (ONE, Query)


@settings(deadline=None)  # how long it takes is the machine's affair
@given(seed=st.integers(0, 2**32), dead=st.sampled_from([None, *ALL]))
def test_many_clients_spread_evenly_also_over_what_is_left(seed: int, dead: str | None) -> None:
    source = random.Random(seed)
    homes: Counter[str] = Counter()
    for _ in range(120):
        story = Story(*ALL, random=source.random)
        story.tick()
        for at in ALL:
            story.open(at, "g")
        if dead is not None:
            story.receive(Goodbye(), dead)
        homes.update(where(story.submit(1)))
    expected = 120 / (3 if dead is None else 2)
    assert homes.total() == 120
    assert set(homes) == set(ALL) - {dead}
    assert all(abs(number - expected) < 36 for number in homes.values()), homes  # about seven standard deviations
