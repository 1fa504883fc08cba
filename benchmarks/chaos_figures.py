"""What the chaos run has seen: counts, and the gaps that readers saw, each with the fault that it came from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Each of these is a broken promise; all must be 0.
FINDINGS = ("wrong", "lost", "hung", "failed", "crashed", "leaks")
#: Tokens on their way when a fault happens arrive a little after it; so does the news of it in a busy process.
SLACK_S = 0.5
NOT_ATTRIBUTED = "not attributed"


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value that this share (0 to 1) of the values does not exceed: the nearest rank.

    Raises:
        ValueError: there is no value.
    """
    ranked = sorted(values)
    if not ranked:
        raise ValueError("no values")
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        kind: such as "worker killed".
        targets: names of the processes and links that it hits.
        at: when it began, by the machine's monotonic clock.
        lasts_s: how long streams may go on before it breaks them: the grace time of a drain.
        silent: nobody can tell it but by the silence.
    """

    kind: str
    targets: frozenset[str]
    at: float
    lasts_s: float = 0.0
    silent: bool = False

    def explains(self, targets: frozenset[str], before: float, after: float) -> bool:
        """Whether it may have broken a stream through these targets whose tokens came at these times."""
        in_time = self.at <= after and before <= self.at + self.lasts_s + SLACK_S
        return in_time and bool(self.targets & targets)


def attribute(faults: Sequence[Fault], targets: frozenset[str], before: float, after: float) -> str:
    """Return the kind of the fault that a gap came from.

    Of several that can explain it this is one that was silent, since such a gap lasts longest, or else the one that
    is nearest to the last token before it.

    Args:
        faults: all of them.
        targets: the workers, brokers and links of the attempts that broke, and of the one that went on.
        before: time of the last token before the gap.
        after: time of the first token behind it.
    """
    explaining = [fault for fault in faults if fault.explains(targets, before, after)]
    if not explaining:
        return NOT_ATTRIBUTED
    return min(explaining, key=lambda fault: (not fault.silent, abs(fault.at - before))).kind


@dataclass(slots=True)
class Tally:
    """Counts of one run.

    Attributes:
        findings: how many broken promises of each kind.
        outcomes: ends of streams.
        tokens: tokens that readers took and checked.
        resumes: attempts beyond the first.
        open: streams that each client process has open.
        left_behind: streams that were open when their client process was killed.
        details: the first findings, with all that is known of them.
        gaps: what clients told of gaps.
    """

    findings: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    resumes: int = 0
    open: dict[str, int] = field(default_factory=dict)
    left_behind: int = 0
    details: list[dict[str, Any]] = field(default_factory=list)
    gaps: list[Mapping[str, Any]] = field(default_factory=list)

    def take(self, client: str, told: Mapping[str, Any]) -> None:
        """Add what a client process has told in one line."""
        if "outcome" not in told:
            self.tokens += told["tokens"]
            self.open[client] = told["open"]
            return
        outcome = told["outcome"]
        self.outcomes[outcome] += 1
        self.resumes += told["attempts"] - 1
        self.gaps.extend(gap | {"client": client} for gap in told["gaps"])
        if outcome in FINDINGS:
            self.find(outcome, client=client, **{key: told[key] for key in told if key not in ("gaps", "outcome")})

    def find(self, kind: str, number: int = 1, **details: Any) -> None:
        """Count a broken promise."""
        self.findings[kind] += number
        self.details.append({"kind": kind, **details})

    def left(self, client: str) -> None:
        """Note that a client process was killed: nobody counts on its streams any more."""
        self.left_behind += self.open.pop(client, 0)

    @property
    def clean(self) -> bool:
        """Whether no promise was broken, and something was tried at all."""
        return not self.findings.total() and self.outcomes["read"] > 0

    def verdict(self) -> str:
        """Return the findings in one line."""
        return ", ".join(f"{kind} {self.findings[kind]}" for kind in FINDINGS)

    def progress(self) -> str:
        """Return the counts in one line."""
        streams = self.outcomes.total()
        return f"{streams:,} streams, {self.tokens:,} tokens, {self.resumes:,} resumes; {self.verdict()}"


def table(gaps: Mapping[str, Sequence[float]], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Return lines with median, p99 and worst of the gaps of each kind, in milliseconds.

    Args:
        gaps: seconds, by kind.
        groups: kinds by the heading under which they stand; others come last.
    """
    lines = [f"{'':24} {'streams':>8} {'median':>10} {'p99':>10} {'worst':>10}"]
    known = {kind for kinds in groups.values() for kind in kinds}
    for heading, kinds in {**groups, "other": [kind for kind in gaps if kind not in known]}.items():
        if any(gaps.get(kind) for kind in kinds):
            lines.append(f"{heading}:")
            lines += [f"  {kind:22} {_row(gaps[kind])}" for kind in kinds if gaps.get(kind)]
    return lines


def _row(gaps: Sequence[float]) -> str:
    figures = (percentile(gaps, 0.5), percentile(gaps, 0.99), max(gaps))
    return f"{len(gaps):8,} " + " ".join(f"{figure * 1000:7,.1f} ms" for figure in figures)
