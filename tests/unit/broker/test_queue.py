"""The waiting room as a story of who comes, who is served next, and who has to leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from tokenmq.broker import queue
from tokenmq.broker.queue import AGEING_S, WaitingRoom
from tokenmq.broker.requests import RequestRecord

from .stage import request_id


class Scene:
    """A room and its time; requests are numbered as they come, and each step is checked."""

    def __init__(self, limit: int = 100_000, **weights: float) -> None:
        #: What runs, by client.
        self.running: Counter[str] = Counter()
        self.room = WaitingRoom(limit, lambda share: weights.get(share, 1.0), lambda share: self.running[share])
        self.now = 0.0
        self.checked = True
        self._number = 0

    def record(
        self, share: str = "a", *, tokens: int = 100, priority: int = 5, size_bytes: int = 1, resumes: bool = False,
        avoid: str = "",
    ) -> RequestRecord:  # fmt: skip
        self._number += 1
        return RequestRecord(
            request_id(self._number), "m", 1, None, b"r" * 16, None, size_bytes, self.now, prior_tokens=int(resumes),
            share=share, priority=priority, prompt_tokens=0, expected_tokens=tokens,
            avoid=frozenset([avoid] if avoid else []),
        )  # fmt: skip

    def admit(
        self, share: str = "a", *, tokens: int = 100, priority: int = 5, size_bytes: int = 1, resumes: bool = False
    ) -> tuple[RequestRecord, list[RequestRecord] | None]:
        record = self.record(share, tokens=tokens, priority=priority, size_bytes=size_bytes, resumes=resumes)
        pushed_out = self.room.admit(record)
        self._check()
        return record, pushed_out

    def come(
        self, share: str = "a", *, tokens: int = 100, priority: int = 5, size_bytes: int = 1, resumes: bool = False
    ) -> RequestRecord:
        """Somebody comes, and there is room."""
        record, pushed_out = self.admit(
            share, tokens=tokens, priority=priority, size_bytes=size_bytes, resumes=resumes
        )  # fmt: skip
        assert pushed_out == []
        return record

    def many(self, number: int, share: str = "a", *, tokens: int = 100, priority: int = 5) -> list[RequestRecord]:
        return [self.come(share, tokens=tokens, priority=priority) for _ in range(number)]

    def leave(self, record: RequestRecord) -> None:
        self.room.remove(record)
        self._check()

    def next(self, servable: Callable[[RequestRecord], bool] = lambda record: True) -> RequestRecord | None:
        found = self.room.first(servable)
        return found and found[1]

    def serve(self, servable: Callable[[RequestRecord], bool] = lambda record: True) -> RequestRecord:
        record = self.next(servable)
        assert record is not None
        self.room.serve(record, self.now)
        self._check()
        return record

    def shares(self, number: int) -> str:
        """Whose requests are served next."""
        return "".join(self.serve().share for _ in range(number))

    def tokens(self, number: int) -> Counter[str]:
        """How many tokens the next requests cost, by share."""
        served: Counter[str] = Counter()
        for _ in range(number):
            record = self.serve()
            served[record.share] += record.cost_tokens
        return served

    def _check(self) -> None:
        if self.checked:
            self.room.validate()


@pytest.fixture
def scene() -> Scene:
    return Scene()


class TestOrderWithinAShare:
    def test_first_in_first_out_with_holes(self, scene: Scene) -> None:
        one, two, three, four = scene.many(4)
        scene.leave(two)
        assert list(scene.room) == [one, three, four]
        assert [scene.serve() for _ in range(3)] == [one, three, four]
        assert (len(scene.room), scene.room.bytes, scene.next()) == (0, 0, None)

    def test_attempts_of_one_request_are_told_apart(self, scene: Scene) -> None:
        first = scene.come()
        second = scene.record()
        second.id, second.attempt = first.id, 2
        scene.room.admit(second)
        scene.leave(first)
        assert list(scene.room) == [second]

    def test_finding_the_next_changes_nothing(self, scene: Scene) -> None:
        scene.many(3, "a")
        scene.many(3, "b")
        assert [scene.next() for _ in range(3)] == [scene.next()] * 3
        assert scene.shares(6) == "ababab"


class TestShares:
    def test_one_request_against_a_flood_is_served_next(self, scene: Scene) -> None:
        scene.checked = False
        scene.many(10_000, "f")
        assert scene.shares(100) == "f" * 100
        scene.come("b")
        assert scene.shares(3) == "bff"
        scene.room.validate()

    @pytest.mark.parametrize("tokens", [1, 100_000])
    def test_against_a_flood_the_size_of_the_one_request_does_not_matter(self, scene: Scene, tokens: int) -> None:
        scene.many(100, "f")
        assert scene.shares(10) == "f" * 10
        scene.come("b", tokens=tokens)
        assert scene.shares(1) == "b"

    def test_many_clients_take_turns(self, scene: Scene) -> None:
        for share in "abc":
            scene.many(3, share)
        assert scene.shares(9) == "abcabcabc"

    def test_long_and_short_requests_share_by_tokens(self, scene: Scene) -> None:
        scene.many(10, "l", tokens=1000)
        scene.many(200, "s", tokens=50)
        served = scene.tokens(105)
        assert abs(served["l"] - served["s"]) <= 1000 + 50
        assert served["l"] >= 4000

    def test_weights_share_tokens(self) -> None:
        scene = Scene(a=3.0)
        scene.many(300, "a", tokens=70)
        scene.many(300, "b", tokens=100)
        served = scene.tokens(200)
        assert abs(served["a"] / 3 - served["b"]) <= 70 / 3 + 100

    def test_who_stayed_away_has_saved_nothing_up(self, scene: Scene) -> None:
        scene.many(50, "a")
        scene.come("b")
        assert scene.shares(21) == "ab" + "a" * 19
        scene.many(10, "b")
        assert scene.shares(6) == "bababa"

    def test_of_two_whose_turn_it_is_the_one_with_less_running_goes_first(self, scene: Scene) -> None:
        scene.running["flooder"] = 1
        scene.many(50, "flooder")
        scene.come("other")
        assert scene.serve().share == "other"

    def test_who_has_just_had_a_long_one_does_not_come_first_again(self, scene: Scene) -> None:
        scene.come("b", tokens=1000)
        scene.many(20, "a")
        assert scene.shares(1) == "b"
        scene.come("b", tokens=1)
        assert scene.shares(12) == "a" * 10 + "ba"  # a tie: the other one has more running

    def test_what_is_cancelled_costs_nothing(self, scene: Scene) -> None:
        long, _ = scene.come("a", tokens=100_000), scene.come("a")
        scene.many(2, "b")
        scene.leave(long)
        assert scene.shares(3) == "abb"

    def test_clients_of_one_request_each_starve_nobody(self, scene: Scene) -> None:
        """Ten of them wait at any time; with the start tag served last as virtual time, `b` never came again."""
        scene.come("b", tokens=1000)
        for number in range(10):
            scene.come(f"once {number}")
        assert scene.shares(1) == "b"
        scene.come("b", tokens=1000)
        others = 0
        while scene.serve().share != "b":
            others += 1
            scene.come(f"once {10 + others}")
            assert others < 1000
        # Its part is one of eleven: 1000 tokens of its own stand for 10,000 of theirs, but for who was there before.
        assert 80 <= others <= 130

    def test_a_newcomer_is_put_back_by_no_more_than_its_own_request(self, scene: Scene) -> None:
        """Others have something good after the long one, but a newcomer does not wait until they had all of it."""
        scene.come("long", tokens=100_000)
        for number in range(9):
            scene.many(20, str(number))
        assert scene.shares(2) == "long0"
        scene.come("z")
        assert scene.shares(18) == "12345678" + "z" + "012345678"

    def test_a_flood_that_has_caught_up_is_no_further_ahead(self, scene: Scene) -> None:
        scene.come("long", tokens=1000)
        scene.many(30, "a")
        assert scene.shares(21) == "long" + "a" * 20
        scene.come("z", tokens=100_000)
        assert scene.shares(2) == "za"

    def test_clients_that_have_gone_are_forgotten(self, scene: Scene) -> None:
        for number in range(10):
            scene.come(f"once {number}")
        for number in range(2000):
            scene.serve()
            scene.come(f"once {10 + number}")
        (fair,) = scene.room._classes.values()
        assert len(fair.shares) <= 10 + 2 * 10

    def test_to_come_and_go_unserved_leaves_nothing_behind(self, scene: Scene) -> None:
        scene.many(2, "b")
        scene.come("a")
        assert scene.shares(2) == "ba"
        scene.many(2, "b")
        (fair,) = scene.room._classes.values()
        for number in range(100):
            scene.leave(scene.come(f"gone {number}"))
            scene.leave(scene.come("a"))
        assert set(fair.shares) == {"a", "b"}


class TestWhatCannotBeServed:
    def test_it_blocks_nobody(self, scene: Scene) -> None:
        records = {}
        for avoid, share, priority in [
            ("w1", "a", 5),
            ("w2", "a", 5),
            ("w3", "b", 5),
            ("w4", "b", 5),
            ("w5", "a", 1),
        ]:
            records[avoid] = scene.record(share, priority=priority, avoid=avoid)
            scene.room.admit(records[avoid])
        for avoid, record in records.items():
            assert scene.next(lambda other, avoid=avoid: avoid in other.avoid) is record
        assert scene.next(lambda record: False) is None

    def test_it_keeps_its_turn(self, scene: Scene) -> None:
        """It was passed over, so it comes first when it can, and its client pays for what was served in its place."""
        first, _ = scene.many(2, "a")
        scene.many(3, "b")
        assert [scene.serve(lambda record: record.share == "b").share for _ in range(2)] == ["b", "b"]
        assert scene.serve() is first
        assert scene.shares(2) == "ab"

    def test_newcomers_gain_nothing_by_it(self, scene: Scene) -> None:
        scene.many(20, "a")
        scene.many(20, "b")
        for _ in range(10):
            scene.serve(lambda record: record.share == "b")
        assert scene.shares(1) == "a"
        scene.come("c", tokens=10)
        assert scene.shares(10) == "a" * 8 + "ca"

    def test_a_later_one_of_its_client_may_go_before_it(self, scene: Scene) -> None:
        first, second = scene.record(avoid="w1"), scene.record()
        scene.room.admit(first)
        scene.room.admit(second)
        scene.come("b")
        assert scene.serve(lambda record: not record.avoid) is second
        assert scene.serve().share == "b"
        assert scene.serve() is first

    def test_an_old_one_lifts_no_later_one_of_its_client(self, scene: Scene) -> None:
        old = scene.record(priority=4, avoid="w1")
        scene.room.admit(old)
        scene.now = 100.0
        scene.come("a", priority=4)
        greater = scene.come("b")
        assert scene.next() is old
        assert scene.next(lambda record: not record.avoid) is greater

    def test_one_look_tells_of_all_that_avoid_the_same(self, scene: Scene) -> None:
        looks = []
        for _ in range(1000):
            scene.room.admit(scene.record(avoid="w1"))
        last = scene.come("a")
        assert scene.next(lambda record: bool(looks.append(record)) or not record.avoid) is last
        assert len(looks) == 2

    def test_a_client_that_avoids_in_ever_new_ways_is_not_heeded(self, scene: Scene) -> None:
        scene.checked = False
        for number in range(1000):
            scene.room.admit(scene.record(avoid=f"w{number}"))
        looks = []
        scene.next(lambda record: bool(looks.append(record)))
        assert len(looks) == 17
        scene.room.validate()

    def test_a_worker_that_has_begun_anew_is_avoided_no_longer(self, scene: Scene) -> None:
        first, second, third = scene.record(avoid="w1"), scene.record(avoid="w2"), scene.record()
        for record in (first, second, third):
            scene.room.admit(record)
        assert scene.next(lambda record: not record.avoid) is third
        scene.room.forgive("w1")
        assert scene.next(lambda record: not record.avoid) is first
        scene.room.validate()


class TestPriorities:
    def test_the_greatest_comes_first(self, scene: Scene) -> None:
        records = [scene.come(str(priority), priority=priority) for priority in (3, 9, 0, 5)]
        assert [scene.serve() for _ in range(4)] == [records[1], records[3], records[0], records[2]]

    def test_those_that_resume_come_before_all(self, scene: Scene) -> None:
        first = scene.come(priority=9)
        resumed = [scene.come(priority=0, resumes=True), scene.come(priority=9, resumes=True)]
        assert scene.room.resumed() == resumed
        assert [scene.serve() for _ in range(3)] == [*resumed, first]

    def test_who_waits_is_lifted(self, scene: Scene) -> None:
        low = scene.come("a", priority=3)
        scene.now = 2 * AGEING_S - 0.1
        high = scene.come("b", priority=5)
        assert scene.next() is high
        scene.leave(high)
        scene.now = 2 * AGEING_S + 0.1
        scene.come("b", priority=5)
        assert scene.next() is low

    def test_whoever_is_served_all_the_time_is_not(self, scene: Scene) -> None:
        """A flooder's requests of low priority are old, but it has just been served."""
        scene.many(100, "f", priority=3)
        for _ in range(50):
            scene.now += 1.0
            assert scene.shares(1) == "f"
        scene.come("b", priority=4)
        assert scene.shares(2) == "bf"

    def test_a_flood_of_great_priority_starves_nobody(self, scene: Scene) -> None:
        scene.come("a", priority=0)
        served = ""
        while "a" not in served:
            scene.come("f", priority=9)
            scene.now += 1.0
            served += scene.shares(1)
            assert len(served) <= 100
        assert len(served) >= 85

    def test_each_priority_is_shared_by_itself(self, scene: Scene) -> None:
        scene.many(3, "a", priority=7)
        scene.many(3, "a", priority=5)
        scene.many(3, "b", priority=5)
        assert scene.shares(9) == "aaaababab"

    def test_urgencies_of_rooms_compare(self, scene: Scene) -> None:
        other = Scene()
        scene.come(priority=5)
        other.now = AGEING_S
        for priority, urgency in [(5, AGEING_S - 50.0), (7, AGEING_S - 70.0)]:
            other.come(priority=priority)
            found = other.room.first(lambda record: True)
            assert found is not None
            assert found[0] == pytest.approx(urgency)
        mine = scene.room.first(lambda record: True)
        assert mine is not None
        assert mine[0] == pytest.approx(-50.0)


class TestAFullRoom:
    def test_a_newcomer_takes_the_place_of_who_has_most(self) -> None:
        scene = Scene(4)
        flood = scene.many(3, "f")
        scene.come("b")
        newcomer, pushed_out = scene.admit("c")
        assert pushed_out == [flood[2]]
        assert set(scene.room) == {*flood[:2], newcomer, *[each for each in scene.room if each.share == "b"]}
        assert len(scene.room) == 4

    def test_the_lowest_priority_leaves_first_and_the_latest_of_it(self) -> None:
        scene = Scene(4)
        scene.come("f", priority=5)
        low = [scene.come("f", priority=2), scene.come("f", priority=2)]
        scene.come("f", priority=9)
        assert scene.admit("b", priority=0)[1] == [low[1]]

    def test_the_flooder_itself_is_refused(self) -> None:
        scene = Scene(4)
        before = [*scene.many(3, "f"), scene.come("b")]
        assert scene.admit("f")[1] is None
        assert list(scene.room) == before

    def test_equal_parts_never_push_each_other_out(self) -> None:
        scene = Scene(3)
        for share in "abc":
            scene.come(share)
        assert scene.admit("d")[1] is None
        scene = Scene(5)
        scene.many(3, "a")
        scene.many(2, "b")
        assert scene.admit("b")[1] is None

    def test_parts_become_equal(self) -> None:
        scene = Scene(9)
        scene.many(9, "f")
        for _ in range(10):
            scene.admit("b")
        assert Counter(record.share for record in scene.room) == {"f": 5, "b": 4}

    def test_a_client_prefers_its_more_important_request(self) -> None:
        scene = Scene(3)
        low = [scene.come("a", priority=2), scene.come("a", priority=2)]
        scene.come("a", priority=4)
        assert scene.admit("a", priority=2)[1] is None
        assert scene.admit("a", priority=3)[1] == [low[1]]

    def test_one_that_is_served_makes_room(self) -> None:
        scene = Scene(1)
        scene.come("a")
        assert scene.admit("b")[1] is None
        scene.serve()
        scene.come("b")

    def test_nobody_waits_in_a_room_without_places(self) -> None:
        scene = Scene(0)
        assert scene.admit()[1] is None
        assert scene.admit(resumes=True)[1] is None

    def test_those_that_resume_have_places_of_their_own(self) -> None:
        scene = Scene(2)
        fresh = scene.many(2, "a")
        resumed = [scene.come("a", resumes=True) for _ in range(2)]
        assert scene.admit("a", resumes=True)[1] is None
        assert scene.admit("b", priority=9)[1] == [fresh[1]]
        assert scene.room.resumed() == resumed

    def test_a_flood_that_resumes_makes_place_for_others_that_do(self) -> None:
        scene = Scene(3)
        fresh = scene.many(3, "f")
        resumed = [scene.come("f", resumes=True) for _ in range(3)]
        assert scene.admit("b", resumes=True)[1] == [resumed[2]]
        assert set(fresh) <= set(scene.room)


class TestFullOfBytes:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(queue, "MAX_WAITING_BYTES", 100)

    def test_the_bound_is_exact(self, scene: Scene) -> None:
        scene.come("a", size_bytes=60)
        assert scene.admit("b", size_bytes=41)[1] is None
        scene.come("b", size_bytes=40)
        scene.come("c", size_bytes=0)
        assert scene.room.bytes == 100

    def test_who_has_most_bytes_makes_room_with_as_many_as_it_takes(self, scene: Scene) -> None:
        large = [scene.come("f", size_bytes=15) for _ in range(6)]
        many = [scene.come("m", size_bytes=1) for _ in range(10)]
        newcomer, pushed_out = scene.admit("b", size_bytes=20)
        assert pushed_out == [large[5], large[4]]
        assert set(scene.room) == {*large[:4], *many, newcomer}

    def test_who_need_not_leave_stays(self, scene: Scene) -> None:
        large = [scene.come("f", size_bytes=30) for _ in range(3)]
        for _ in range(10):
            scene.come("f", size_bytes=1)
        assert scene.admit("b", size_bytes=25)[1] == [large[2]]

    def test_nobody_is_left_with_less_than_the_newcomer_gets(self, scene: Scene) -> None:
        scene.come("f", size_bytes=50)
        scene.come("f", size_bytes=50)
        before = list(scene.room)
        assert scene.admit("b", size_bytes=51)[1] is None
        assert list(scene.room) == before
        assert scene.admit("b", size_bytes=50)[1] == [before[1]]

    def test_one_large_request_is_no_flood(self, scene: Scene) -> None:
        scene.come("a", size_bytes=100)
        assert scene.admit("b", size_bytes=1)[1] is None

    def test_a_client_prefers_its_more_important_request(self, scene: Scene) -> None:
        low = scene.come("a", size_bytes=60, priority=1)
        scene.come("a", size_bytes=40)
        assert scene.admit("a", size_bytes=50, priority=1)[1] is None
        assert scene.admit("a", size_bytes=50)[1] == [low]

    def test_number_and_bytes_at_once(self) -> None:
        scene = Scene(4)
        scene.come("f", size_bytes=0)
        large = [scene.come("g", size_bytes=45), scene.come("g", size_bytes=45)]
        last = scene.come("f", size_bytes=0)
        assert scene.admit("b", size_bytes=20)[1] == [large[1]]
        assert last in list(scene.room)

    def test_those_that_resume_have_bytes_of_their_own(self, scene: Scene) -> None:
        scene.come("a", size_bytes=100)
        scene.come("a", size_bytes=100, resumes=True)
        assert scene.admit("a", resumes=True)[1] is None


class TestWhenToComeBack:
    def test_it_follows_the_pace_of_departures(self, scene: Scene) -> None:
        assert scene.room.turn_away("a", scene.now) == 1.0
        scene.many(100)
        for number in range(50):
            scene.now = 0.25 * number
            scene.serve()
        assert scene.room.turn_away("a", scene.now) == pytest.approx(0.25, rel=0.05)

    def test_each_client_that_waits_has_its_turn_before(self, scene: Scene) -> None:
        scene.many(3, "a")
        scene.many(5, "b")
        scene.come("c", resumes=True)
        assert scene.room.turn_away("a", scene.now) == 3.0
        assert scene.room.turn_away("d", scene.now) == 4.0

    def test_those_who_are_turned_away_together_do_not_come_back_together(self, scene: Scene) -> None:
        scene.many(50, "a")
        for _ in range(40):
            scene.now += 0.5
            scene.serve()
        told = [scene.room.turn_away("a", scene.now) for _ in range(100)]
        assert told[:3] == pytest.approx([0.5, 1.0, 1.5], rel=0.1)
        assert told == sorted(told)
        assert told[-1] == 30.0
        scene.now += 100.0
        assert scene.room.turn_away("a", scene.now) == pytest.approx(0.5, rel=0.1)

    def test_it_is_bounded(self) -> None:
        fast, slow = Scene(), Scene()
        for scene, pause_s in ((fast, 0.0), (slow, 1000.0)):
            scene.many(60)
            for _ in range(50):
                scene.now += pause_s
                scene.serve()
        assert fast.room.turn_away("a", fast.now) == 0.05
        assert slow.room.turn_away("a", slow.now) == 30.0

    @pytest.mark.parametrize("cancelled", [False, True])
    def test_idle_time_does_not_count(self, scene: Scene, cancelled: bool) -> None:
        first, second = scene.many(2)
        scene.room.serve(first, 0.0)
        if cancelled:
            scene.leave(second)
        else:
            scene.room.serve(second, 1.0)
        for number in range(5):  # hours apart, each served at once
            scene.now = 3600.0 * number
            scene.come()
            scene.serve()
        assert scene.room.turn_away("a", scene.now) == 1.0


class TestSummary:
    def test_of_an_empty_room(self, scene: Scene) -> None:
        assert scene.room.summary(5.0) == {
            "waiting": 0, "bytes": 0, "clients": 0, "oldest_s": 0.0, "rate_per_s": None, "by_priority": {},
            "resumed": 0,
        }  # fmt: skip

    def test_of_a_room_in_use(self, scene: Scene) -> None:
        scene.come("a", priority=7)
        scene.now = 1.0
        scene.come("b", size_bytes=10)
        scene.come("a", resumes=True, size_bytes=100)
        scene.come("c")
        scene.now = 2.0
        scene.serve()
        scene.now = 3.0
        scene.serve()
        assert scene.room.summary(11.0) == {
            "waiting": 2, "bytes": 11, "clients": 2, "oldest_s": 10.0, "rate_per_s": 1.0, "by_priority": {"5": 2},
            "resumed": 0,
        }  # fmt: skip

    def test_slots_that_become_free_at_once_have_a_rate(self, scene: Scene) -> None:
        scene.checked = False
        scene.many(5000)
        for _ in range(4999):
            scene.serve()
        assert scene.room.summary(0.0)["rate_per_s"] == pytest.approx(1e6)

    def test_it_tells_the_resumed_apart(self, scene: Scene) -> None:
        scene.come(resumes=True, priority=3)
        scene.come(priority=3)
        summary = scene.room.summary(0.0)
        assert (summary["by_priority"], summary["resumed"], summary["waiting"]) == ({"3": 1}, 1, 2)


class TestValidate:
    def test_it_notices_what_is_changed_behind_its_back(self, scene: Scene) -> None:
        record = scene.come("a")
        scene.come("b")
        record.size_bytes = 7
        with pytest.raises(AssertionError, match="bytes do not add up"):
            scene.room.validate()
        record.size_bytes, record.share = 1, "b"
        with pytest.raises(AssertionError, match="another's share"):
            scene.room.validate()
        record.share, record.priority = "a", 6
        with pytest.raises(AssertionError, match="another class"):
            scene.room.validate()
