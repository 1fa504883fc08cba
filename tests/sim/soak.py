"""Runs schedules on all cores until told to stop, or until one shows a violation: `make soak`.

SOAK_S=600 make soak, or SOAK_RUNS=100000 make soak; SOAK_SEED=N begins there and not somewhere.
"""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count, islice

from .kinds import kind_of
from .world import World

#: Schedules that a process runs at a time: about half a second of work.
_BATCH = 20
_REPORT_S = 10.0
#: A schedule takes a fraction of a second, a long one a few; one that takes this long has no end.
_ENDLESS_S = 120


def run(seeds: list[int]) -> tuple[Counter[str], tuple[int, str] | None]:
    """Run these schedules; return what happened in all, and the first violation: its seed and what it was."""
    sums: Counter[str] = Counter()
    for seed in seeds:
        world = World(seed)
        signal.setitimer(signal.ITIMER_VIRTUAL, _ENDLESS_S)  # CPU time: a soak that was stopped is not endless
        try:
            world.run()
        except Exception:
            when = world.clock.now - world.begin
            return sums, (seed, f"{traceback.format_exc()}schedule {world.kind.name!r}, at {when:.3f} s")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sums += world.tally()
        sums[f"schedules {world.kind.name}"] += 1
        sums["schedules"] += 1
    gc.collect()
    return sums, None


def report(sums: Counter[str], seconds: float) -> str:
    """Return one line about what has been done."""
    faults = sum(number for name, number in sums.items() if name.startswith("fault "))
    done, rate = sums["schedules"], 60 * sums["schedules"] / max(seconds, 1e-9)
    return (
        f"{seconds:6.0f} s: {done} schedules, {rate:.0f} a minute; {faults} faults, "
        f"{sums['streams']} streams, {sums['resumes']} resumes"
    )


def soak(first: int, runs: int | None, seconds: float | None, jobs: int) -> int:
    """Run schedules; return the exit code."""
    seeds: Iterator[int] = count(first) if runs is None else iter(range(first, first + runs))
    began = told = time.monotonic()
    sums: Counter[str] = Counter()
    violation: tuple[int, str] | None = None
    with ProcessPoolExecutor(jobs, initializer=_begin) as pool:
        pending: set[Future[tuple[Counter[str], tuple[int, str] | None]]] = set()
        try:
            while violation is None:
                if seconds is None or time.monotonic() < began + seconds:
                    while len(pending) < 2 * jobs and (batch := list(islice(seeds, _BATCH))):
                        pending.add(pool.submit(run, batch))
                if not pending:
                    break
                done, pending = wait(pending, timeout=_REPORT_S, return_when=FIRST_COMPLETED)
                for future in done:
                    happened, found = future.result()
                    sums += happened
                    violation = violation or found
                if time.monotonic() >= told + _REPORT_S:
                    told = time.monotonic()
                    print(report(sums, told - began), flush=True)
        except KeyboardInterrupt:
            print("stopped")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    print(report(sums, time.monotonic() - began))
    print(", ".join(f"{name} {number}" for name, number in sorted(sums.items())))
    if violation is not None:
        seed, what = violation
        print(f"{what}\nseed {seed} ({kind_of(seed).name}); alone: .venv/bin/pytest tests/sim --sim-seed {seed}")
        return 1
    print("no violation")
    return 0


def _endless(_number: int, _frame: object) -> None:
    raise AssertionError(f"no end after {_ENDLESS_S} s: something goes round and round")


def _begin() -> None:
    signal.signal(signal.SIGVTALRM, _endless)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it prints the sums
    gc.freeze()
    gc.disable()  # a batch's worlds fit into the memory; between batches they are collected


def main(arguments: list[str]) -> int:
    """Read the command line, and soak."""
    parser = argparse.ArgumentParser(prog="soak", description="Run simulated schedules until one shows a violation.")
    parser.add_argument("--seconds", type=float, help="for how long; without --runs, 60")
    parser.add_argument("--runs", type=int, help="how many schedules")
    parser.add_argument("--seed", type=int, help="of the first one; by default a random one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; by default one a core")
    options = parser.parse_args(arguments)
    seconds = 60.0 if options.seconds is None and options.runs is None else options.seconds
    first = secrets.randbelow(1_000_000_000) if options.seed is None else options.seed
    print(f"schedules from seed {first}, {options.jobs} at a time", flush=True)
    return soak(first, options.runs, seconds, options.jobs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
