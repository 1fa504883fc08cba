"""The pace at which a client submits to a broker with limits: alone, and as the client's core keeps it."""

from __future__ import annotations

import random
from collections import deque

import pytest

from tokenmq.client.events import Garbled
from tokenmq.client.gate import Gate
from tokenmq.client.line import Line
from tokenmq.protocol.errors import ProtocolError, RateLimitedError
from tokenmq.protocol.messages import Request

from .story import ONE, TWO, Story, ending, failure, heartbeats, key, patience, request, requests


def test_a_gate_that_nobody_has_shut_lets_everything_pass() -> None:
    gate = Gate()
    for _ in range(1000):
        assert gate.open
        gate.passed(1.0)
    assert gate.free
    assert gate.next_deadline() is None


def test_a_refusal_shuts_it_for_what_the_broker_asks() -> None:
    gate = Gate()
    gate.refused(2.0, 9.9, 10.0)
    assert not gate.open
    assert gate.next_deadline() == 12.0
    assert not gate.tick(11.9)
    assert gate.tick(12.0)
    assert gate.open
    gate.passed(12.0)
    assert not gate.open, "then one by one"


def test_of_many_refusals_the_longest_pause_counts_and_the_rate_falls_once() -> None:
    gate = Gate()
    for pause_s in (0.1, 3.0, 0.2):
        gate.refused(pause_s, 9.9, 10.0)
    assert gate.next_deadline() == 13.0


def test_a_gate_that_is_not_refused_is_free_again_after_a_while() -> None:
    gate, now = Gate(), 10.0
    gate.refused(1.0, 9.9, now)
    for _ in range(1000):
        now += 0.05
        gate.tick(now)
        if gate.open:
            gate.passed(now)
    assert gate.free


class Limit:
    """A broker's token bucket."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.level, self.at = rate, burst, burst, 0.0

    def take(self, now: float) -> float | None:
        """Take a request; return the seconds to wait where it is refused."""
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level >= 1.0:
            self.level -= 1.0
            return None
        return (1.0 - self.level) / self.rate


@pytest.mark.parametrize("ends", [False, True], ids=["long ones", "short ones"])
@pytest.mark.parametrize(("rate", "count"), [(5.0, 100), (100.0, 3_000), (1_000.0, 10_000)])
def test_a_burst_takes_the_time_that_the_limit_gives_it_and_few_refusals(rate: float, count: int, ends: bool) -> None:
    """What is under way at the first refusal is refused, since nobody knew better; what follows is hardly ever.

    Short ones end meanwhile, and each of them lets another one try.
    """
    limit, gate, now, delay = Limit(rate, rate), Gate(), 0.0, 0.002
    a_millisecond, waiting, flying, refused = 20, count, deque[tuple[float, float]](), 0
    while waiting or flying:
        now += 0.001
        while flying and flying[0][0] <= now:
            _, left_at = flying.popleft()
            pause_s = limit.take(now)
            if pause_s is not None:
                gate.refused(pause_s, left_at, now)
                refused += 1
                waiting += 1
            elif ends:
                gate.freed(now)
        gate.tick(now)
        for _ in range(min(a_millisecond, waiting)):
            if gate.open:
                gate.passed(now)
                flying.append((now + delay, now))
                waiting -= 1
        assert now < 10 * count / rate + 60
    assert refused < 4 * a_millisecond + (0.6 if ends else 0.15) * count
    assert now < 1.7 * count / rate + 5.0


@pytest.mark.parametrize(("places", "count"), [(1, 12), (1, 100), (8, 400), (64, 2_000)])
def test_a_limit_of_open_requests_costs_hardly_any_time(places: int, count: int) -> None:
    """What ends makes room for the next one, and no pause that the broker asks for keeps that one away."""
    draw, gate, now, takes, delay = random.Random(7), Gate(), 0.0, 0.05, 0.002
    waiting, refused, done = count, 0, 0
    flying, running = deque[tuple[float, float]](), list[float]()
    while done < count:
        now += 0.001
        for end in [end for end in running if end <= now]:
            running.remove(end)
            done += 1
            gate.freed(now)
        while flying and flying[0][0] <= now:
            _, left_at = flying.popleft()
            if len(running) < places:
                running.append(now + takes * (0.5 + draw.random()))
            else:
                gate.refused(1.0, left_at, now)
                refused += 1
                waiting += 1
        gate.tick(now)
        while gate.open and waiting:
            gate.passed(now)
            flying.append((now + delay, now))
            waiting -= 1
        assert now < 600
    assert now < 1.5 * takes * count / places + 0.5
    assert refused < count + 2 * now + 10, "the first burst, and a few"


def test_each_request_that_ends_lets_one_pass_early() -> None:
    gate = Gate()
    gate.refused(1.0, 9.9, 10.0)
    gate.freed(10.1)
    assert gate.next_deadline() != 11.0
    assert gate.tick(10.1)
    gate.passed(10.1)
    assert not gate.open
    assert gate.next_deadline() == pytest.approx(11.0, abs=0.2)


def test_who_passed_early_and_was_refused_keeps_others_from_it_longer_each_time() -> None:
    gate, now, pauses = Gate(), 10.0, []
    gate.refused(60.0, 9.9, now)
    for _ in range(5):
        gate.freed(now)
        assert gate.tick(now)
        gate.passed(now)
        gate.refused(60.0, now, now + 0.002)
        gate.freed(now + 0.003)
        due = gate.next_deadline()
        assert due is not None
        pauses.append(due - now)
        now = due
    assert pauses == sorted(pauses)
    assert pauses[-1] > 10 * pauses[0]
    assert pauses[-1] < 60.0


def test_a_line_keeps_to_turns_whatever_happens() -> None:
    draw, line, alive = random.Random(7), Line(), dict[int, bytes]()
    for _ in range(20_000):
        action = draw.random()
        if action < 0.5 or not alive:
            turn = line.draw()
            alive[turn] = turn.to_bytes(4, "big")
            line.join(turn, alive[turn])
        elif action < 0.6:
            assert line.pop() == alive.pop(min(alive))
        else:
            line.leave(alive.pop(draw.choice(list(alive))))
        assert len(line) == len(alive)
    assert len(line._heap) <= 2 * len(line) + 2048, "who has left is swept out"


# In the core


def drive(story: Story, limit: Limit, seconds: float) -> tuple[list[bytes], int]:
    """Let a broker with a limit answer what leaves; return what it took, in order, and how often it refused."""
    taken: list[bytes] = []
    refused, end = 0, story.now + seconds
    todo = requests(story.tick())
    while story.now < end:
        story.now += 0.005
        heartbeats(story)
        arrived, todo = todo, []
        for _, message in arrived:
            pause_s = limit.take(story.now)
            if pause_s is None:
                taken.append(message.id)
                number = int.from_bytes(message.id, "big")
                todo += requests(story.started(number=number, attempt=message.envelope.attempt))
                todo += requests(story.finish(0, number=number, attempt=message.envelope.attempt))
            else:
                refused += 1
                number, attempt = int.from_bytes(message.id, "big"), message.envelope.attempt
                todo += requests(story.error("rate_limited", number=number, attempt=attempt, retry_after_s=pause_s))
        todo += requests(story.tick())
    return taken, refused


def test_a_burst_is_spread_and_each_request_is_taken_once() -> None:
    story = Story(connect_timeout_s=1.0, recovery_timeout_s=2.0)
    story.open_sessions()
    limit = Limit(50.0, 10.0)
    limit.at = story.now
    first = [requests(story.submit(number))[0] for number in range(1, 201)]
    refused = 0
    for _, message in first[:10]:
        assert limit.take(story.now) is None
        story.finish(0, number=int.from_bytes(message.id, "big"))
    for _, message in first[10:]:
        pause_s = limit.take(story.now)
        assert pause_s is not None
        assert not requests(
            story.error("rate_limited", number=int.from_bytes(message.id, "big"), retry_after_s=pause_s)
        )
    taken, refused = drive(story, limit, 12.0)
    assert sorted(taken) == [key(number) for number in range(11, 201)], "all, longer than both timeouts after"
    assert refused < 60
    assert taken[:5] == [key(number) for number in range(11, 16)], "in the order of submission"


def test_new_requests_wait_behind_those_that_were_refused() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1)
    story.error("rate_limited", retry_after_s=1.0)
    assert requests(story.submit(2)) == []
    assert requests(story.tick(0.9)) == []
    assert request(story.tick(0.2)).id == key(1)


def test_a_worker_has_no_word_in_what_its_broker_takes() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1)
    story.error("rate_limited", retry_after_s=60.0, worker="w1")  # the broker has added the name
    assert request(story.submit(2)).id == key(2)


@pytest.mark.parametrize("how", ["finish", "error", "cancel"])
def test_what_ends_lets_the_next_in_line_go(how: str) -> None:
    story = Story()
    story.open_sessions()
    for number in (1, 2, 3):
        story.submit(number)
    story.started(number=1)
    for number in (2, 3):
        story.error("rate_limited", number=number, retry_after_s=60.0)
    assert requests(story.tick(0.5)) == []
    if how == "finish":
        story.finish(0)
    elif how == "error":
        story.error("internal", retryable=False, worker="w1")
    else:
        story.cancel(1)
    assert request(story.tick()).id == key(2)
    assert requests(story.tick(0.5)) == [], "one for one"


def test_who_waits_behind_ones_own_long_answers_is_not_given_up() -> None:
    story = Story(connect_timeout_s=1.0, recovery_timeout_s=10.0, first_token_timeout_s=None)
    story.open_sessions()
    story.submit(1)
    story.started(number=1)
    story.submit(2)
    story.error("rate_limited", number=2, retry_after_s=60.0)
    assert requests(patience(story, 50.0)) == []
    assert story.finish(0, number=1)
    assert request(story.tick()).id == key(2)
    story.error("rate_limited", number=2, attempt=2, retry_after_s=60.0)
    assert isinstance(failure(patience(story, 11.0)), RateLimitedError), "with none there, it is"


def test_another_broker_takes_requests_meanwhile() -> None:
    story = Story(ONE, TWO)
    story.open_sessions()
    story.submit(1)
    ((endpoint, again),) = requests(story.error("rate_limited", retry_after_s=1.0))
    assert (endpoint, again.envelope.attempt) == (TWO, 2)
    assert requests(story.submit(2))[0][0] == TWO
    patience(story, 1.5)
    assert requests(story.submit(3))[0][0] == ONE


def test_who_wants_no_recovery_hears_of_the_limit() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1, resume=False)
    error = failure(story.error("rate_limited", retry_after_s=1.5))
    assert isinstance(error, RateLimitedError)
    assert error.retry_after_s == 1.5


def test_a_deadline_that_passes_in_line_is_told() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1, deadline_s=2.0)
    story.error("rate_limited", retry_after_s=60.0)
    assert failure(patience(story, 2.5)).code == "deadline"


def test_a_cancelled_request_leaves_the_line() -> None:
    story = Story()
    story.open_sessions()
    for number in (1, 2):
        story.submit(number)
    for number in (1, 2):
        story.error("rate_limited", number=number, retry_after_s=1.0)
    story.cancel(1)
    assert request(patience(story, 1.5)).id == key(2)


def test_questions_do_not_wait_for_requests() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1)
    story.error("rate_limited", retry_after_s=10.0)
    assert len(story.ask()) == 1


def test_no_hedge_is_made_at_a_broker_that_has_enough() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1, hedge_after_s=0.5)
    story.started()
    story.submit(2)
    story.error("rate_limited", number=2, retry_after_s=30.0)
    assert not any(isinstance(message, Request) for _, message in requests(patience(story, 1.0)))


# What nobody can read


def test_chunks_that_cannot_be_read_disturb_nobody_else() -> None:
    story = Story()
    story.open_sessions()
    story.submit(1)
    story.submit(2)
    for number in (1, 2):
        story.started(number=number)
    story.chunk(0, number=1)
    for _ in range(5):
        assert story.handle(Garbled(ONE, ProtocolError("CHUNKS: not valid msgpack"))) == []
    assert story.core.dropped["garbled"] == 5
    assert [log.event for log in story.logs].count("chunks_garbled") == 1
    patience(story, 11.0)
    story.handle(Garbled(ONE, ProtocolError("CHUNKS: not valid msgpack")))
    assert [log.fields["so_far"] for log in story.logs if log.event == "chunks_garbled"] == [1, 6]
    again = request(story.chunk(3, number=1))  # its own are missing: it goes on elsewhere
    assert (again.id, again.envelope.attempt, again.envelope.prior_tokens) == (key(1), 2, 1)
    story.chunk(0, number=2)
    assert ending(story.finish(1, number=2)), "and the other one has noticed nothing"
    heartbeats(story)
    assert story.core.sessions[ONE].open, "they were counted"
