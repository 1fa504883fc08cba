"""Requests of one token through a relay, so many at a time: each one that ends makes its client ask again.

A fast relay takes a few microseconds for a request, so the ends must not look at each octet in Python: messages are
counted and found by their headers, in all that a socket has brought.
"""

from __future__ import annotations

import os
import re
import select
import time

from connection import Connection
from ends import Ends, worker_name
from relays import Relay
from rounds import BenchmarkError
from streams import Meter, percentiles_ms, warm_s

from tokenmq.protocol.codec import PREFIX, encode
from tokenmq.protocol.messages import ID_BYTES, Chunk, Chunks, Command, Finish, FinishReason, Timings, Usage

_PATIENCE_S = 10.0
#: It stands where an answer gets the id of its request.
_ID = b"\xf1" * ID_BYTES
_NUMBER_BYTES = 8
_CHUNKS, _FINISH, _REQUEST = (PREFIX[command] for command in (Command.CHUNKS, Command.FINISH, Command.REQUEST))
_PREFIX_BYTES = len(_REQUEST)
#: What must not come: DISCONNECT, GOODBYE, ERROR, an error of NATS.
_ENDS = re.compile(
    b"|".join(re.escape(PREFIX[command]) for command in (Command.DISCONNECT, Command.GOODBYE, Command.ERROR))
    + b"|-ERR"
)
#: A request that is cut is kept from so far before its header: there the client's routing id or subject stands.
_BEFORE_HEADER = 64


def answers(chunks_for: bytes, finish_for: bytes, id: bytes, worker: int = 0) -> tuple[bytes, bytes]:
    """Return the messages that answer a request.

    Args:
        chunks_for: what stands in the header of CHUNKS.
        finish_for: what stands in that of FINISH.
        id: the request's.
        worker: the worker's number.
    """
    timings = Timings(worker_queue_s=0.001, prefill_s=0.02)
    chunks = Chunks(chunks_for, (Chunk(id, 1, 0, 0, (12345,), " Paris"),))
    finish = Finish(finish_for, 1, FinishReason.LENGTH, Usage(8, 1), timings, worker_name(worker))
    return encode(chunks)[0], encode(finish)[0]


def answer_form(ends: Ends, worker: int, *, finish: bool) -> bytes:
    """Return the form of what a worker writes for a request: fill in `id` and `way` by the % operator.

    Args:
        ends: knows what stands around the messages, and whether their headers have the id or the route.
        worker: its number; an end tells the worker's name, as a real one's does.
        finish: it is CHUNKS and FINISH, in two messages; else CHUNKS alone.
    """
    chunks, end = answers(
        ends.way if ends.chunks_by_route else _ID, ends.way if ends.finish_by_route else _ID, _ID, worker
    )
    wire = ends.answer(ends.way, chunks)
    if finish:
        wire += ends.answer(ends.way, end)
    return wire.replace(b"%", b"%%").replace(_ID, b"%(id)b").replace(ends.way, b"%(way)b")


def count(rest: bytes, data: bytes, prefix: bytes) -> tuple[int, bytes]:
    """Return how many messages with this prefix have begun in new data, and what to keep for the next ones.

    Args:
        rest: what was kept the last time.
        data: what has arrived since.
        prefix: what such a message's header begins with.

    Raises:
        BenchmarkError: the relay has ended a session or a request.
    """
    data = rest + data
    if _ENDS.search(data):
        raise BenchmarkError(f"the relay has sent {data[-100:]!r}")
    return data.count(prefix), data[1 - len(prefix) :]


def find(pattern: re.Pattern[bytes], data: bytes) -> tuple[list[dict[bytes, bytes]], bytes]:
    """Return `id` and `way` of each request in what a worker has got, and what to keep for the next ones."""
    found = [{b"id": match["id"], b"way": match["way"]} for match in pattern.finditer(data)]
    last = data.rfind(_REQUEST)
    if last < 0:
        return found, data[-_BEFORE_HEADER:]
    if data.count(_REQUEST) == len(found):
        return found, data[last + _PREFIX_BYTES :]
    return found, data[max(0, last - _BEFORE_HEADER) :]


class ClosedLoop:
    """All clients and workers of the ends, in one loop that waits in the kernel for what arrives.

    Attributes:
        requests: how many have been answered.
        waits: nanoseconds from a request to its first token; kept only where one is in flight at a time.
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
        self._forms = {each.number: answer_form(ends, each.number, finish=finish) for each in ends.workers}
        self._messages = 2 if finish else 1
        self._last = _FINISH if finish else _CHUNKS
        prefix = os.urandom(ID_BYTES - _NUMBER_BYTES)
        self._asking = [
            (head + prefix, tail) for head, tail in (ends.asking(client.number) for client in ends.clients)
        ]
        self._each = in_flight // len(ends.clients)
        self._single = in_flight == 1
        self._asked_at = 0
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
                raise BenchmarkError(f"nothing arrived for {_PATIENCE_S:g} s")
            for number, _ in ready:
                worker = self._workers.get(number)
                if worker is None:
                    self._listen(self._clients[number])
                else:
                    self._serve(worker)
            self._ends.beat()

    def _ask(self, client: Connection, number: int) -> None:
        head, tail = self._asking[client.number]
        first = self._made
        self._made += number
        ids = range(first, self._made)
        wire = b"".join([head + id.to_bytes(_NUMBER_BYTES, "big") + tail for id in ids])
        if self._single:
            self._asked_at = time.perf_counter_ns()
        client.send(wire, number)

    def _listen(self, client: Connection) -> None:
        data = client.receive()
        if self._single and _CHUNKS in client.rest + data:
            self.waits.append(time.perf_counter_ns() - self._asked_at)
        client.flush()
        done, client.rest = count(client.rest, data, self._last)
        if done:
            self.requests += done
            self._ask(client, done)

    def _serve(self, worker: Connection) -> None:
        requests, worker.rest = find(self._ends.requests, worker.rest + worker.receive())
        worker.flush()
        if requests:
            form = self._forms[worker.number]
            worker.send(b"".join([form % request for request in requests]), len(requests) * self._messages)
