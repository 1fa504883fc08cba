"""All benchmarks that docs/performance.md tells of, one after the other; each leaves benchmarks/results/NAME.json.

One that fails leaves a file that says why, and the others go on; in the end the command fails, too. What comes of the
files is the business of benchmarks/report.py. A benchmark with options of its own is run by itself, with
--json benchmarks/results/NAME.json.
Run: make bench, with BENCH_ARGS="--quick" to see that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import rounds
from runs import NAMES, RESULTS, ROOT

_INTERRUPTED = 130


def measure(name: str, arguments: Sequence[str], folder: Path, scripts: Path) -> str:
    """Run a benchmark and leave its file, also where it fails.

    Args:
        name: of the benchmark.
        arguments: for it, besides --json.
        folder: where its file belongs.
        scripts: where the benchmarks are.

    Returns:
        Why it failed, in one line; "" where it did not.
    """
    path = folder / f"{name}.json"
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    script = scripts / f"{name}.py"
    if script.is_file():
        done = subprocess.run(
            [sys.executable, script, "--json", shown, *arguments],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        sys.stderr.write(done.stderr)
        if not done.returncode:
            return ""
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = said[-1].removeprefix("error: ") if said else f"it ended with status {done.returncode}"
    else:
        why = f"there is no benchmarks/{name}.py"
    asked = {"quick": "--quick" in arguments}
    path.write_text(json.dumps(rounds.document(name, asked, []) | {"error": why}, indent=1) + "\n")
    return why


def main() -> None:
    """Run what the command line asks for.

    Raises:
        SystemExit: one or more of them failed; its message is a line for each.
    """
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("names", nargs="*", metavar="NAME", help=f"only these of {', '.join(NAMES)} (default: all)")
    made.add_argument("--rounds", type=rounds.positive, help="rounds of each (default: what each has by itself)")
    made.add_argument("--quick", action="store_true", help="only see that all of it runs (default: off)")
    options = made.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        made.error(f"there is no benchmark {unknown[0]!r} here; there are {', '.join(NAMES)}")
    arguments = ["--quick"] * options.quick + ["--rounds", str(options.rounds)] * (options.rounds is not None)
    RESULTS.mkdir(exist_ok=True)
    failed = []
    for number, name in enumerate(names := options.names or NAMES, start=1):
        print(f"\n== {name} ({number} of {len(names)})", flush=True)
        try:
            why = measure(name, arguments, RESULTS, Path(__file__).parent)
        except KeyboardInterrupt:
            print("interrupted; what was measured before is kept", file=sys.stderr)
            raise SystemExit(_INTERRUPTED) from None
        failed += [f"error: {name}: {why}"] if why else []
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
