"""`make fuzz`: hostile input for so many seconds; prints what was tried, and ends with 1 where something broke.

The targets take turns. Each case is made from the seed, the target's name and its number alone, so a case that broke
something comes back with `--target NAME --seed S --case N` (on real ports as far as the machine's timing lets it).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from random import Random

from .broker import BrokerTarget
from .client import ClientTarget
from .ports import PortsTarget
from .target import Broken, Target
from .wire import Large, Messages, Payloads
from .worker import WorkerTarget

TARGETS: dict[str, Callable[[], Target]] = {
    "messages": Messages,
    "payloads": Payloads,
    "large": Large,
    "broker": BrokerTarget,
    "worker": WorkerTarget,
    "client": ClientTarget,
    "ports": PortsTarget,
}
#: What a case is, by target; "inputs" are messages, and on ports connections.
_UNITS = {"ports": "connections"}
#: A turn of one target: long enough that starting it is not what takes the time.
_TURN_S = 10.0
#: Messages of a reproducer that are shown in full.
_SHOWN = 5


class Tally:
    """What became of one target."""

    def __init__(self) -> None:
        self.cases = self.inputs = self.crashes = 0
        self.seconds = 0.0


def fuzz(name: str, target: Target, tally: Tally, seed: int, seconds: float) -> list[tuple[int, Broken]]:
    """Let a target go on for so long, one case at least; return the one that broke something, with what it was."""
    found: list[tuple[int, Broken]] = []
    began = time.monotonic()
    first = tally.cases
    while (tally.cases == first or time.monotonic() < began + seconds) and not found:
        number = tally.cases
        tally.cases += 1
        try:
            tally.inputs += target.case(random_of(seed, name, number))
        except Broken as broken:
            tally.crashes += 1
            found.append((number, broken))
    tally.seconds += time.monotonic() - began
    return found


def random_of(seed: int, name: str, number: int) -> Random:
    """Return the randomness of one case."""
    return Random(f"{seed} {name} {number}")


def tell(name: str, seed: int, number: int, broken: Broken) -> None:
    """Print what broke, and how to see it again."""
    print(f"\n{name}: BROKEN\n{broken.what}")
    for frames in broken.inputs[-_SHOWN:]:
        print("  input:", " | ".join(frame.hex() for frame in frames) or "(no frame)")
    print(f'  again: make fuzz FUZZ_ARGS="--target {name} --seed {seed} --case {number}"\n', flush=True)


def main() -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="make fuzz", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, all targets together")
    parser.add_argument("--seed", type=int, default=1, help="what all cases are made from")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one; repeatable")
    parser.add_argument("--case", type=int, help="only this case of one target")
    parser.add_argument("--keep-on", action="store_true", help="go on after something broke")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.case is not None and len(names) != 1:
        parser.error("--case goes with one --target")
    made: dict[str, Target] = {}
    tallies = {name: Tally() for name in names}
    began = time.monotonic()
    try:
        while True:
            for name in names:
                target = made[name] = made.get(name) or TARGETS[name]()
                tally = tallies[name]
                if options.case is not None:
                    tally.cases = options.case
                    found = fuzz(name, target, tally, options.seed, 0.0)
                    tally.cases = 1
                else:
                    left_s = began + options.seconds - time.monotonic()
                    turn_s = min(_TURN_S, max(left_s, 0.0), options.seconds / len(names))
                    found = fuzz(name, target, tally, options.seed, turn_s) if left_s > 0 else []
                for number, broken in found:
                    tell(name, options.seed, number, broken)
                    if name == "ports":
                        made.pop(name).close()  # what is left of it is of no use
            over = time.monotonic() >= began + options.seconds
            broke = any(tally.crashes for tally in tallies.values())
            if options.case is not None or over or (broke and not options.keep_on):
                break
    finally:
        for target in made.values():
            target.close()
    minutes = (time.monotonic() - began) / 60
    print(f"{'target':10} {'cases':>10} {'inputs':>12} {'minutes':>8} {'crashes':>8}")
    for name, tally in tallies.items():
        unit = _UNITS.get(name, "messages")
        print(f"{name:10} {tally.cases:10,} {tally.inputs:12,} {tally.seconds / 60:8.1f} {tally.crashes:8}  {unit}")
    crashes = sum(tally.crashes for tally in tallies.values())
    inputs = sum(tally.inputs for tally in tallies.values())
    print(f"seed {options.seed}: {inputs:,} inputs in {minutes:.1f} minutes, {crashes} crashes")
    return 1 if crashes else 0


if __name__ == "__main__":
    raise SystemExit(main())
