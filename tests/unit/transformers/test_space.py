"""The shape of the cache, and the index of kept beginnings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tokenmq.worker.engines.transformers.prefix import PrefixIndex, chain
from tokenmq.worker.engines.transformers.space import VECTOR, Space


@given(st.integers(8, 5000), st.integers(1, 64), st.integers(0, 50_000), st.data())
def test_a_stride_is_wide_enough_and_not_much_wider(context: int, rows: int, more: int, data: st.DataObject) -> None:
    space = Space(context + more, rows, context)
    tokens = data.draw(st.integers(1, context))
    stride = space.stride_for(tokens)
    assert tokens <= stride < context + VECTOR
    assert stride % VECTOR == 0 or stride == context or stride < VECTOR
    least = min(context + VECTOR, space.capacity // rows)
    assert stride <= max(least, 64, tokens * 3 / 2)
    assert 1 <= space.rows_at(stride) <= rows
    assert space.rows_at(stride) * stride <= space.capacity
    assert space.room(1, tokens) is not None, "a row that is alone always has room"


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 400))
def test_the_stride_stays_as_long_as_it_will_do(rows: int, before: int, tokens: int) -> None:
    space = Space(1600, 16, 400)
    space.stride = space.stride_for(min(400, before * 25))
    found = space.room(rows, tokens)
    if tokens <= space.stride and rows <= space.rows_at(space.stride):
        assert found == space.stride
    elif found is None:
        assert rows > space.rows_at(space.stride_for(tokens))
    else:
        assert found >= tokens
        assert rows <= space.rows_at(found)


def test_keys_tell_beginnings_apart() -> None:
    tokens = list(range(12))
    assert len(chain(tokens, 4)) == 3
    assert len(chain(tokens[:11], 4)) == 2
    assert chain(tokens[:8], 4) == chain(tokens, 4)[:2]
    assert chain([99, *tokens[1:]], 4)[1] != chain(tokens, 4)[1], "the same block behind another beginning"
    assert chain(tokens, 4, b"other") != chain(tokens, 4)


class Kept(RuleBasedStateMachine):
    """The index against what it must mean: a block that is found has the tokens of its key."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(6, 2)
        self.filled: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 1), max_size=20))
    def keep(self, tokens: list[int]) -> None:
        keys = chain(tokens, 2)
        fresh = self.index.keep(keys)
        for number, block in fresh:
            self.filled[block] = keys[number]
        assert len(self.index.find(keys)) == min(len(keys), 6), "what was kept just now is there"

    @rule(tokens=st.lists(st.integers(0, 1), max_size=20))
    def find(self, tokens: list[int]) -> None:
        keys = chain(tokens, 2)
        assert [self.filled[block] for block in self.index.find(keys)] == keys[: len(self.index.find(keys))]

    @rule(tokens=st.lists(st.integers(0, 1), max_size=8))
    def forget(self, tokens: list[int]) -> None:
        keys = chain(tokens, 2)
        self.index.forget(keys)
        assert self.index.find(keys) == []

    @rule()
    def clear(self) -> None:
        self.index.clear()
        assert len(self.index) == 0

    @invariant()
    def bounded(self) -> None:
        assert len(self.index) <= 6


TestKept = Kept.TestCase


def test_what_was_used_least_recently_leaves_first_and_ends_before_beginnings() -> None:
    index = PrefixIndex(4, 1)
    index.keep(chain([1, 2, 3], 1))
    index.keep(chain([9], 1))
    index.find(chain([1, 2], 1))
    index.keep(chain([8], 1))  # takes the place of the 3 behind 1, 2
    assert len(index.find(chain([1, 2, 3], 1))) == 2
    index.keep(chain([7], 1))  # takes that of the 9, which nobody has asked for
    assert index.find(chain([9], 1)) == []
    for token in (6, 5):  # in the place of the 8 and the 2
        index.keep(chain([token], 1))
    assert len(index.find(chain([1, 2, 3], 1))) == 1, "the end leaves before the beginning"


def test_what_is_held_is_not_given_to_others() -> None:
    index = PrefixIndex(2, 1)
    first = chain([1, 2], 1)
    index.keep(first)
    index.hold(first[:1])
    assert index.keep(chain([7, 8, 9], 1)) == [(0, 1)], "only the block that nobody holds"
    assert len(index.find(first)) == 1
    index.release()
    assert len(index.keep(chain([5, 6], 1))) == 2
    assert index.find(first) == []
