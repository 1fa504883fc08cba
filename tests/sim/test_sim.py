"""A cluster of the real cores on a fake network and clock, under seeded schedules of work and faults.

After each step of each core `validate()` is called; the readers check every token. A schedule that fails prints its
seed; `pytest tests/sim --sim-seed SEED` runs it alone.
"""

from __future__ import annotations

import pytest

from tokenmq.client.events import Ending

from .world import World


def run(seed: int, *, faults: bool) -> World:
    world = World(seed, faults=faults)
    try:
        world.run()
    except BaseException:
        print(f"failed: --sim-seed {seed}, faults={faults}, at {world.clock.now - 1000:.3f} s")
        raise
    return world


def test_without_faults_every_stream_is_whole(sim_seeds: list[int]) -> None:
    for seed in sim_seeds[: max(1, len(sim_seeds) // 4)]:
        outcomes = run(seed, faults=False).outcomes()
        bad = [end for end in outcomes if not isinstance(end, Ending) and end.code not in _HARMLESS]
        assert not bad, f"--sim-seed {seed}: {bad[0]!r}"


#: The engine fails now and then, requests have deadlines, and the waiting room is small; before the first worker has
#: registered its model is not known.
_HARMLESS = {"engine_failed", "deadline", "busy", "model_not_found"}


def test_with_faults_every_stream_ends_once_and_nothing_leaks(sim_seeds: list[int]) -> None:
    ended = whole = 0
    codes: set[str] = set()
    for seed in sim_seeds:
        outcomes = run(seed, faults=True).outcomes()
        ended += len(outcomes)
        whole += sum(isinstance(end, Ending) and end.reason.value == "length" for end in outcomes)
        codes |= {end.code for end in outcomes if not isinstance(end, Ending)}
    assert ended > 0
    if len(sim_seeds) > 10:  # the schedules do what they are for: there is work, and there are faults
        assert whole > 10 * len(sim_seeds)
        assert ended > 2 * whole
        assert {"worker_lost", "broker_lost", "deadline"} <= codes


def test_a_schedule_is_repeatable() -> None:
    def story(seed: int) -> list[str]:
        world = run(seed, faults=True)
        # Request ids are drawn from the seed too, so that even the texts of errors agree.
        return [repr(end) for end in world.outcomes()]

    assert story(7) == story(7)


@pytest.fixture
def sim_seeds(request: pytest.FixtureRequest) -> list[int]:
    chosen = request.config.getoption("--sim-seed")
    first, number = (chosen, 1) if chosen is not None else (0, request.config.getoption("--sim-runs"))
    return list(range(first, first + number))
