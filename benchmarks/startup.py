"""How long each command takes to start, and how much memory: in turns, in relation to `import zmq`.

python           a Python process that does nothing
import zmq       what every user of ZeroMQ in Python pays
import Client    `from tokenmq.client import Client`
first token      a program with a client, from its start to the first token of a worker that is there
broker --help    zmq-broker --help; likewise worker and client
broker listens   zmq-broker until it has bound its endpoints
worker joins     zmq-worker with the synthetic engine until a broker has accepted it
client models    zmq-client models, to its end, with a broker that is there

wall_ms is the time to that moment, cpu_ms the CPU time of the process, peak_mib its largest resident memory. Modules
are compiled before: a round that does not count comes first. Run: python benchmarks/startup.py.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rounds

from tokenmq.client.local import LocalCluster, LocalClusterError, free_ports

BASE = "import zmq"
CASE = "start"
ROUNDS = 10
COLUMNS = {"wall_ms": "wall ms", "cpu_ms": "CPU ms", "peak_mib": "peak MiB"}
_MODEL = "toy"
_BIN = Path(sys.executable).parent
_LAUNCH = Path(__file__).with_name("launch.py")
_FIRST_TOKEN = """
import sys
from tokenmq.client import Client
with Client(sys.argv[1]) as client:
    for chunk in client.generate(sys.argv[2], prompt="x", max_tokens=1000):
        print("first_token", file=sys.stderr, flush=True)
"""


@dataclass(frozen=True, slots=True)
class Start:
    """One thing to start.

    Attributes:
        command: the program and its arguments. FRONTEND, BACKEND are a running broker's endpoints, FREE_1, FREE_2 two
            that nobody listens on.
        marker: what its standard error has when it has started; "" for its end.
    """

    command: tuple[str, ...]
    marker: str = ""


def _python(program: str, *arguments: str, marker: str = "") -> Start:
    return Start((sys.executable, "-c", program, *arguments), marker)


def _installed(name: str, *arguments: str, marker: str = "") -> Start:
    return Start((str(_BIN / name), *arguments), marker)


STARTS = {
    "python": _python("pass"),
    BASE: _python("import zmq"),
    "import Client": _python("from tokenmq.client import Client"),
    "first token": _python(_FIRST_TOKEN, "FRONTEND", _MODEL, marker="first_token"),
    "broker --help": _installed("zmq-broker", "--help"),
    "worker --help": _installed("zmq-worker", "--help"),
    "client --help": _installed("zmq-client", "--help"),
    "broker listens": _installed(
        "zmq-broker", "--frontend", "FREE_1", "--backend", "FREE_2", marker=" broker_started "
    ),
    "worker joins": _installed(
        "zmq-worker", "--engine", "synthetic", "--model", "other", "--broker", "BACKEND", marker=" registered "
    ),
    "client models": _installed("zmq-client", "--broker", "FRONTEND", "models"),
}


def measure(start: Start, cluster: LocalCluster) -> Mapping[str, float]:
    """Start it once.

    Raises:
        BenchmarkError: it did not start; the message has what it said.
    """
    free = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
    words = {"FRONTEND": cluster.frontend, "BACKEND": cluster.backend, "FREE_1": free[0], "FREE_2": free[1]}
    command = [words.get(word, word) for word in start.command]
    done = subprocess.run(
        [sys.executable, "-I", "-S", _LAUNCH, start.marker, *command],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise rounds.BenchmarkError(f"{' '.join(command)} did not start: {done.stderr.strip()}")
    wall_ms, cpu_ms, peak_kib = map(float, done.stdout.split())
    return {"wall_ms": wall_ms, "cpu_ms": cpu_ms, "peak_mib": peak_kib / 1024}


def measured(names: Sequence[str], count: int) -> list[rounds.Row]:
    """Start each in turn, in so many rounds after one that does not count.

    Raises:
        BenchmarkError: one did not start.
        LocalClusterError: the broker that some of them need did not.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmq-") as folder, LocalCluster(folder=Path(folder)) as cluster:
        cluster.start_worker("--engine", "synthetic", "--model", _MODEL)
        cluster.wait_ready(_MODEL)
        for name in names:
            measure(STARTS[name], cluster)
        return rounds.interleave([CASE], names, count, lambda _case, name: measure(STARTS[name], cluster))


def main() -> None:
    """Measure what the command line asks for."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=rounds.positive, default=ROUNDS, help="rounds (default: %(default)s)")
    made.add_argument(
        "--commands", nargs="+", choices=STARTS, default=list(STARTS), metavar="NAME",
        help=f"only these of {', '.join(STARTS)} (default: all)",
    )  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="write all rounds there (default: nowhere)")
    made.add_argument("--quick", action="store_true", help="one round, to see that it runs (default: off)")
    options = made.parse_args()
    if options.json is not None and not options.json.parent.is_dir():
        made.error(f"--json: there is no folder {options.json.parent}")
    if options.quick:
        options.rounds = 1
    try:
        rows = measured(options.commands, options.rounds)
    except (rounds.BenchmarkError, LocalClusterError) as error:
        raise SystemExit(f"error: {error}") from error
    print()
    print("\n".join(rounds.table(rows, COLUMNS, BASE)))
    if options.json is not None:
        rounds.write(options.json, "startup", vars(options), rows)


if __name__ == "__main__":
    main()
