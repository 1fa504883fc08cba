"""How long a reader waits for its next token after SIGKILL of its worker, and after SIGKILL of its broker.

The synthetic engine, so that this is the time of the recovery alone: seeing the death, submitting again, the first
token of another worker. Streams run through the process that is killed, one process at a time; each gap runs from
right before the kill to the moment at which the reader has the next token, by one clock. On a machine that has
nothing else to do. Run: make gap, or python benchmarks/gap.py.
"""

from __future__ import annotations

import argparse
import threading
import time
from contextlib import ExitStack

from chaos_figures import table

from tokenmq.client import Client, Stream, TokenmqError
from tokenmq.client.local import LocalCluster

MODEL = "toy"
WORKER, BROKER = "worker killed", "broker killed"
READY_S = 60.0
#: More than any stream brings before it is cancelled.
MAX_TOKENS = 100_000
#: Every stream is well under way when its process is killed.
TOKENS_BEFORE = 20
PATIENCE_S = 30.0
_PROGRESS_KILLS = 10


class Reader:
    """A thread that reads one stream and notes when its second attempt brought the first token.

    Attributes:
        runs: it has had TOKENS_BEFORE tokens.
        resumed_at: when it had the first token of another attempt than the first; None before.
        error: what the stream failed with, if it did.
    """

    def __init__(self, client: Client, seed: int, resumed: threading.Semaphore) -> None:
        """Begin to read; `resumed` is released once, when the stream goes on after a fault."""
        self.runs = threading.Event()
        self.resumed_at: float | None = None
        self.error: TokenmqError | None = None
        self._stream: Stream = client.generate(MODEL, prompt="x", max_tokens=MAX_TOKENS, seed=seed)
        self._resumed = resumed
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._follow()
        except TokenmqError as error:
            self.error = error

    def _follow(self) -> None:
        for chunk in self._stream:
            now = time.monotonic()
            if chunk.offset >= TOKENS_BEFORE:
                self.runs.set()
            attempts = self._stream.attempts
            if self.resumed_at is None and len(attempts) > 1 and chunk.offset >= attempts[1].first_token:
                self.resumed_at = now
                self._resumed.release()

    def end(self) -> None:
        """Cancel the stream and wait for the thread."""
        self._stream.cancel()
        self._thread.join(PATIENCE_S)


def measure(cluster: LocalCluster, streams: int, seed: int, kind: str) -> list[float]:
    """Kill one process under so many streams; return the gaps of those that ran through it, in seconds."""
    resumed = threading.Semaphore(0)
    with Client(cluster.frontends, connect_timeout_s=READY_S) as client:
        _wait_for_first_broker(client)
        readers = [Reader(client, seed * streams + number, resumed) for number in range(streams)]
        if not all(reader.runs.wait(PATIENCE_S) for reader in readers):
            raise SystemExit("error: the streams do not begin")
        victim, hit = cluster.broker, streams
        if kind == WORKER:
            busiest = max(client.workers(), key=lambda row: row["in_flight"])
            victim = next(worker for worker in cluster.workers if worker.name == busiest["name"])
            hit = busiest["in_flight"]
        began = time.monotonic()
        victim.kill()
        if not all(resumed.acquire(timeout=PATIENCE_S) for _ in range(hit)):
            errors = [str(reader.error) for reader in readers if reader.error]
            raise SystemExit(f"error: after the end of {victim.name} a stream does not go on; errors: {errors}")
        for reader in readers:
            reader.end()
    victim.restart()
    cluster.wait_ready(MODEL, len(cluster.workers), READY_S)
    return [reader.resumed_at - began for reader in readers if reader.resumed_at is not None]


def _wait_for_first_broker(client: Client) -> None:
    """Wait for the session with the broker that the client prefers: requests go there from then on."""
    end = time.monotonic() + READY_S
    while client.status()["broker"] != "broker-1":
        if time.monotonic() > end:
            raise SystemExit("error: the client finds no way to the first broker")
        time.sleep(0.01)


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each kind (default: 50)")
    parser.add_argument("--streams", type=int, default=8, help="streams at a time (default: 8)")
    parser.add_argument("--rate", type=float, default=100.0, help="tokens per second of each stream (default: 100)")
    return parser.parse_args()


def main() -> None:
    """Measure both kinds and print the figures."""
    options = parse()
    gaps: dict[str, list[float]] = {WORKER: [], BROKER: []}
    with ExitStack() as parts:
        cluster = parts.enter_context(LocalCluster(brokers=2))
        pace = ("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", str(options.rate))
        for _ in range(3):
            cluster.start_worker(*pace, "--slots", str(options.streams))
        cluster.wait_ready(MODEL, len(cluster.workers), READY_S)
        for number in range(options.kills):
            for kind, found in gaps.items():
                found += measure(cluster, options.streams, number, kind)
            if (number + 1) % _PROGRESS_KILLS == 0:
                print(f"{number + 1} of {options.kills} kills of each kind", flush=True)
    print(f"from SIGKILL to the next token at the reader; {1000 / options.rate:g} ms between tokens otherwise")
    for line in table(gaps, {"SIGKILL": list(gaps)}):
        print(line)


if __name__ == "__main__":
    main()
