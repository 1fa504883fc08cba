"""The ends of ZeroMQ relays: zmq-broker with its sessions, the bare forwarder, libzmq's proxy."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import zmtp
from connection import Connection
from ends import MODEL, SOFTWARE, Ends, request, worker_name
from relays import Relay
from rounds import BenchmarkError

from tokenmq.protocol.codec import PREFIX, decode, encode, header
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import (
    ID_BYTES,
    NO_ID,
    Accepted,
    Command,
    Disconnect,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Load,
    Message,
    ModelInfo,
    Ready,
    Request,
    Welcome,
)

#: The routing ids that libzmq makes.
_PEER_BYTES = 5
#: The header of a REQUEST up to its id.
_REQUEST = re.escape(PREFIX[Command.REQUEST])
#: A request as a worker gets it: the return route stands in the envelope behind its key and the head of 16 octets.
ROUTED = re.compile(_REQUEST + rb"(?P<id>.{16}).*?\xa5route\xc4\x10(?P<way>.{16})", re.DOTALL)
_FRAMED = re.compile(rb"(?P<way>\x01\x05.{5})(?:\x01.|\x03.{8})" + _REQUEST + rb"(?P<id>.{16})", re.DOTALL)
_STARTED = PREFIX[Command.STARTED]
_Kind = TypeVar("_Kind")
#: Connections that shake hands at a time: a thousand of them in a row would take seconds.
_HANDS = 100
_PATIENCE_S = 20.0
_PAUSE_S = 0.001


class ZmtpEnds(Ends):
    """What the ends of all ZeroMQ relays have in common: to a client goes one frame a message."""

    def outgoing(self, client: int, body: bytes) -> bytes:
        """Return one frame: its header names the client."""
        return zmtp.frame(body)

    def incoming(self, client: int, body: bytes) -> bytes:
        """Return one frame."""
        return zmtp.frame(body)

    def units(self, data: bytes) -> tuple[list[bytes], int]:
        """Return frames."""
        found, end = zmtp.scan(data)
        return [data[at:stop] for _, at, _, stop in found], end

    def take(self, connection: Connection, unit: bytes) -> None:
        """Take a message of one frame; libzmq's own commands have no meaning here."""
        flags, _, begin, end = zmtp.scan(unit)[0][0]
        if not flags & zmtp.COMMAND:
            _check(_decoded([unit[begin:end]]))

    def asking(self, client: int) -> tuple[bytes, bytes]:
        """Return the frames of a request, cut where the id stands."""
        frames = request(NO_ID, self._own_route(client))
        wire = zmtp.message(*frames)
        at = zmtp.head_bytes(len(frames[0])) + 8
        return wire[:at], wire[at + ID_BYTES :]

    def _own_route(self, client: int) -> bytes | None:
        """Return the route of a client where the relay does not put it into the request."""
        return self.route(client)

    @property
    def requests(self) -> re.Pattern[bytes]:
        """The way back is the route."""
        return ROUTED

    @property
    def way(self) -> bytes:
        """A route."""
        return b"\xf0" * ID_BYTES

    def answer(self, way: bytes, body: bytes) -> bytes:
        """Return one frame: its header names the client."""
        return zmtp.frame(body)

    def _connect(self, port: int, number: int) -> Connection:
        connection = self._call(port, number)
        self._shake(connection)
        return connection

    def _connect_all(self, port: int, count: int, first: Callable[[int], bytes]) -> Iterator[Connection]:
        """Connect many, and send the first message of each, of one frame."""
        for begin in range(0, count, _HANDS):
            called = [self._call(port, number) for number in range(begin, min(begin + _HANDS, count))]
            for connection in called:
                self._shake(connection)
                # Not before: libzmq refuses messages from a peer until it has said READY itself.
                connection.send(zmtp.frame(first(connection.number)))
            yield from called

    @staticmethod
    def _call(port: int, number: int) -> Connection:
        connection = Connection(port, number)
        connection.send(zmtp.GREETING + zmtp.ready("DEALER"), 0)
        return connection

    @staticmethod
    def _shake(connection: Connection) -> None:
        size = len(zmtp.GREETING)
        connection.until(lambda data: len(data) >= size)
        greeting, connection.rest = connection.rest[:size], connection.rest[size:]
        if greeting[:1] + greeting[9:11] != b"\xff\x7f\x03":
            raise BenchmarkError("the relay does not speak ZMTP 3")
        connection.until(_has_frame)
        flags, _, begin, end = zmtp.scan(connection.rest)[0][0]
        if not (flags & zmtp.COMMAND and connection.rest[begin:end].startswith(b"\x05READY")):
            raise BenchmarkError(f"the relay refuses the handshake: {connection.rest[begin:end]!r:.80}")
        connection.rest = connection.rest[end:]


class BrokerEnds(ZmtpEnds):
    """Sessions with zmq-broker: it chooses the worker, tells the worker each client's route, and counts messages."""

    joined = True
    chunks_by_route = True

    def _open(self, relay: Relay, workers: int, clients: int, slots: int) -> None:
        self._routes: dict[int, bytes] = {}
        #: What is told of each worker in its heartbeats.
        self._loads: dict[Connection, Load] = {}
        for client in self._connect_all(relay.frontend, clients, _hello):
            self.clients.append(client)
            self._expect(client, Welcome)
            self._begins(client)
            self.beat()
        for number in range(workers):
            worker = self._connect(relay.backend, number)
            self.workers.append(worker)
            models = (ModelInfo(MODEL),)
            self._tell(worker, Ready(worker_name(number), 1, SOFTWARE, models, slots, "none", Load(), 1.0))
            self._expect(worker, Accepted)
            # Those before it have no free slot any more.
            self._begin_streams(number)
            self._begins(worker)
            self.beat()
        self._await_started()

    def _begin_streams(self, number: int) -> None:
        """Make the requests of a worker's streams, and learn the ways back."""
        worker = self.workers[number]
        owners = {self.ids[client][stream]: client for client, stream in self.streams_of(number)}
        self._loads[worker] = Load(running=len(owners), held=len(owners))
        for id, client in owners.items():
            self.clients[client].send(zmtp.message(*request(id)))
        asking = [self.clients[client] for client in set(owners.values())]
        end = time.monotonic() + _PATIENCE_S
        while owners:
            asking = [client for client in asking if not client.flush()]
            self.beat()
            if time.monotonic() > end:
                raise BenchmarkError(f"{len(owners)} requests did not reach their worker in {_PATIENCE_S:g} s")
            time.sleep(_PAUSE_S)
            for frames in _messages(worker):
                message = _decoded(frames)
                if isinstance(message, Request):
                    self._routes[owners.pop(message.id)] = message.envelope.route or NO_ID
                else:
                    _check(message)

    def _await_started(self) -> None:
        """Read what tells each client that its requests run, so that it is not in the way of tokens."""
        end = time.monotonic() + _PATIENCE_S
        missing = {client: len(ids) for client, ids in zip(self.clients, self.ids, strict=True) if ids}
        while missing:
            for client in list(missing):
                client.rest += client.receive()
                units, whole = self.units(client.rest)
                client.rest = client.rest[whole:]
                for unit in units:
                    if _STARTED in unit:
                        missing[client] -= 1
                    else:
                        self.take(client, unit)
                if not missing[client]:
                    del missing[client]
            self.beat()
            if time.monotonic() > end:
                raise BenchmarkError(f"{sum(missing.values())} requests were not told to run in {_PATIENCE_S:g} s")
            time.sleep(_PAUSE_S)

    def route(self, client: int) -> bytes:
        """Return what the broker has told the worker."""
        return self._routes[client]

    def _own_route(self, client: int) -> bytes | None:
        return None

    def _say(self, connection: Connection) -> None:
        self._tell(connection, Heartbeat(connection.sent, self._loads.get(connection)))

    @staticmethod
    def _tell(connection: Connection, message: Message) -> None:
        connection.send(zmtp.message(*encode(message)))

    def _expect(self, connection: Connection, kind: type[_Kind]) -> _Kind:
        while True:
            message = _decoded(_message(connection))
            if isinstance(message, kind):
                return message
            _check(message)


class BareEnds(ZmtpEnds):
    """With the bare forwarder: each client makes itself a name, which stands where TMQ/1 has the route."""

    chunks_by_route = True
    finish_by_route = True

    def _open(self, relay: Relay, workers: int, clients: int, slots: int) -> None:
        for number in range(workers):
            self.workers.append(self._connect(relay.backend, number))
            self.workers[-1].send(zmtp.frame(header(Command.READY, b"\xff" * ID_BYTES)))
        for client in self._connect_all(
            relay.frontend, clients, lambda number: header(Command.HELLO, self.route(number))
        ):
            self.clients.append(client)
            _message(client)


class ProxyEnds(ZmtpEnds):
    """With libzmq's proxy: what a worker sends begins with the client's routing id, as its request did."""

    def _open(self, relay: Relay, workers: int, clients: int, slots: int) -> None:
        self._peers: list[bytes] = []
        # It deals messages out to all workers: while clients make themselves known, there is one.
        self.workers.append(self._connect(relay.backend, 0))
        for number in range(clients):
            self.clients.append(self._connect(relay.frontend, number))
            for id in self.ids[number][:1]:
                self.clients[-1].send(zmtp.message(*request(id, self.route(number))))
                self._peers.append(_message(self.workers[0])[0])
        for number in range(1, workers):
            self.workers.append(self._connect(relay.backend, number))

    def outgoing(self, client: int, body: bytes) -> bytes:
        """Return the client's routing id and one frame."""
        return zmtp.message(self._peers[client], body)

    @property
    def requests(self) -> re.Pattern[bytes]:
        """The way back is the frame with the client's routing id, which comes first."""
        return _FRAMED

    @property
    def way(self) -> bytes:
        """A frame with a routing id."""
        return zmtp.frame(b"\xf0" * _PEER_BYTES, more=True)

    def answer(self, way: bytes, body: bytes) -> bytes:
        """Return the client's frame and one of the message."""
        return way + zmtp.frame(body)


def _has_frame(data: bytes) -> bool:
    return zmtp.scan(data)[1] > 0


def _message(connection: Connection) -> list[bytes]:
    """Wait for the next message; return its frames."""
    frames: list[bytes] = []
    while True:
        connection.until(_has_frame)
        flags, _, begin, end = zmtp.scan(connection.rest)[0][0]
        frame, connection.rest = connection.rest[begin:end], connection.rest[end:]
        if not flags & zmtp.COMMAND:
            frames.append(frame)
            if not flags & zmtp.MORE:
                return frames


def _messages(connection: Connection) -> list[list[bytes]]:
    """Return the frames of each message that has arrived as a whole since."""
    connection.rest += connection.receive()
    made: list[list[bytes]] = []
    frames: list[bytes] = []
    whole = 0
    for flags, _, begin, end in zmtp.scan(connection.rest)[0]:
        if not flags & zmtp.COMMAND:
            frames.append(connection.rest[begin:end])
            if flags & zmtp.MORE:
                continue
            made.append(frames)
            frames = []
        whole = end
    connection.rest = connection.rest[whole:]
    return made


def _hello(number: int) -> bytes:
    return encode(Hello(f"client-{number}", SOFTWARE))[0]


def _decoded(frames: list[bytes]) -> Message:
    try:
        return decode(frames)
    except ProtocolError as error:
        raise BenchmarkError(f"the relay has sent what is no message: {error.message}") from error


def _check(message: Message) -> None:
    """Refuse what ends a session or a request."""
    if isinstance(message, (Disconnect, Error)):
        code = message.code.value if isinstance(message, Disconnect) else message.code
        raise BenchmarkError(f"the relay says {code}: {message.message}")
    if isinstance(message, Goodbye):
        raise BenchmarkError("the relay has ended the session")
