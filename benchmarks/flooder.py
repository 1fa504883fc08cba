"""The hostile peer of flood.py, a process of its own: `flooder.py KIND FRONTEND_PORT BACKEND_PORT`.

It says `floods` when it begins, goes on until SIGTERM, and then prints what it has done as JSON: messages and bytes
sent, connections made, and how many of them the broker has cut. It comes back as soon as it is cut.

It runs with the policy SCHED_IDLE, so that it takes only what the ends leave of their core.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial

import zmtp
from attacks import (
    ATTACKS,
    BACKEND,
    FRONTEND,
    HELLO,
    HOSTILE,
    Attack,
    Block,
    large,
    numbered,
    ready,
    request,
    streams,
    tokens,
    wire,
)
from closed_loop import answers, find
from zmtp_ends import ROUTED

from tokenmq.protocol.messages import ID_BYTES, Goodbye

_SCRATCH_BYTES = 1 << 20
_LOOK_S = 0.05
_SHAKE_S = 2.0
#: Connections that are left open at a time; a broker takes fewer of them in a second.
_HELD = 2_000
_STREAMS = 16
_SLOTS = 256
#: Small, so that its worker gets its turns.
_PIECE_BYTES = 16 * 1024
_ID, _WAY = b"\xf1" * ID_BYTES, b"\xf0" * ID_BYTES
_ANSWER = b"".join(zmtp.frame(each.replace(b"%", b"%%")) for each in answers(_WAY, _ID, _ID))
_ANSWER = _ANSWER.replace(_ID, b"%(id)b").replace(_WAY, b"%(way)b")
#: Between two tries of a connection that is not taken, so that the broker and not the flooder is measured.
_PAUSE_S = 0.001


@dataclass(slots=True)
class Counts:
    """What was done so far."""

    messages: int = 0
    bytes: int = 0
    connections: int = 0
    cut: int = 0


class StoppedError(Exception):
    """It is to end."""


class Flooder:
    """Floods a broker until it is told to stop.

    Attributes:
        counts: what was done so far.
    """

    def __init__(self, ports: Mapping[str, int]) -> None:
        """Know the ports of the broker, by side."""
        self.counts = Counts()
        self._ports = ports
        self._stopped = False
        self._scratch = bytearray(_SCRATCH_BYTES)
        self._block: Block | None = None
        self._turn = 0

    def stop(self, *_: object) -> None:
        """End soon; a signal handler."""
        self._stopped = True

    def flood(self, attack: Attack) -> None:
        """Send the blocks of an attack, until the connection is cut."""
        block = self._block = self._block or attack.block()
        with self._connect(attack.side) as line:
            if attack.shakes:
                self._shake(line)
            self._write(line, attack.opening, reads=attack.reads)
            sent = 0
            while not attack.most_bytes or sent < attack.most_bytes:
                self._renew(block)
                self._write(line, block.data, reads=attack.reads)
                self.counts.messages += block.messages
                sent += len(block.data)
            while True:
                self._await(line)

    def keep(self, *, reads: bool) -> None:
        """Be a worker and its client at once: streams that bring tokens as fast as they can."""
        ids = [os.urandom(ID_BYTES) for _ in range(_STREAMS)]
        with self._pair(_STREAMS, streams(ids)) as (worker, client):
            block = tokens(self._route(worker), ids)
            while True:
                self._write(worker, block.data, others=[client] if reads else [])
                self.counts.messages += block.messages

    def serve(self) -> None:
        """Make good requests as fast as it can, which a worker of its own answers as fast as that can."""
        block = self._block = self._block or numbered(request(HOSTILE))
        with self._pair(_SLOTS, HELLO) as (worker, client):
            rest, unsent = b"", b""
            while True:
                self._renew(block)
                left = memoryview(block.data)
                while left:
                    self._look()
                    wanted = [client, worker] if unsent else [client]
                    readable, writable, _ = select.select([client, worker], wanted, [], _LOOK_S)
                    if client in readable and not client.recv_into(self._scratch):
                        raise ConnectionResetError
                    if worker in readable:
                        requests, rest = find(ROUTED, rest + self._await(worker))
                        unsent += b"".join([_ANSWER % each for each in requests])
                    if worker in writable:
                        unsent = unsent[worker.send(unsent) :]
                    if client in writable:
                        count = client.send(left[:_PIECE_BYTES])
                        self.counts.bytes += count
                        left = left[count:]
                self.counts.messages += block.messages

    def store(self) -> None:
        """Have large requests wait for a worker that is busy for ever."""
        block = self._block = self._block or large(HOSTILE)
        with self._pair(1, HELLO + wire(request(HOSTILE))) as (worker, client):
            while True:
                self._renew(block)
                self._write(client, block.data, others=[worker])
                self.counts.messages += block.messages

    def greet(self) -> None:
        """Begin a session, end it, close the connection."""
        with self._connect(FRONTEND) as line:
            self._shake(line)
            self._write(line, HELLO + wire(Goodbye()))
            self.counts.messages += 2

    def again(self, visit: Callable[[], None]) -> None:
        """Do it again and again, whatever the broker does about it."""
        while not self._stopped:
            self.counts.cut += self._cuts(visit)

    @staticmethod
    def _cuts(visit: Callable[[], None]) -> bool:
        """Do it once; tell whether the broker has cut it short."""
        try:
            visit()
        except OSError:
            return True
        return False

    def visit(self) -> None:
        """Open connections and close them at once."""
        while True:
            self._look()
            try:
                self._connect(FRONTEND).close()
            except OSError:
                time.sleep(_PAUSE_S)

    def hold(self, said: bytes) -> None:
        """Open connections, say so much, and leave them open; those that are closed are opened again."""
        poll, lines = select.epoll(), dict[int, socket.socket]()
        while True:
            self._look()
            if len(lines) < _HELD:
                try:
                    line = self._connect(FRONTEND)
                    line.send(said)
                except OSError:
                    time.sleep(_PAUSE_S)
                    continue
                lines[line.fileno()] = line
                poll.register(line, select.EPOLLIN)
            for number, _ in poll.poll(_LOOK_S if len(lines) >= _HELD else 0):
                if self._ended(lines[number]):
                    self.counts.cut += 1
                    poll.unregister(number)
                    lines.pop(number).close()

    def _ended(self, line: socket.socket) -> bool:
        try:
            return not line.recv(4096)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _renew(self, block: Block) -> None:
        self._turn += 1
        block.renew(self._turn)

    @contextmanager
    def _pair(self, slots: int, asks: bytes) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Connect a worker and a client that asks for this."""
        with self._connect(BACKEND) as worker, self._connect(FRONTEND) as client:
            self._shake(worker)
            self._write(worker, wire(ready(slots=slots, incarnation=time.monotonic_ns())), reads=False)
            while not self._await(worker):
                pass  # before ACCEPTED nobody knows of what it serves
            self._shake(client)
            self._write(client, asks)
            yield worker, client

    def _look(self) -> None:
        if self._stopped:
            raise StoppedError

    def _connect(self, side: str) -> socket.socket:
        self._look()
        line = socket.create_connection(("127.0.0.1", self._ports[side]), _SHAKE_S)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setblocking(False)
        self.counts.connections += 1
        return line

    def _shake(self, line: socket.socket) -> None:
        """Do the handshake: a peer that speaks before the broker has said READY is refused."""
        line.send(zmtp.GREETING + zmtp.ready("DEALER"))
        heard, end = b"", time.monotonic() + _SHAKE_S
        while len(heard) <= len(zmtp.GREETING) or not zmtp.scan(heard[len(zmtp.GREETING) :])[1]:
            heard += self._await(line, 4096)
            if time.monotonic() > end:
                raise TimeoutError

    def _await(self, line: socket.socket, most: int = _SCRATCH_BYTES) -> bytes:
        """Return what comes within a while.

        Raises:
            ConnectionError: the broker has closed the connection.
        """
        self._look()
        if not select.select([line], [], [], _LOOK_S)[0]:
            return b""
        data = line.recv(most)
        if not data:
            raise ConnectionResetError
        return data

    def _route(self, worker: socket.socket) -> bytes:
        """Return the route of the requests that come."""
        heard, end = b"", time.monotonic() + _SHAKE_S
        while (found := ROUTED.search(heard)) is None:
            heard += self._await(worker)
            if time.monotonic() > end:
                raise TimeoutError
        return found["way"]

    def _write(
        self,
        line: socket.socket,
        data: bytes | bytearray,
        *,
        reads: bool = True,
        others: Sequence[socket.socket] = (),
    ) -> None:
        """Send all of it; meanwhile read what comes, and throw it away.

        Raises:
            OSError: the broker has closed the connection.
        """
        left = memoryview(data)
        listening = [*others, line] if reads else list(others)
        while left:
            self._look()
            readable, writable, _ = select.select(listening, [line], [], _LOOK_S)
            for each in readable:
                if not each.recv_into(self._scratch):
                    raise ConnectionResetError
            if writable:
                count = line.send(left[:_SCRATCH_BYTES])
                self.counts.bytes += count
                left = left[count:]


def kinds(flooder: Flooder) -> Mapping[str, Callable[[], None]]:
    """Return all floods by name; each goes on until it is told to stop."""
    visits: dict[str, Callable[[], None]] = {name: partial(flooder.flood, each) for name, each in ATTACKS.items()}
    visits |= {
        "requests": flooder.serve,
        "large-kept": flooder.store,
        "unread": partial(flooder.keep, reads=False),
        "tokens": partial(flooder.keep, reads=True),
        "greets": flooder.greet,
    }
    return {
        **{name: partial(flooder.again, visit) for name, visit in visits.items()},
        "connects": flooder.visit,
        "silent": partial(flooder.hold, b""),
        "half": partial(flooder.hold, zmtp.GREETING),
    }


def main() -> None:
    """Flood until SIGTERM."""
    kind, frontend, backend = sys.argv[1:]
    flooder = Flooder({FRONTEND: int(frontend), BACKEND: int(backend)})
    signal.signal(signal.SIGTERM, flooder.stop)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    print("floods", flush=True)
    with suppress(StoppedError):
        kinds(flooder)[kind]()
    print(json.dumps(asdict(flooder.counts)), flush=True)


if __name__ == "__main__":
    main()
