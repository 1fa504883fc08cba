"""The honest peers of flood.py: paced streams and single requests, and how long each token and each request takes.

The worker and all clients are plain sockets of this process, as in latency.py. Here other peers take part, so what
arrives is looked at message by message, and what did not arrive counts with the time for which it is missing.
"""

from __future__ import annotations

import os
import select
import time

from closed_loop import answer_form, find
from connection import Connection
from ends import Ends
from relays import Relay
from streams import Burst, burst, percentiles_ms, warm_s

from tokenmq.protocol.codec import PREFIX
from tokenmq.protocol.messages import ID_BYTES, Command

INTERVAL_S = 0.02
REQUESTS_PER_S = 200
_NS = 1e9
_NUMBER_BYTES = 8
#: What is on its way in the end gets so long to arrive.
_PATIENCE_S = 1.0
_CHUNKS, _ERROR = PREFIX[Command.CHUNKS], PREFIX[Command.ERROR]


class Bystanders:
    """One worker, and clients with a stream each; they also make requests, in turns.

    Attributes:
        tokens_ns: how long each token took, from the worker's write to the client's read.
        requests_ns: how long each request took until its token, in the same way.
        refused: requests that were answered by an ERROR.
    """

    def __init__(self, ends: Ends) -> None:
        """Know the ends: one worker with a slot for each stream, and some more."""
        self.tokens_ns: list[int] = []
        self.requests_ns: list[int] = []
        self.refused = 0
        self._ends = ends
        self._bursts: list[Burst] = [burst(ends, [(client.number, 0)]) for client in ends.clients]
        self._sizes = {len(each.data) for each in self._bursts}
        self._stamp_at = self._bursts[0].stamp_at
        self._form = answer_form(ends, 0, finish=True)
        self._prefix = os.urandom(ID_BYTES - _NUMBER_BYTES)
        self._asking = [ends.asking(client.number) for client in ends.clients]
        self._asked: dict[bytes, int] = {}
        self._sent_ns: list[int] = []
        self._clients = {client.socket.fileno(): client for client in ends.clients}
        self._worker = ends.workers[0]
        self._worker_fd = self._worker.socket.fileno()
        self._measured_from = 0
        for number in (*self._clients, self._worker_fd):
            ends.poll.register(number, select.EPOLLIN)

    def run(self, relay: Relay, seconds: float) -> dict[str, float]:
        """Go on for so long; return the figures.

        Raises:
            BenchmarkError: the broker has ended a session of ours.
        """
        began = time.perf_counter_ns()
        self._measured_from = began + int(warm_s(seconds) * _NS)
        end = self._measured_from + int(seconds * _NS)
        gaps = (INTERVAL_S / len(self._clients) * _NS, _NS / REQUESTS_PER_S)
        done = [0, 0]
        cpu_s = relay.cpu_s()
        while (now := time.perf_counter_ns()) < end:
            dues = [began + int(count * gap) for count, gap in zip(done, gaps, strict=True)]
            if now < min(dues):
                self._receive((min(dues) - now) / _NS)
            elif dues[0] <= dues[1]:
                self._bring(done[0])
                done[0] += 1
            else:
                self._ask(done[1])
                done[1] += 1
            self._ends.beat()
        cpu_s, lasted = relay.cpu_s() - cpu_s, (time.perf_counter_ns() - began) / _NS
        until = time.perf_counter() + _PATIENCE_S
        while (self._asked or len(self.tokens_ns) < len(self._sent_ns)) and time.perf_counter() < until:
            self._receive(_PATIENCE_S / 100)
            self._worker.flush()
            self._ends.beat()
        now = time.perf_counter_ns()
        unanswered = [asked for asked in self._asked.values() if asked >= self._measured_from]
        self.requests_ns += [now - asked for asked in unanswered]
        # All tokens take the same way, so those that are missing are the last ones.
        missing = self._sent_ns[len(self.tokens_ns) :]
        self.tokens_ns += [now - sent for sent in missing]
        tokens, requests = percentiles_ms(self.tokens_ns), percentiles_ms(self.requests_ns)
        return {
            "p50_ms": tokens["p50_ms"],
            "p99_ms": tokens["p99_ms"],
            "request_p50_ms": requests["p50_ms"],
            "request_p99_ms": requests["p99_ms"],
            "max_ms": max(tokens["max_ms"], requests["max_ms"]),
            "unanswered": len(unanswered) + self.refused,
            "missing": len(missing),
            "relay_cpu_share": cpu_s / lasted,
        }

    def _bring(self, number: int) -> None:
        part = self._bursts[number % len(self._bursts)]
        now = time.perf_counter_ns()
        if now >= self._measured_from:
            self._sent_ns.append(now)
        part.stamp(now)
        self._worker.send(part.data, part.messages)

    def _ask(self, number: int) -> None:
        client = self._ends.clients[number % len(self._clients)]
        head, tail = self._asking[client.number]
        id = self._prefix + number.to_bytes(_NUMBER_BYTES, "big")
        self._asked[id] = time.perf_counter_ns()
        client.send(head + id + tail)

    def _receive(self, wait_s: float) -> None:
        # epoll rounds its timeout to milliseconds; select does not, and waits for the epoll itself.
        select.select([self._ends.poll], [], [], wait_s)
        for number, _ in self._ends.poll.poll(0):
            if number == self._worker_fd:
                self._serve()
            else:
                self._take(self._clients[number])

    def _serve(self) -> None:
        worker = self._worker
        requests, worker.rest = find(self._ends.requests, worker.rest + worker.receive())
        worker.flush()
        if requests:
            worker.send(b"".join([self._form % request for request in requests]), 2 * len(requests))

    def _take(self, client: Connection) -> None:
        data = client.rest + client.receive()
        now = time.perf_counter_ns()
        client.flush()
        units, end = self._ends.units(data)
        client.rest = data[end:]
        for unit in units:
            if _CHUNKS not in unit:
                if _ERROR in unit:
                    self.refused += self._ended(unit) is not None
                else:
                    self._ends.take(client, unit)
            elif len(unit) in self._sizes and self._prefix not in unit:
                moment = int.from_bytes(unit[self._stamp_at : self._stamp_at + _NUMBER_BYTES], "big")
                if moment >= self._measured_from:
                    self.tokens_ns.append(now - moment)
            elif (asked := self._ended(unit)) is not None and asked >= self._measured_from:
                self.requests_ns.append(now - asked)

    def _ended(self, unit: bytes) -> int | None:
        """Return when the request that this message is about was asked for; None where it is about none."""
        at = unit.find(self._prefix)
        return None if at < 0 else self._asked.pop(unit[at : at + ID_BYTES], None)
