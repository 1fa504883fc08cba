"""Judges what pip-audit has found, for scripts/audit.sh: exit code 1 for a vulnerability that nobody has judged."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class IgnoreListError(Exception):
    """The list of what is ignored is not of its form; the message names the line."""


def read_ignored(text: str) -> dict[str, str]:
    """Return the reason for each id of the ignore list: `ID reason`, one a line, # for comments.

    Raises:
        IgnoreListError: a line has no reason.
    """
    ignored = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, _, reason = line.strip().partition(" ")
            if not reason.strip():
                raise IgnoreListError(f"line {number}: {name} is ignored without a reason")
            ignored[name] = reason.strip()
    return ignored


def judge(report: Any, ignored: dict[str, str], why: str = "") -> tuple[int, list[str]]:
    """Return the exit code, and what to tell.

    Args:
        report: pip-audit's, as JSON; None where it wrote none.
        ignored: the reason for each id that is.
        why: its last words, for a report that is missing.
    """
    packages = report.get("dependencies", []) if isinstance(report, dict) else []
    asked = [one for one in packages if "skip_reason" not in one]
    if not asked:
        reason = why or "the service knows none of the packages, as it is where only an index can be reached"
        return 0, [f"audit: skipped, nothing was audited: {reason}"]
    lines, bad, met = [], 0, set()
    for package in asked:
        for found in package["vulns"]:
            names = [found["id"], *found.get("aliases", [])]
            known = next((name for name in names if name in ignored), None)
            what = f"{package['name']} {package['version']}: {', '.join(names)}"
            if known is None:
                bad += 1
                fixed = ", ".join(found.get("fix_versions") or ["no version yet"])
                lines.append(f"audit: {what}; fixed in {fixed}")
            else:
                met.add(known)
                lines.append(f"audit: {what}: ignored, {ignored[known]}")
    lines += [f"audit: {name} was not found: take it off the ignore list" for name in ignored if name not in met]
    skipped = len(packages) - len(asked)
    summary = f"audit: {len(asked)} packages, {bad} vulnerabilities that nobody has judged"
    lines.append(summary + (f"; {skipped} packages are unknown to the service" if skipped else ""))
    return int(bad > 0), lines


def main(report: str, ignore_list: str, log: str, status: str) -> int:
    """Read the files, print the judgement and return the exit code."""
    try:
        found = json.loads(Path(report).read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    words = Path(log).read_text("utf-8", "replace").strip().splitlines()
    why = "it took too long" if status == "124" else words[-1] if words else f"pip-audit ended with {status}"
    try:
        ignored = read_ignored(Path(ignore_list).read_text("utf-8"))
    except IgnoreListError as error:
        print(f"audit: {ignore_list}: {error}")
        return 1
    code, lines = judge(found, ignored, "" if found else why)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
