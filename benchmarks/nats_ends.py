"""The ends of NATS: each client has a subject of its own, and the workers share one."""

from __future__ import annotations

import re

import nats_text
from connection import Connection
from ends import Ends, request
from relays import Relay
from rounds import BenchmarkError

from tokenmq.protocol.codec import PREFIX
from tokenmq.protocol.messages import ID_BYTES, NO_ID, Command

_WORK, _GROUP = b"work", b"workers"
_REQUESTS = re.compile(
    rb"MSG work 1 (?P<way>\S+) \d+\r\n" + re.escape(PREFIX[Command.REQUEST]) + rb"(?P<id>.{16})", re.DOTALL
)


class NatsEnds(Ends):
    """Sessions with nats-server; the bodies are TMQ/1 messages, a request's frames joined."""

    def _open(self, relay: Relay, workers: int, clients: int, slots: int) -> None:
        for number in range(workers):
            self.workers.append(self._session(relay, number, nats_text.subscribe(_WORK, _GROUP)))
        for number in range(clients):
            self.clients.append(self._session(relay, number, nats_text.subscribe(_subject(number))))

    @staticmethod
    def _session(relay: Relay, number: int, subscription: bytes) -> Connection:
        connection = Connection(relay.frontend, number)
        connection.send(nats_text.connect() + subscription + nats_text.PING)
        # The second PONG says that the subscription stands.
        connection.until(lambda data: data.count(nats_text.PONG) >= 2)
        connection.rest = b""
        return connection

    def outgoing(self, client: int, body: bytes) -> bytes:
        """Return a message to the client's subject."""
        return nats_text.publish(_subject(client), body)

    def incoming(self, client: int, body: bytes) -> bytes:
        """Return it as it is delivered."""
        return nats_text.delivery(_subject(client), body)

    def units(self, data: bytes) -> tuple[list[bytes], int]:
        """Return operations."""
        found, end = nats_text.scan(data)
        starts = [at for _, at, _, _ in found]
        return [data[at:stop] for at, stop in zip(starts, [*starts[1:], end], strict=False)], end

    def take(self, connection: Connection, unit: bytes) -> None:
        """Answer a PING; refuse an error."""
        if unit == nats_text.PING:
            connection.send(nats_text.PONG)
        elif unit.startswith(b"-ERR"):
            raise BenchmarkError(f"the relay says {unit.decode().strip()}")

    def asking(self, client: int) -> tuple[bytes, bytes]:
        """Return a message to the workers with the client's subject as the way back, cut where the id stands."""
        body = b"".join(request(NO_ID, self.route(client)))
        wire = nats_text.publish(_WORK, body, _subject(client))
        at = wire.index(PREFIX[Command.REQUEST]) + 8
        return wire[:at], wire[at + ID_BYTES :]

    @property
    def requests(self) -> re.Pattern[bytes]:
        """The way back is the subject to answer to."""
        return _REQUESTS

    @property
    def way(self) -> bytes:
        """A subject."""
        return b"\xf0" * len(_subject(0))

    def answer(self, way: bytes, body: bytes) -> bytes:
        """Return a message to that subject."""
        return nats_text.publish(way, body)


def _subject(client: int) -> bytes:
    return b"c%04d" % client
