"""The ends of the traffic benchmarks: the workers and clients of a relay, as plain TCP sockets in this process.

All relays carry the same TMQ/1 messages. What differs is how an end speaks with its relay: ZMTP and a TMQ/1 session
with zmq-broker, ZMTP alone with the forwarders (zmtp_ends.py), the text protocol with NATS (nats_ends.py). What is
sent when is the business of `streams.py` and `closed_loop.py`.
"""

from __future__ import annotations

import os
import re
import select
import time
from abc import ABC, abstractmethod
from collections import deque

from connection import Connection
from relays import Relay

from tokenmq.protocol.codec import encode
from tokenmq.protocol.limits import MAX_CREDIT_TOKENS
from tokenmq.protocol.messages import ID_BYTES, Envelope, Request
from tokenmq.protocol.payload import Generation, Sampling, pack_generation

MODEL = "benchmark"
SOFTWARE = "tokenmq-benchmark"
PAYLOAD = pack_generation(
    Generation(prompt="What is the capital of France?", sampling=Sampling(max_tokens=1, temperature=0.7, seed=17))
)
_BEAT_S = 1.0


def worker_name(number: int) -> str:
    """Return what a worker calls itself, in READY and at the end of each request."""
    return f"worker-{number}"


class Ends(ABC):
    """The workers and clients of one relay, connected and ready.

    Attributes:
        relay: the relay's name.
        workers: the connections of the workers.
        clients: the connections of the clients.
        ids: the request ids of each client's streams.
        poll: for whoever waits for them. It is older than the connections, since select() takes only low numbers.
    """

    #: What one engine step brings for one client travels in one message.
    joined = False
    #: What octets 8 to 24 of CHUNKS and of FINISH are: the client's route; else they are the request's id.
    chunks_by_route = False
    finish_by_route = False

    def __init__(self, relay: Relay, workers: int, clients: int, streams: int, slots: int) -> None:
        """Connect all and begin the streams.

        Args:
            relay: where to.
            workers: how many of them.
            clients: how many of them.
            streams: requests that each client begins, and that go on for ever; see `streams_of`.
            slots: of each worker; where several have streams, as many as it has of them.

        Raises:
            BenchmarkError: the relay does not do its part.
        """
        self.relay = relay.name
        self.workers: list[Connection] = []
        self.clients: list[Connection] = []
        self.ids = [[os.urandom(ID_BYTES) for _ in range(streams)] for _ in range(clients)]
        self._shares = workers
        self._beats: deque[tuple[float, Connection]] = deque()
        self._working: set[Connection] = set()
        self.poll = select.epoll()
        try:
            self._open(relay, workers, clients, slots)
        except BaseException:
            self.close()
            raise
        # Spread over the interval, as those of peers are that know nothing of one another.
        everybody, now = [*self.workers, *self.clients], time.monotonic()
        self._beats = deque(
            (now + _BEAT_S * number / len(everybody), each) for number, each in enumerate(everybody, start=1)
        )
        self._working = set(self.workers)

    @abstractmethod
    def _open(self, relay: Relay, workers: int, clients: int, slots: int) -> None:
        """Connect all and begin the streams."""

    def close(self) -> None:
        """Close all connections."""
        for connection in (*self.workers, *self.clients):
            connection.socket.close()
        self.poll.close()

    def beat(self) -> list[Connection]:
        """Send the heartbeats that are due; return the workers among those that sent one, for `listen`."""
        beats = self._beats
        if not beats or (now := time.monotonic()) < beats[0][0]:
            return []
        workers = []
        while beats[0][0] <= now:
            due, connection = beats.popleft()
            self._say(connection)
            beats.append((due + _BEAT_S, connection))
            if connection in self._working:
                workers.append(connection)
        return workers

    @property
    def next_beat(self) -> float:
        """When `beat` has something to do, by the monotonic clock."""
        return self._beats[0][0]

    def _begins(self, connection: Connection) -> None:
        """Have heartbeats of this session sent, also while others are not connected yet."""
        self._beats.append((time.monotonic() + _BEAT_S, connection))

    def _say(self, connection: Connection) -> None:  # noqa: B027 (only sessions have heartbeats)
        """Send a heartbeat."""

    def listen(self, connection: Connection) -> None:
        """Read what has arrived besides tokens.

        Raises:
            BenchmarkError: it is the end of the session.
        """
        connection.rest += connection.receive()
        units, end = self.units(connection.rest)
        for unit in units:
            self.take(connection, unit)
        connection.rest = connection.rest[end:]

    # Streams.

    def streams_of(self, worker: int) -> list[tuple[int, int]]:
        """Return client and number of the streams that a worker has: dealt out, one after the other."""
        each = len(self.ids[0]) if self.ids else 0
        return [divmod(number, each) for number in range(worker, len(self.ids) * each, self._shares)]

    def route(self, client: int) -> bytes:
        """Return what stands in octets 8 to 24 of CHUNKS for this client; by default its number."""
        return client.to_bytes(ID_BYTES, "big")

    @abstractmethod
    def outgoing(self, client: int, body: bytes) -> bytes:
        """Return what a worker writes to send a message to a client."""

    @abstractmethod
    def incoming(self, client: int, body: bytes) -> bytes:
        """Return how this message arrives at the client."""

    @abstractmethod
    def units(self, data: bytes) -> tuple[list[bytes], int]:
        """Return what has arrived one by one, as it arrived, and the length of all of them together."""

    @abstractmethod
    def take(self, connection: Connection, unit: bytes) -> None:
        """Take what has arrived besides tokens.

        Raises:
            BenchmarkError: it is the end of the session, or of a request.
        """

    # Requests and answers.

    @abstractmethod
    def asking(self, client: int) -> tuple[bytes, bytes]:
        """Return what a client writes to make a request: what stands before the request's id, and what behind it."""

    @property
    @abstractmethod
    def requests(self) -> re.Pattern[bytes]:
        """What finds requests in all that a worker has got: `id` is a request's id, `way` the way back."""

    @property
    @abstractmethod
    def way(self) -> bytes:
        """A way back to nobody, as long as the real ones."""

    @abstractmethod
    def answer(self, way: bytes, body: bytes) -> bytes:
        """Return what a worker writes to send a message back by this way."""


def request(id: bytes, route: bytes | None = None) -> list[bytes]:
    """Return the frames of a request; `route` as a broker puts it in, where no broker does."""
    return encode(Request(id, Envelope(MODEL, 1, MAX_CREDIT_TOKENS, expected_tokens=1, route=route), PAYLOAD))
