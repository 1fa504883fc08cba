"""A cluster of the real cores on a fake network and clock, under seeded schedules of work and faults.

After each step of each core `validate()` is called; the readers check every token. A schedule that fails prints its
seed; `pytest tests/sim --sim-seed SEED` runs it alone. `make soak` runs them for as long as it is let.
"""

from __future__ import annotations

from collections import Counter
from itertools import count, islice

import pytest

from .kinds import KINDS, Kind, kind_of
from .soak import run
from .world import World


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_stream_is_whole_or_ends_for_a_reason_and_nothing_leaks(
    kind: Kind, request: pytest.FixtureRequest
) -> None:
    chosen: int | None = request.config.getoption("--sim-seed")
    if chosen is not None:
        if kind_of(chosen) is not kind:
            pytest.skip("the seed stands for another kind of schedule")
        World(chosen).run()
        return
    runs = max(2, round(request.config.getoption("--sim-runs") * kind.share / 100))
    sums, violation = run(list(islice((seed for seed in count() if kind_of(seed) is kind), runs)))
    assert violation is None, f"{violation[1]}\nalone: pytest tests/sim --sim-seed {violation[0]}"
    _check_worth(kind, runs, sums)


def _check_worth(kind: Kind, runs: int, sums: Counter[str]) -> None:
    """Check that the schedules do what they are for: there is work, there are faults, and these do harm."""
    whole = sums["length"] + sums["stop"]
    faults = sum(number for name, number in sums.items() if name.startswith("fault "))
    assert whole > 5 * runs
    assert sums["attempts direct"] > runs or kind.tree or runs < 5
    if kind.faults or kind.rolling:
        assert faults > 2 * runs
    if kind.faults:
        assert sums["resumes"] > runs
        assert sums["suspensions"] or runs < 50
    if kind.tree:
        assert sums["attempts below"] > 2 * runs


def test_a_schedule_is_repeatable() -> None:
    def story(seed: int) -> list[str]:
        world = World(seed)
        world.run()
        # Request ids are drawn from the seed too, so that even the texts of errors agree.
        return [repr((reading.outcome, reading.ended_at, reading.tokens)) for reading in world.readings()]

    seed = next(seed for seed in count() if kind_of(seed).name == "heals")
    assert story(seed) == story(seed)
