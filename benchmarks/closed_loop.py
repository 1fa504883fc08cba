"""Requests of one token through a relay, so many at a time: each one that ends makes its client ask again."""

from __future__ import annotations

import os
import select
import time

from connection import Connection
from ends import Ends
from relays import Relay
from rounds import BenchmarkError
from streams import Meter, percentiles_ms, warm_s

from tokenmq.protocol.codec import encode
from tokenmq.protocol.messages import ID_BYTES, Chunk, Chunks, Command, Finish, FinishReason, Timings, Usage

_PATIENCE_S = 10.0
#: They stand where an answer gets those of its request.
_ID, _ROUTE = b"I" * ID_BYTES, b"R" * ID_BYTES
_NUMBER_BYTES = 8


class Answers:
    """What a worker writes for a request: CHUNKS with one token, and FINISH where it is wanted."""

    def __init__(self, ends: Ends, *, finish: bool) -> None:
        """Encode both once; only ids and routes differ."""
        chunks = encode(Chunks(_ROUTE, (Chunk(_ID, 1, 0, 0, (12345,), " Paris"),)))[0]
        self._head, behind = chunks.split(_ROUTE)
        self._middle, self._tail = behind.split(_ID)
        timings = Timings(worker_queue_s=0.001, prefill_s=0.02)
        end = encode(Finish(_ID, 1, FinishReason.LENGTH, Usage(8, 1), timings, ""))[0]
        self._end_head, self._end_tail = end.split(_ID)
        self._ends = ends
        self._finish = finish

    def to(self, id: bytes, way: bytes) -> bytes:
        """Return the answer to a request, by the way back that it came with."""
        ends = self._ends
        name = way if ends.chunks_by_route else id
        wire = ends.answer(way, self._head + name + self._middle + id + self._tail)
        if self._finish:
            name = way if ends.finish_by_route else id
            wire += ends.answer(way, self._end_head + name + self._end_tail)
        return wire


class ClosedLoop:
    """All clients and workers of the ends, in one loop that waits in the kernel for what arrives.

    Attributes:
        requests: how many have been answered.
        waits: nanoseconds from the request to its first token, of each one since `waits` was cleared; kept only where
            one is in flight at a time.
    """

    def __init__(self, ends: Ends, in_flight: int, *, finish: bool) -> None:
        """Make ready.

        Args:
            ends: the workers and clients.
            in_flight: requests at a time, of all clients together; a multiple of their number.
            finish: an answer is CHUNKS and FINISH, in two messages; else CHUNKS alone.
        """
        self.requests = 0
        self.waits: list[int] = []
        self._ends = ends
        self._answers = Answers(ends, finish=finish)
        self._messages = 2 if finish else 1
        self._last = Command.FINISH if finish else Command.CHUNKS
        self._asking = [ends.asking(client.number) for client in ends.clients]
        self._each = in_flight // len(ends.clients)
        self._single = in_flight == 1
        self._asked_at = 0
        self._prefix = os.urandom(ID_BYTES - _NUMBER_BYTES)
        self._made = 0
        self._poll = select.epoll()
        self._clients = {client.socket.fileno(): client for client in ends.clients}
        self._workers = {worker.socket.fileno(): worker for worker in ends.workers}
        for number in (*self._clients, *self._workers):
            self._poll.register(number, select.EPOLLIN)

    def run(self, relay: Relay, seconds: float) -> dict[str, float]:
        """Ask and answer for so long; return the figures.

        Raises:
            BenchmarkError: the relay has stopped.
        """
        try:
            for client in self._clients.values():
                self._ask(client, self._each)
            self._go_on(warm_s(seconds))
            self.waits.clear()
            meter = Meter(relay, self.requests, self.requests)
            self._go_on(seconds)
            found = meter.figures(self.requests, self.requests)
        finally:
            self._poll.close()
        figures = {
            "requests_per_s": found["tokens_per_s"],
            "cpu_us_per_request": found["cpu_s_per_million_tokens"],
            "relay_cpu_share": found["relay_cpu_share"],
            "ends_cpu_share": found["ends_cpu_share"],
        }
        return figures | (percentiles_ms(self.waits) if self.waits else {})

    def _go_on(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            ready = self._poll.poll(_PATIENCE_S)
            if not ready:
                raise BenchmarkError(f"{self._ends.relay}: nothing arrived for {_PATIENCE_S:g} s")
            for number, _ in ready:
                worker = self._workers.get(number)
                if worker is None:
                    self._from_relay(self._clients[number])
                else:
                    self._serve(worker)
            self._ends.beat()

    def _ask(self, client: Connection, count: int) -> None:
        head, tail = self._asking[client.number]
        made = []
        for _ in range(count):
            self._made += 1
            made.append(head + self._prefix + self._made.to_bytes(_NUMBER_BYTES, "big") + tail)
        if self._single:
            self._asked_at = time.perf_counter_ns()
        client.send(b"".join(made), count)

    def _from_relay(self, client: Connection) -> None:
        data = client.rest + client.receive()
        if self._single:
            arrived = time.perf_counter_ns()
        client.flush()
        commands, end = self._ends.commands(client, data)
        client.rest = data[end:]
        if self._single and Command.CHUNKS in commands:
            self.waits.append(arrived - self._asked_at)
        done = commands.count(self._last)
        if done:
            self.requests += done
            self._ask(client, done)

    def _serve(self, worker: Connection) -> None:
        data = worker.rest + worker.receive()
        worker.flush()
        requests, end = self._ends.asked(worker, data)
        worker.rest = data[end:]
        if requests:
            answer = self._answers.to
            worker.send(b"".join([answer(id, way) for id, way in requests]), len(requests) * self._messages)
