"""The same as in routing.py with real processes: a broker, workers of three speeds, clients; beside the simulation.

First, requests arrive as a Poisson process at load 0.8. Which worker gets which part of them, and how long they wait,
is compared with what the simulation of the same requests on the same workers says. One request that comes a little
later may send all that follow elsewhere: so it is simulated several times, each time with arrivals that are late by
up to 5 ms, and its mean and range are shown. Then a client sends 10,000 short requests at once, and another one's
waits and times to its first token are compared with those of the same requests without them.

The synthetic engine brings tokens at a fixed pace and needs hardly any processor. What else takes time is not
simulated: on a busy machine services are longer, the load is higher, and so are the waits. Run it on one that has
nothing else to do: python benchmarks/routing_real.py.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from random import Random

from chaos_figures import percentile
from relays import LIFTED
from routing_broker import Simulation
from routing_load import POISSON, Cluster, Job, arrival_times, jobs_of, mean_tokens

from tokenmq.broker.dispatch import DEFAULT_POLICY
from tokenmq.broker.settings import MAX_WAITING
from tokenmq.client import AsyncClient
from tokenmq.client.local import LocalCluster

MODEL = "toy"
READY_S = 60.0
#: Tokens a second of one stream on each worker, and streams at a time: 280 tokens a second at most.
SPEEDS = (10.0, 20.0, 40.0)
SLOTS = 4
LOAD = 0.8
#: Lengths are a tenth of those in routing.py, 6 to 819 tokens: a request takes 0.75 s on average, and not 5.
SHORTER = 10
#: For the flood: three workers that run 16 streams each, and requests of a second: 4 to 12 tokens, 8 on average.
FLOOD_SPEEDS = (8.0, 8.0, 8.0)
FLOOD_SLOTS = 16
FLOOD_TOKENS = (4, 12)
FLOOD_SERVICE_S = 1.0
#: What the client that is watched takes of the workers.
_WATCHED_LOAD = 0.1
_FLOOD = 10_000
#: The flood is turned away again and again, and must not give up.
_PATIENCE_S = 3_600.0
#: The part of the shortest time that the flood can take in which the other client is watched.
_WATCHED_PART = 0.7
_POLL_S = 0.05
_PROGRESS = 500
_SIMULATIONS = 10
_LATE_S = 0.005


@dataclass(frozen=True, slots=True)
class Served:
    """A request that has ended.

    Attributes:
        wait_s: in the queues of broker and worker.
        service_s: from there to its last token.
        first_token_s: from sending it to its first token, as the client sees it.
        worker: who ran it.
    """

    wait_s: float
    service_s: float
    first_token_s: float
    worker: str


async def ask(client: AsyncClient, job: Job) -> Served:
    """Send one request and read its stream."""
    began, first_at = time.monotonic(), 0.0
    stream = client.generate(MODEL, prompt="x", max_tokens=job.tokens + 1, seed=job.number)
    async for _ in stream:
        first_at = first_at or time.monotonic()
    timings = stream.timings
    assert timings is not None
    assert stream.worker is not None
    wait_s = timings.broker_queue_s + timings.worker_queue_s
    return Served(wait_s, timings.prefill_s + timings.decode_s, first_at - began, stream.worker)


async def send(client: AsyncClient, jobs: Sequence[Job]) -> list[Served]:
    """Send requests when they are due, whatever has become of those before."""
    began, tasks = time.monotonic(), []
    for number, job in enumerate(jobs, 1):
        await asyncio.sleep(max(0.0, began + job.arrived_at - time.monotonic()))
        tasks.append(asyncio.ensure_future(ask(client, job)))
        if number % _PROGRESS == 0:
            print(f"  {number} of {len(jobs)} requests sent", flush=True)
    return list(await asyncio.gather(*tasks))


async def run_client(endpoint: str, name: str, jobs: Sequence[Job], *, busy: bool = False) -> list[Served]:
    """Be a client that sends these requests, with `busy` not before others wait for the model."""
    async with AsyncClient(endpoint, name=name, recovery_timeout_s=_PATIENCE_S) as client:
        while busy and not (await client.status())["requests"]["waiting"]:
            await asyncio.sleep(_POLL_S)
        return await send(client, jobs)


def start(cluster: LocalCluster, speeds: Sequence[float], slots: int) -> None:
    """Start workers, and wait until they are ready."""
    for number, speed in enumerate(speeds, 1):
        cluster.start_worker(
            "--worker-name", f"worker-{number}", "--engine", "synthetic", "--model", MODEL,
            "--tokens-per-second", str(speed), "--slots", str(slots),
        )  # fmt: skip
    cluster.wait_ready(MODEL, len(speeds), READY_S)


def arrivals(seconds: float, seed: str) -> list[Job]:
    """Draw what arrives in about so many seconds."""
    # A tenth of the length at a tenth of the pace takes the same time.
    drawn_for = Cluster(tuple(SHORTER * speed for speed in SPEEDS), SLOTS)
    rate = LOAD * drawn_for.tokens_per_s / mean_tokens()
    jobs = jobs_of(drawn_for, LOAD, POISSON, int(rate * seconds), seed)
    shorter = [max(1, round(job.tokens / SHORTER)) for job in jobs]
    return [replace(job, tokens=tokens, bound_tokens=tokens + 1) for job, tokens in zip(jobs, shorter, strict=True)]


def figures(waits_s: Sequence[float], services_s: Sequence[float], workers: Sequence[str]) -> dict[str, float]:
    """Return shares, services and waits of a run, by name."""
    counts = Counter(workers)
    found = {
        f"share of {worker}, {speed:g} tokens/s": counts[worker] / len(workers)
        for worker, speed in ((f"worker-{number}", speed) for number, speed in enumerate(SPEEDS, 1))
    }
    found["mean service, s"] = statistics.fmean(services_s)
    found["mean wait, s"] = statistics.fmean(waits_s)
    return found | {f"p{100 * share:g} wait, s": percentile(waits_s, share) for share in (0.5, 0.9, 0.99)}


def simulated(jobs: Sequence[Job], seed: str) -> dict[str, float]:
    """Return the figures of a simulation in which everything comes a little late."""
    random = Random(seed)
    late = [replace(job, arrived_at=job.arrived_at + random.uniform(0, _LATE_S)) for job in jobs]
    late.sort(key=lambda job: job.arrived_at)
    outcome = Simulation(Cluster(SPEEDS, SLOTS), DEFAULT_POLICY, seed=seed).run(late)
    services_s = [response - wait for response, wait in zip(outcome.responses_s, outcome.waits_s, strict=True)]
    return figures(outcome.waits_s, services_s, [f"worker-{number + 1}" for number in outcome.workers])


def compare(jobs: Sequence[Job], served: Sequence[Served], seed: str) -> None:
    """Print shares and waits, real and simulated."""
    runs = [simulated(jobs, f"{seed}/{number}") for number in range(_SIMULATIONS)]
    print(f"  {'':32} {'real':>8} {'simulated':>10} {'from':>8} {'to':>8} {'ratio':>6}")
    found = figures(*zip(*((each.wait_s, each.service_s, each.worker) for each in served), strict=True))
    for name, real in found.items():
        values = [run[name] for run in runs]
        mean = statistics.fmean(values)
        ratio = f"{real / mean:6.2f}" if mean > 0 else f"{'-':>6}"
        print(f"  {name:32} {real:8.3f} {mean:10.3f} {min(values):8.3f} {max(values):8.3f} {ratio}")


def shares_and_waits(seconds: float, seed: str) -> None:
    """Compare one run with its simulation."""
    jobs = arrivals(seconds, seed)
    print(f"{len(jobs)} requests, Poisson, load {LOAD:g}; speeds {SPEEDS} tokens/s, {SLOTS} streams each", flush=True)
    with LocalCluster() as cluster:
        start(cluster, SPEEDS, SLOTS)
        served = asyncio.run(run_client(cluster.frontend, "client", jobs))
    compare(jobs, served, seed)


def flood_job(number: int, at: float, random: Random) -> Job:
    """Draw a request of the second part."""
    tokens = random.randint(*FLOOD_TOKENS)
    return Job(number, at, tokens, tokens + 1)


def flood(endpoint: str, requests: int, seed: str) -> None:
    """Be the client that floods."""
    random = Random(f"{seed}/flood")
    asyncio.run(run_client(endpoint, "flood", [flood_job(number, 0.0, random) for number in range(requests)]))


def watched_jobs(requests: int, seed: str) -> list[Job]:
    """Draw the requests of the client that is watched, while a flood of so many others lasts."""
    slots = FLOOD_SLOTS * len(FLOOD_SPEEDS)
    end = _WATCHED_PART * requests * FLOOD_SERVICE_S / slots
    times = arrival_times(POISSON, _WATCHED_LOAD * slots / FLOOD_SERVICE_S, Random(f"{seed}/times"))
    random = Random(f"{seed}/watched")
    return [flood_job(number, at, random) for number, at in enumerate(takewhile(lambda at: at < end, times))]


def fairness(requests: int, max_waiting: int, seed: str) -> None:
    """Compare what one client waits for with and without a flood of another one."""
    jobs = watched_jobs(requests, seed)
    print(f"{len(jobs)} requests of one client, alone; then while another sends {requests:,} at once", flush=True)
    with LocalCluster("--max-waiting", str(max_waiting), *LIFTED) as cluster:
        start(cluster, FLOOD_SPEEDS, FLOOD_SLOTS)
        alone = asyncio.run(run_client(cluster.frontend, "watched", jobs))
        process = multiprocessing.get_context("spawn").Process(target=flood, args=(cluster.frontend, requests, seed))
        process.start()
        try:
            beside = asyncio.run(run_client(cluster.frontend, "watched", jobs, busy=True))
            print("  the other one's are under way" if process.is_alive() else "  the other one's ended too early")
            process.join()
        finally:
            process.kill()
    if process.exitcode != 0:
        raise SystemExit("error: the client that floods has failed")
    print(f"  in service times of {FLOOD_SERVICE_S:g} s {'alone':>14} {'beside':>8} {'more':>8}")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        for what, of in (("wait", "wait_s"), ("first token", "first_token_s")):
            one, two = (
                percentile([getattr(each, of) for each in served], share) / FLOOD_SERVICE_S
                for served in (alone, beside)
            )
            print(f"  {name + ' ' + what:32} {one:8.3f} {two:8.3f} {two - one:8.3f}")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the first part (default: 120)")
    parser.add_argument("--flood", type=int, default=_FLOOD, help=f"requests of the flood (default: {_FLOOD})")
    parser.add_argument(
        "--max-waiting", type=int, default=MAX_WAITING,
        help=f"of the flood so many wait at the broker, others try again and again (default: {MAX_WAITING})",
    )  # fmt: skip
    parser.add_argument("--seed", default="real", help="of all that is drawn (default: real)")
    options = parser.parse_args()
    if options.seconds > 0:
        shares_and_waits(options.seconds, options.seed)
    if options.flood > 0:
        fairness(options.flood, options.max_waiting, options.seed)


if __name__ == "__main__":
    main()
