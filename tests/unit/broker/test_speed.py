"""How fast a worker is taken to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tokenmq.broker.speed import Speed
from tokenmq.protocol.messages import Finish, FinishReason, Timings, Usage

from .stage import Stage, WorkerPeer, kinds, request_id, worker_session

#: Speeds are taken in steps.
STEP = 0.06


class TestSpeed:
    def test_before_the_first_measurement_it_is_what_is_usual(self) -> None:
        assert Speed().at(0.0, None, tried=False) == 1.0
        assert Speed().at(0.0, 40.0, tried=True) == pytest.approx(40.0, rel=STEP)

    def test_who_was_never_tried_is_promising(self) -> None:
        assert Speed().at(0.0, 40.0, tried=False) == pytest.approx(80.0, rel=STEP)

    def test_small_differences_are_none(self) -> None:
        speeds = set()
        for number in range(100):
            speed = Speed()
            speed.measure(29_900 + number, 1000.0, 0.0)
            speeds.add(speed.at(0.0, None, tried=True))
        assert len(speeds) == 1

    def test_the_first_measurement_counts_whole(self) -> None:
        speed = Speed()
        speed.measure(200, 4.0, 10.0)
        assert speed.measured == 50.0
        assert speed.at(10.0, None, tried=True) == speed.at(10.0, 20.0, tried=True) == pytest.approx(50.0, rel=STEP)

    def test_it_follows_a_change_in_a_dozen_requests(self) -> None:
        speed = Speed()
        speed.measure(200, 4.0, 0.0)
        for _ in range(12):
            speed.measure(100, 4.0, 0.0)
        assert speed.measured == pytest.approx(25.0, rel=0.2)

    def test_long_streams_count_more_than_short_ones(self) -> None:
        speed = Speed()
        speed.measure(1000, 10.0, 0.0)
        speed.measure(1, 10.0, 0.0)
        mixed = speed.measured
        speed = Speed()
        speed.measure(1000, 10.0, 0.0)
        speed.measure(1, 0.01, 0.0)
        assert mixed is not None
        assert speed.measured is not None
        assert mixed < 90 < speed.measured

    @pytest.mark.parametrize(("tokens", "seconds"), [(0, 1.0), (-1, 1.0), (5, 0.0)])
    def test_what_has_no_pace_is_no_measurement(self, tokens: int, seconds: float) -> None:
        speed = Speed()
        speed.measure(tokens, seconds, 0.0)
        assert speed.measured is None

    @pytest.mark.parametrize(("tokens", "seconds"), [(19, 5e-324), (19, 1e-300), (2**63 - 1, 1.0), (1, 1e9)])
    def test_what_nobody_can_be_is_cut_to_what_ready_may_tell(self, tokens: int, seconds: float) -> None:
        speed = Speed()
        speed.measure(tokens, seconds, 0.0)
        assert speed.measured is not None
        assert 1e-6 <= speed.measured <= 1e6 * (1 + 1e-9)

    def test_an_old_measurement_gives_way_to_what_is_usual(self) -> None:
        speed = Speed()
        speed.measure(10, 1.0, 0.0)
        assert speed.at(0.0, 40.0, tried=True) == pytest.approx(10.0, rel=STEP)
        assert speed.at(60.0, 40.0, tried=True) == pytest.approx(25.0, rel=STEP)
        assert speed.at(3600.0, 40.0, tried=True) == pytest.approx(40.0, rel=STEP)


def finishes(worker: WorkerPeer, number: int, tokens: int, seconds: float) -> None:
    usage, timings = Usage(1, tokens), Timings(decode_s=seconds)
    worker.says(Finish(request_id(number), 1, FinishReason.LENGTH, usage, timings, ""))


class TestRegistry:
    def test_finished_requests_tell_the_speed(self, stage: Stage) -> None:
        worker = stage.worker("w1", speed=None)
        stage.client().asks(1)
        finishes(worker, 1, 101, 2.0)
        assert worker_session(stage, "w1").speed == pytest.approx(50.0, rel=STEP)

    def test_what_is_told_or_set_overrides_what_is_measured(self, stage: Stage) -> None:
        worker = stage.worker("w1", speed=7.0)
        stage.client().asks(1)
        finishes(worker, 1, 101, 2.0)
        session = worker_session(stage, "w1")
        assert session.speed == 7.0
        stage.core.exchange.set_speed(session, 3.0, stage.now)
        assert session.speed == 3.0
        worker.ready = replace(worker.ready, speed=None)
        worker.says(worker.ready)
        assert session.speed == 3.0
        stage.core.exchange.set_speed(session, None, stage.now)
        assert session.speed == pytest.approx(50.0, rel=STEP)

    def test_a_worker_that_was_not_measured_is_taken_for_an_average_one(self, stage: Stage) -> None:
        client = stage.client()
        slow, fast = stage.worker("slow", speed=None), stage.worker("fast", speed=None)
        client.asks(1)
        client.asks(2)
        finishes(slow, 1, 101, 10.0)
        finishes(fast, 2, 101, 2.0)
        stage.worker("new", speed=None)
        assert worker_session(stage, "new").speed == pytest.approx(60.0, rel=STEP)
        assert kinds(client.asks(3))[0] == ("new", "REQUEST")  # it is tried first
        assert worker_session(stage, "new").speed == pytest.approx(30.0, rel=STEP)
        assert kinds(client.asks(4))[0] == ("fast", "REQUEST")
        assert kinds(client.asks(5))[0] == ("slow", "REQUEST")

    def test_the_fast_one_is_found_and_equal_ones_take_turns(self, stage: Stage) -> None:
        pace = {"slow": 30.0, "middle": 60.0, "fast": 90.0, "fast too": 90.4}
        workers = {name: stage.worker(name, speed=None) for name in pace}
        client, taken = stage.client(), []
        for number in range(40):
            [(name, _)] = kinds(client.asks(number))
            finishes(workers[name], number, 101, 100 / pace[name])
            taken.append(name)
        assert set(taken[:4]) == set(pace)
        assert taken.count("slow") == taken.count("middle") == 1
        assert taken.count("fast") == pytest.approx(19, abs=1)

    def test_an_impossible_pace_stops_nobody(self, stage: Stage) -> None:
        """Infinite or vanishing speeds would end the broker: a cost is something over a speed."""
        client = stage.client()
        liar, other = stage.worker("w1", "m", speed=None), stage.worker("w2", "m", speed=None)
        for number in range(1, 9, 2):
            client.asks(number)
            client.asks(number + 1)
            held = {record.id for record in worker_session(stage, "w1").in_flight.values()}
            for id in (number, number + 1):
                if request_id(id) in held:
                    finishes(liar, id, 20, 1e-300)
                else:
                    finishes(other, id, 20, 1.0)
        assert worker_session(stage, "w2").speed == pytest.approx(19.0, rel=STEP)
        stage.passes(1e5, listening=False)
        liar.vanishes()
        assert kinds(client.asks(9)) == [("w2", "REQUEST")]

    def test_tokens_of_earlier_attempts_are_not_the_workers(self, stage: Stage) -> None:
        infos = tuple(replace(info, resumes=True) for info in stage.worker("w0").ready.models)
        stage.core.registry.by_name["w0"].draining = True
        worker = stage.worker("w1", speed=None, infos=infos)
        stage.client().asks(1, prior_tokens=100)
        finishes(worker, 1, 201, 2.0)
        assert worker_session(stage, "w1").speed == pytest.approx(50.0, rel=STEP)

    def test_a_worker_that_comes_back_keeps_its_measurement(self, stage: Stage) -> None:
        worker = stage.worker("w1", speed=None)
        stage.client().asks(1)
        finishes(worker, 1, 101, 2.0)
        stage.registers(stage.stranger_worker("w1"), incarnation=2, speed=None)
        assert worker_session(stage, "w1").speed == pytest.approx(50.0, rel=STEP)

    def test_a_set_speed_and_a_hold_outlive_the_session(self, stage: Stage) -> None:
        worker = stage.worker("w1")
        exchange, session = stage.core.exchange, worker_session(stage, "w1")
        exchange.set_speed(session, 3.0, stage.now)
        exchange.hold(session, True, stage.now)
        worker.vanishes()
        stage.worker("w1")
        assert worker_session(stage, "w1").speed == 3.0
        assert worker_session(stage, "w1").held
        assert stage.client().asks(1) == []
