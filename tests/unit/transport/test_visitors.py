"""Which connections a worker's door keeps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenmq.transport.visitors import GREETING_S, ConnectionId, Visitors


def conn(number: int) -> ConnectionId:
    return number, 1000 + number


def watched(most: int = 4) -> Visitors:
    visitors = Visitors(most)
    visitors.overdue(0.0)
    visitors.overdue(1.0)  # the first look of all is late
    return visitors


def test_the_oldest_stranger_makes_room() -> None:
    visitors = watched(2)
    assert visitors.arrived(conn(1), 1.0) is None
    visitors.attached(conn(1), b"p1")
    assert visitors.arrived(conn(2), 2.0) is None
    assert visitors.arrived(conn(3), 3.0) == conn(2)
    visitors.attached(conn(3), b"p3")
    assert visitors.arrived(conn(4), 4.0) == conn(4)
    visitors.left(conn(1))
    assert not visitors.knows(b"p1")
    assert visitors.arrived(conn(5), 5.0) is None


def test_strangers_go_in_time_and_nobody_else() -> None:
    visitors = watched()
    visitors.arrived(conn(1), 1.0)
    visitors.arrived(conn(2), 1.5)
    visitors.attached(conn(2), b"p2")
    for second in range(2, 6):
        assert visitors.overdue(float(second)) == []
    assert visitors.overdue(1.0 + GREETING_S) == [conn(1)]
    assert conn(1) not in visitors
    for second in range(7, 30):
        assert visitors.overdue(float(second)) == []
    assert conn(2) in visitors


def test_who_was_asleep_reads_before_it_cuts() -> None:
    visitors = watched()
    visitors.arrived(conn(1), 1.0)
    visitors.arrived(conn(2), 1.0)
    visitors.arrived(conn(3), 60.0)  # seen just before the look
    assert visitors.overdue(60.0) == []
    visitors.attached(conn(1), b"p1")
    assert visitors.overdue(61.0) == [conn(2)]


def test_a_loop_that_is_always_late_cuts_too() -> None:
    visitors = watched()
    visitors.arrived(conn(1), 1.0)
    assert [visitors.overdue(60.0 * minute) for minute in (1, 2)] == [[], [conn(1)]]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["come", "attach", "leave", "look"]), st.integers(0, 7), st.floats(0.0, 3.0))),
)
def test_it_holds_whatever_comes(most: int, steps: list[tuple[str, int, float]]) -> None:
    visitors, now = Visitors(most), 0.0
    for what, number, later in steps:
        now += later
        if what == "come" and conn(number) not in visitors:
            odd = visitors.arrived(conn(number), now)
            assert odd is None or odd not in visitors
        elif what == "attach" and conn(number) in visitors:
            visitors.attached(conn(number), b"p%d" % (number % 5))
        elif what == "leave":
            visitors.left(conn(number))
        elif what == "look":
            assert not any(connection in visitors for connection in visitors.overdue(now))
        visitors.validate()
