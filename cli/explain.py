"""A dispatch decision in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..protocol.log import printable

if TYPE_CHECKING:
    from ..client import Considered, Decision


def decision_line(decision: Decision) -> str:
    """Return one line: who chose whom, by which policy, and how the workers looked that it could choose from."""
    head = f"{decision.broker}: {decision.policy} chose {decision.worker}"
    shown = "; ".join(map(_worker, decision.considered))
    if not shown:
        return printable(f"{head}, one of {decision.candidates}")
    hidden = decision.candidates - len(decision.considered)
    more = f"; and {hidden} more" if hidden > 0 else ""
    return printable(f"{head}, one of {decision.candidates}: {shown}{more}")


def _worker(worker: Considered) -> str:
    speed = f"{worker.speed:.4g} tokens/s" if worker.speed else "speed unknown"
    return f"{worker.worker} (load {worker.load} of {worker.slots}, {speed}, cost {worker.cost:.4g})"
