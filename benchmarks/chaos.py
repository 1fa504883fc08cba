"""Kill anything, lose nothing: real brokers, workers and clients under faults, every token and character checked.

Brokers, workers (the synthetic engine) and client processes run on this machine, some of them through links that can
be cut. A seeded monkey kills, freezes, drains and cuts; whatever it hit is started again. At the end the faults stop,
all streams end, and nothing may be left anywhere. The exit code is 1 if a token or character was wrong or lost, a
stream hung or failed, a process crashed, or something leaked.

Run: make chaos, or python benchmarks/chaos.py. Ctrl-C ends the faults and prints what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from random import Random, SystemRandom
from typing import Any

from chaos_figures import FINDINGS, Tally, attribute, table
from chaos_links import Network
from chaos_monkey import DECK, GRACE_S, SILENT, Monkey
from chaos_readers import Orders

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster

MODEL = "toy"
#: Long enough for a request to find a broker again after any fault of the deck.
CONNECT_TIMEOUT_S = 15.0
#: What lasts longer than this without a token hangs; no fault of the deck lasts nearly as long.
HANG_S = 30.0
READY_S = 60.0
#: What the last streams get when there are no more faults, and what brokers and workers get to forget them.
END_S = 60.0
REST_S = 20.0
PROGRESS_S = 5.0
_TICK_S = 0.05
_SHOWN_FINDINGS = 10
_READERS = Path(__file__).with_name("chaos_readers.py")

_Told = queue.SimpleQueue[tuple[str, dict[str, Any]]]


class ClientProcess:
    """One client process; what it tells goes into a queue, read by a thread of its own.

    Attributes:
        name: what brokers call it.
    """

    def __init__(self, orders: Orders, folder: Path, told: _Told, tally: Tally) -> None:
        """Start it."""
        self.name = orders.name
        self._orders = orders
        self._log = folder / f"{orders.name}.log"
        self._told = told
        self._tally = tally
        self._starts = 0
        self.restart()

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def restart(self) -> None:
        """Start it, with other streams than before."""
        self._starts += 1
        orders = asdict(self._orders) | {"seed": f"{self._orders.seed}/{self.name}/{self._starts}"}
        with self._log.open("ab") as sink:
            self._process = subprocess.Popen(
                [sys.executable, str(_READERS), json.dumps(orders)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process
            )
        self._reader = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._reader.start()

    def kill(self) -> None:
        """Kill it with SIGKILL; its streams are nobody's any more."""
        self._process.kill()
        self._process.wait()
        self._reader.join(END_S)
        self._told.put((self.name, {"killed": True}))

    def stop(self) -> None:
        """Let it begin no more streams, and end when those that it has are over."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def finish(self, timeout_s: float) -> None:
        """Wait for its end; kill it after the timeout."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout_s)

    def log(self) -> str:
        """Return what it wrote to its standard error."""
        return self._log.read_text(errors="replace")

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # half a line: it was killed
                self._told.put((self.name, json.loads(line)))


class Run:
    """One run: its parts, its phases and what it has seen."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """Prepare; nothing is started yet."""
        self.tally = Tally()
        self.monkey: Monkey | None = None
        self.clients: list[ClientProcess] = []
        self._options = options
        self._folder = folder
        self._told: _Told = queue.SimpleQueue()
        self._began = time.monotonic()
        self._progress_at = self._began + PROGRESS_S
        #: Which broker an endpoint leads to.
        self._brokers: dict[str, str] = {}

    def go(self) -> None:
        """Start everything, let the monkey loose, end everything, look for leaks."""
        options = self._options
        with ExitStack() as parts:
            times = ("--heartbeat-interval", str(options.expiry / 5), "--expiry", str(options.expiry))
            cluster = parts.enter_context(
                LocalCluster(*times, "--grace", str(GRACE_S), brokers=options.brokers, folder=self._folder)
            )
            network = Network()
            parts.callback(network.close)
            self._start_workers(cluster, network)
            cluster.wait_ready(MODEL, options.workers, READY_S)
            self._start_clients(cluster, network)
            parts.callback(self._end_clients, 0.0)
            self.monkey = Monkey(Random(options.seed), cluster, self.clients, network, self.tally, options.expiry)
            parts.callback(self.monkey.close)
            with contextlib.suppress(KeyboardInterrupt):
                self._rage(self.monkey)
            self.monkey.repair(END_S)
            self._end_clients(END_S + REST_S)
            self.monkey.close()
            self._look_for_leaks(cluster)
            self._stop(cluster)

    def _start_workers(self, cluster: LocalCluster, network: Network) -> None:
        """Start the workers; the last one reaches each broker through a link of its own."""
        options = self._options
        # Half of the workers can take everything: streams need not wait while the others are down.
        slots = -(-2 * options.streams // options.workers)
        pace = ("--engine", "synthetic", "--model", MODEL, "--tokens-per-second", str(options.rate))
        for number in range(1, options.workers + 1):
            ways: list[str] = []
            if number == options.workers:
                for broker, backend in zip(cluster.brokers, cluster.backends, strict=True):
                    ways += ["--broker", network.link(f"worker-{number}>{broker.name}", backend).endpoint]
            cluster.start_worker(*pace, "--slots", str(slots), "--grace", str(GRACE_S), *ways)

    def _start_clients(self, cluster: LocalCluster, network: Network) -> None:
        """Start the client processes; the last one reaches each broker through a link of its own.

        Every other one prefers the last broker, so that all brokers have streams.
        """
        options = self._options
        for number in range(options.clients):
            name = f"client-{number + 1}"
            endpoints = []
            for broker, frontend in zip(cluster.brokers, cluster.frontends, strict=True):
                linked = number == options.clients - 1
                endpoint = network.link(f"{name}>{broker.name}", frontend).endpoint if linked else frontend
                self._brokers[endpoint] = broker.name
                endpoints.append(endpoint)
            orders = Orders(
                name=name,
                model=MODEL,
                endpoints=endpoints[::-1] if number % 2 else endpoints,
                streams=options.streams // options.clients + (number < options.streams % options.clients),
                tokens=options.tokens,
                seed=str(options.seed),
                connect_timeout_s=CONNECT_TIMEOUT_S,
                hang_s=HANG_S,
                end_s=END_S,
            )
            self.clients.append(ClientProcess(orders, self._folder, self._told, self.tally))

    def _rage(self, monkey: Monkey) -> None:
        now = time.monotonic()
        end = now + self._options.seconds
        next_fault = now + 1.0  # the first streams have begun by then
        while (now := time.monotonic()) < end:
            if now >= next_fault:
                monkey.strike()
                next_fault = now + self._options.kill_every
            monkey.look()
            self._listen()
            time.sleep(_TICK_S)

    def _listen(self) -> None:
        """Count what the clients have told; print a line now and then."""
        with contextlib.suppress(queue.Empty):
            while True:
                client, told = self._told.get_nowait()
                if "killed" in told:
                    self.tally.left(client)
                else:
                    self.tally.take(client, told)
        if time.monotonic() >= self._progress_at:
            self._progress_at += PROGRESS_S
            faults = len(self.monkey.faults) if self.monkey else 0
            print(f"{time.monotonic() - self._began:4.0f} s: {faults} faults; {self.tally.progress()}", flush=True)

    def _end_clients(self, timeout_s: float) -> None:
        """Let all clients end; count what they tell, and those that end otherwise than they should."""
        for client in self.clients:
            client.stop()
        end = time.monotonic() + timeout_s
        while any(client.exit_code is None for client in self.clients) and time.monotonic() < end:
            self._listen()
            time.sleep(_TICK_S)
        for client in self.clients:
            client.finish(max(_TICK_S, end - time.monotonic()))
            if client.exit_code != 0:
                self.tally.find("crashed", detail=f"{client.name} ended with {client.exit_code}\n{client.log()}")
        self.clients.clear()
        self._listen()

    def _look_for_leaks(self, cluster: LocalCluster) -> None:
        """Count what brokers and workers still hold when all clients have gone, after a while."""
        end = time.monotonic() + REST_S
        for broker, frontend in zip(cluster.brokers, cluster.frontends, strict=True):
            with Client(frontend, name="leaks", connect_timeout_s=READY_S) as client:
                while (held := _held(client, len(cluster.workers))) and time.monotonic() < end:
                    time.sleep(_TICK_S)
            if held:
                self.tally.find("leaks", sum(held.values()), detail=f"{broker.name}: {held}")

    def _stop(self, cluster: LocalCluster) -> None:
        cluster.close()
        for process in (*cluster.brokers, *cluster.workers):
            if process.exit_code != 0:
                self.tally.find("crashed", detail=f"{process.name} ended with {process.exit_code}")

    def report(self) -> dict[str, Any]:
        """Return all that was seen, as plain data."""
        tally = self.tally
        faults = self.monkey.faults if self.monkey else []
        counts = Counter(fault.kind for fault in faults)
        return {
            "seed": self._options.seed,
            "seconds": time.monotonic() - self._began,
            "faults": {kind: counts[kind] for kind in DECK},
            "schedule": [[fault.at, fault.kind, *fault.targets] for fault in faults],
            "streams": dict(tally.outcomes),
            "left_behind": tally.left_behind,
            "tokens": tally.tokens,
            "resumes": tally.resumes,
            "gaps": self._gaps(),
            "findings": {kind: tally.findings[kind] for kind in FINDINGS},
            "details": tally.details,
        }

    def _gaps(self) -> list[dict[str, Any]]:
        """Return the gaps, each with its length and the kind of fault."""
        faults = self.monkey.faults if self.monkey else []
        gaps = []
        for gap in self.tally.gaps:
            places = [(worker, self._brokers.get(broker, ""), code) for worker, broker, code in gap["places"]]
            targets: set[str] = set()
            for worker, broker, _ in places:
                targets |= {worker, broker, f"{worker}>{broker}", f"{gap['client']}>{broker}"}
            kind = attribute(faults, frozenset(targets), gap["before"], gap["after"])
            gaps.append({**gap, "places": places, "kind": kind, "seconds": gap["after"] - gap["before"]})
        return gaps


def _held(client: Client, workers: int) -> dict[str, int]:
    """Return what a broker and its workers hold, and how many workers are missing there; empty at rest."""
    try:
        status, rows = client.status(), client.workers()
    except TokenmqError:
        return {"no answer": 1}
    held = dict(status["requests"])
    held["clients"] = status["clients"] - 1  # this one
    held["workers missing"] = workers - len(rows)
    for key in ("in_flight", "parked", "running", "waiting"):
        held[f"{key} at workers"] = sum(row[key] for row in rows)
    return {key: number for key, number in held.items() if number}


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Return the report for a person, line by line."""
    injected = ", ".join(f"{number} {kind}" for kind, number in report["faults"].items() if number)
    yield f"seed {report['seed']}, {report['seconds']:.0f} s, {sum(report['faults'].values())} faults: {injected}"
    streams = report["streams"]
    yield (
        f"streams: {streams.get('read', 0):,} read to their end, {streams.get('cancelled', 0):,} cancelled by their "
        f"readers, {report['left_behind']:,} left behind by killed clients; {report['tokens']:,} tokens, "
        f"{report['resumes']:,} resumes"
    )
    gaps: dict[str, list[float]] = defaultdict(list)
    for gap in report["gaps"]:
        gaps[gap["kind"]].append(gap["seconds"])
    yield "gaps that readers saw, from the last token before a fault to the first one after it:"
    yield from table(
        gaps,
        {
            "broken at once": [kind for kind in DECK if kind not in SILENT],
            "silent until the expiry": SILENT,
        },
    )
    for finding in report["details"][:_SHOWN_FINDINGS]:
        known = {key: value for key, value in finding.items() if key not in ("kind", "plan")}
        yield f"{finding['kind']}: {json.dumps(known)}"
    yield ", ".join(f"{kind} {number}" for kind, number in report["findings"].items())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long there are faults (default: 60)")
    parser.add_argument("--streams", type=int, default=200, help="streams at a time (default: 200)")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of the longest stream (default: 300)")
    parser.add_argument("--rate", type=float, default=50.0, help="tokens per second of each stream (default: 50)")
    parser.add_argument("--kill-every", type=float, default=1.0, help="seconds between faults (default: 1)")
    parser.add_argument("--expiry", type=float, default=2.0, help="seconds after which silence is death (default: 2)")
    parser.add_argument("--brokers", type=int, default=2, help="brokers (default: 2)")
    parser.add_argument("--workers", type=int, default=4, help="workers (default: 4)")
    parser.add_argument("--clients", type=int, default=4, help="client processes (default: 4)")
    parser.add_argument("--seed", type=int, default=None, help="of all that is drawn (default: one is drawn)")
    parser.add_argument("--folder", type=Path, default=None, help="for logs (default: kept only after findings)")
    parser.add_argument("--json", type=Path, default=None, help="a file for the report as JSON")
    options = parser.parse_args(arguments)
    for name in ("brokers", "workers", "clients", "streams", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more")
    if options.seed is None:
        options.seed = SystemRandom().randrange(1_000_000)
    return options


def main() -> None:
    """Run it and print the report."""
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as after Ctrl-C, with no process left
    folder = options.folder or Path(tempfile.mkdtemp(prefix="tokenmq-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"seed {options.seed}: {options.brokers} brokers, {options.workers} workers, {options.clients} clients, "
        f"{options.streams} streams at a time, a fault every {options.kill_every:g} s",
        flush=True,
    )
    run = Run(options, folder)
    try:
        run.go()
    except KeyboardInterrupt:  # the second one: nothing is waited for any more
        sys.exit(f"interrupted; logs: {folder}")
    report = run.report()
    for line in lines(report):
        print(line)
    if options.json is not None:
        options.json.write_text(json.dumps(report))
    if not run.tally.clean:
        (folder / "report.json").write_text(json.dumps(report))
        print(f"logs and findings: {folder}")
        sys.exit(1)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
