"""The kinds of schedules: how much work, which faults, and how much patience the clients have."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

#: Faults that end by themselves, or that others repair, within `Kind.heal_s` and the time in which they are noticed.
FAULTS = (
    "kill_worker",
    "drain_worker",
    "order_drain",
    "replace_worker",
    "hang_engine",
    "fail_engine",
    "fail_job",
    "sicken_engine",
    "hold_worker",
    "undrain_worker",
    "kill_client",
    "close_client",
    "kill_broker",
    "drain_broker",
    "pause_worker",
    "pause_broker",
    "pause_client",
    "cut_link",
    "silence_link",
    "half_silence_link",
    "hold_link",
    "stuff_link",
    "corrupt_link",
    "isolate_node",
    "delay_node",
)
#: What happens to brokers below others only.
TREE_FAULTS = ("drain_branch", "cut_uplink", "kill_mid")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of schedule.

    Attributes:
        name: for options and messages.
        share: how many of a hundred schedules are of this kind.
        busy_s: simulated seconds of work and faults, from and to.
        requests: streams a second.
        faults: faults a second.
        heal_s: longest time that a fault lasts.
        brokers: how many brokers there may be, side by side.
        tree: some brokers stand below others instead.
        sure: whatever happens, no stream may fail: the clients are patient, and every worker resumes.
        rolling: all workers and brokers are drained and restarted, one after the other.
        slow_readers: some readers pause, for up to a minute or for ever.
        rogues: the part of the schedules in which a program talks nonsense to the brokers.
        loss: parts of all messages that may be lost.
    """

    name: str
    share: int
    busy_s: tuple[float, float]
    requests: float
    faults: float
    heal_s: float = 3.0
    brokers: tuple[int, ...] = (1, 2)
    tree: bool = False
    sure: bool = False
    rolling: bool = False
    slow_readers: bool = False
    rogues: float = 0.2
    loss: tuple[float, ...] = (0.0,)


KINDS = (
    Kind("calm", 4, (3, 6), 3.0, 0.0, sure=True),
    Kind("heals", 44, (4, 8), 2.5, 1.2, sure=True, loss=(0.0, 0.0, 0.002)),
    Kind("rolling", 10, (4, 6), 2.5, 0.0, brokers=(2,), sure=True, rolling=True),
    Kind("harsh", 20, (6, 12), 2.0, 0.8, heal_s=12.0, brokers=(1, 1, 2, 3), loss=(0.0, 0.0, 0.003)),
    Kind("tree", 10, (4, 8), 2.5, 1.2, tree=True, sure=True, loss=(0.0, 0.0, 0.002)),
    Kind("rolling tree", 2, (4, 6), 2.5, 0.0, tree=True, sure=True, rolling=True),
    Kind("harsh tree", 4, (6, 12), 2.0, 0.8, heal_s=12.0, tree=True, loss=(0.0, 0.0, 0.003)),
    Kind("readers", 5, (4, 8), 2.0, 0.5, sure=True, slow_readers=True),
    Kind("long", 1, (40, 60), 2.0, 0.5, heal_s=12.0, slow_readers=True, loss=(0.0, 0.001)),
)


def kind_of(seed: int) -> Kind:
    """Return the kind of schedule that a seed stands for."""
    return Random(seed).choices(KINDS, [kind.share for kind in KINDS])[0]
