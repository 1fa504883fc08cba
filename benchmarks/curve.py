"""What CURVE costs a broker: the same work with and without it, in turns.

Both ends are DEALERs of libzmq here, in one process on a core of their own, since the plain sockets of the other
benchmarks speak no CURVE. They cost as much as the broker and more, so that a rate is told by them too; what the
broker itself takes is its CPU time for each token, request or connection. That is divided into the loop, which is
Python, and libzmq's I/O thread, which encrypts and does the handshakes.

flat       tokens as fast as they go: 16 streams, one for each of 16 clients
flat-16    the same, 16 streams for each of 4 clients, joined in one message for each step
paced      20 streams, one for each client, a token each 20 ms; times are from the worker's send to the client's
           receive
requests   requests of one token, 64 in flight, from 8 clients to one worker that answers at once
connect    one connection after the other: from connect() until the broker's WELCOME; then it is closed

plain      without CURVE
curve      with it: every peer has its key, and the broker has looked it up in its folder

Run: python benchmarks/curve.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import rounds
import zmq
from closed_loop import answers
from ends import MODEL, SOFTWARE, request
from relays import BROKER, LIFTED, Relay, notes, relay
from rounds import BenchmarkError
from streams import percentiles_ms, warm_s
from strides import STAMP, STAMP_BYTES
from zmtp_ends import ROUTED

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import (
    ID_BYTES,
    NO_ID,
    Accepted,
    Chunk,
    Chunks,
    Heartbeat,
    Hello,
    Load,
    Message,
    ModelInfo,
    Ready,
    Request,
    Welcome,
)
from tokenmq.transport.keys import Curve, load_pair, public_key
from tokenmq.transport.sockets import connect, dealer

PLAIN, CURVE = "plain", "curve"
COLUMNS = {
    "per_s": "a second",
    "cpu_us_each": "broker's CPU us each",
    "loop_us_each": "its loop",
    "io_us_each": "its I/O thread",
    "p50_ms": "p50 ms",
    "p99_ms": "p99 ms",
}
INTERVAL_S = 0.02
_WINDOW = 4_000
#: Tokens of a stream that a worker sends at once, flat out.
_REPEAT = 16
_IN_FLIGHT = 64
_PATIENCE_S = 10.0
_PAUSE_S = 0.0005
_NS = 1e9
#: Nobody here sends heartbeats.
_SILENCE = ("--heartbeat-interval", "60", "--expiry", "300")
_TASKS = "/proc/{}/task"
_ID = b"\xf1" * ID_BYTES
_WAY = b"\xf0" * ID_BYTES


def keys(folder: Path) -> Mapping[str, Curve]:
    """Make a broker's folder of keys with a client and a worker; return what each needs, by role.

    Raises:
        BenchmarkError: the command fails.
    """
    broker = folder / "keys"
    made = [["init", str(broker)]]
    made += [
        ["new", role, "--role", role, "--curve", str(broker), "--out", str(folder / f"{role}.key_secret")]
        for role in ("client", "worker")
    ]
    for words in made:
        command = [sys.executable, "-m", "tokenmq.cli.broker", "keys", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"keys {words[0]}: {done.stderr.strip()}")
    server = public_key(str(broker / "server.key"))
    return {role: Curve(load_pair(str(folder / f"{role}.key_secret")), server) for role in ("client", "worker")}


class Used:
    """CPU time of a process by kind of thread, since it was made."""

    def __init__(self, pid: int) -> None:
        """Begin."""
        self._pid = pid
        self._before = self._now()
        self._began = time.perf_counter()

    def figures(self, count: int) -> dict[str, float]:
        """Return what was used for each of so many.

        Raises:
            BenchmarkError: there are none.
        """
        if not count:
            raise BenchmarkError("nothing was done")
        lasted = time.perf_counter() - self._began
        loop, others = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return {
            "per_s": count / lasted,
            "cpu_us_each": (loop + others) / 1e3 / count,
            "loop_us_each": loop / 1e3 / count,
            "io_us_each": others / 1e3 / count,
        }

    def _now(self) -> tuple[int, int]:
        """Return nanoseconds of the first thread, which is the loop, and of all others."""
        found = {}
        try:
            for thread in os.listdir(_TASKS.format(self._pid)):
                found[int(thread)] = int(
                    Path(f"{_TASKS.format(self._pid)}/{thread}/schedstat").read_text().split()[0]
                )
        except OSError as error:
            raise BenchmarkError("the broker has ended, or this kernel has no schedstat") from error
        loop = found.pop(self._pid)
        return loop, sum(found.values())


class Peers:
    """The ends: sockets of libzmq with sessions at the broker."""

    def __init__(self, running: Relay, held: Mapping[str, Curve], clients: int, slots: int) -> None:
        """Connect one worker, and so many clients.

        Args:
            running: the broker.
            held: the keys by role; none for no CURVE.
            clients: how many.
            slots: of the worker.
        """
        self._held = held
        self._running = running
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.worker = self.open("worker")
        models = (ModelInfo(MODEL),)
        self.say(self.worker, Ready("worker-0", 1, SOFTWARE, models, slots, "none", Load(), 1.0))
        self.hear(self.worker, Accepted)
        self.clients = [self.greeted() for _ in range(clients)]

    def open(self, role: str) -> zmq.Socket[bytes]:
        """Return a socket that connects."""
        port = self._running.backend if role == "worker" else self._running.frontend
        endpoint = f"tcp://127.0.0.1:{port}"
        made = dealer(self.context, endpoint, curve=self._held.get(role))
        connect(made, endpoint)
        return made

    def greeted(self) -> zmq.Socket[bytes]:
        """Return the socket of a client with a session."""
        made = self.open("client")
        self.say(made, Hello("client", SOFTWARE))
        self.hear(made, Welcome)
        return made

    @staticmethod
    def say(socket: zmq.Socket[bytes], message: Message) -> None:
        """Send a message."""
        socket.send_multipart(encode(message))

    @staticmethod
    def hear(socket: zmq.Socket[bytes], kind: type[Message]) -> Message:
        """Wait for a message of a kind.

        Raises:
            BenchmarkError: another one comes, or none.
        """
        if not socket.poll(int(_PATIENCE_S * 1000)):
            raise BenchmarkError(f"no {kind.__name__} within {_PATIENCE_S:g} s")
        message = decode(socket.recv_multipart())
        if isinstance(message, Heartbeat):
            return Peers.hear(socket, kind)
        if not isinstance(message, kind):
            raise BenchmarkError(f"expected {kind.__name__}, got {message}")
        return message

    def begin(self, streams: int) -> list[tuple[bytes, list[bytes]]]:
        """Begin so many streams for each client; return each client's route and ids."""
        begun = []
        for client in self.clients:
            ids = [os.urandom(ID_BYTES) for _ in range(streams)]
            route = b""
            for id in ids:
                client.send_multipart(request(id))
                message = self.hear(self.worker, Request)
                assert isinstance(message, Request)
                route = message.envelope.route or NO_ID
            begun.append((route, ids))
        time.sleep(INTERVAL_S)  # the broker may wait a moment before it tells that they run
        for client in self.clients:
            drain(client)
        return begun

    def close(self) -> None:
        """Close all."""
        self.context.destroy(linger=0)


@contextmanager
def peers(running: Relay, held: Mapping[str, Curve], clients: int, slots: int) -> Iterator[Peers]:
    """Connect the ends, and close them in the end."""
    made = Peers(running, held, clients, slots)
    try:
        yield made
    finally:
        made.close()


def drain(socket: zmq.Socket[bytes]) -> list[bytes]:
    """Return the frames that are there."""
    found = []
    try:
        while True:
            found.append(socket.recv(zmq.DONTWAIT))
    except zmq.Again:
        return found


def steps(begun: Sequence[tuple[bytes, list[bytes]]]) -> list[bytes]:
    """Return a message for each client, with one token of each of its streams."""
    return [
        encode(Chunks(route, tuple(Chunk(id, 1, 0, 1000, (12345,), STAMP) for id in ids)))[0] for route, ids in begun
    ]


def flat(ends: Peers, running: Relay, streams: int, seconds: float) -> dict[str, float]:
    """Send tokens as fast as they go."""
    messages = steps(ends.begin(streams))
    sent = got = 0
    used: Used | None = None
    counted = 0
    warm_until = time.perf_counter() + warm_s(seconds)
    end, moved_at = warm_until + seconds, time.perf_counter()
    while (now := time.perf_counter()) < end or used is None:
        if used is None and now >= warm_until:
            used, counted = Used(running.pid), got
        while sent - got < _WINDOW:
            for message in messages:
                for _ in range(_REPEAT):
                    ends.worker.send(message)
            sent += _REPEAT * len(messages)
        new = sum(len(drain(client)) for client in ends.clients)
        got += new
        if new:
            moved_at = now
        elif now > moved_at + _PATIENCE_S:
            raise BenchmarkError(f"nothing arrived for {_PATIENCE_S:g} s")
        else:
            time.sleep(_PAUSE_S)
    return used.figures((got - counted) * streams)


def paced(ends: Peers, running: Relay, seconds: float) -> dict[str, float]:
    """Send a token of each stream in each interval, evenly spread."""
    messages = [bytearray(each) for each in steps(ends.begin(1))]
    at = messages[0].index(STAMP.encode())
    poller = zmq.Poller()
    for client in ends.clients:
        poller.register(client, zmq.POLLIN)
    waits: list[int] = []
    gap = INTERVAL_S / len(messages)
    used: Used | None = None
    began = time.perf_counter()
    warm_until = began + warm_s(seconds)
    tick = 0
    while (now := time.perf_counter()) < warm_until + seconds or used is None:
        if used is None and now >= warm_until:
            used = Used(running.pid)
            waits.clear()
        if now >= began + tick * gap:
            message = messages[tick % len(messages)]
            message[at : at + STAMP_BYTES] = time.perf_counter_ns().to_bytes(STAMP_BYTES, "big")
            ends.worker.send(bytes(message))
            tick += 1
            continue
        for client, _ in poller.poll(1):
            arrived = time.perf_counter_ns()
            tokens = [each for each in drain(client) if len(each) == len(messages[0])]
            waits += [arrived - int.from_bytes(each[at : at + STAMP_BYTES], "big") for each in tokens]
    times = percentiles_ms(waits)
    return used.figures(len(waits)) | {name: times[name] for name in ("p50_ms", "p99_ms")}


def closed(ends: Peers, running: Relay, seconds: float) -> dict[str, float]:
    """Ask and answer, so many requests at a time."""
    made = answers(_WAY, _ID, _ID)
    forms = [form.replace(b"%", b"%%").replace(_ID, b"%(id)b").replace(_WAY, b"%(way)b") for form in made]
    last = encode_prefix(forms[-1])
    number = done = counted = 0
    poller = zmq.Poller()
    for socket in (ends.worker, *ends.clients):
        poller.register(socket, zmq.POLLIN)

    def ask(client: zmq.Socket[bytes], count: int) -> None:
        nonlocal number
        for _ in range(count):
            number += 1
            client.send_multipart(request(number.to_bytes(ID_BYTES, "big")))

    for client in ends.clients:
        ask(client, _IN_FLIGHT // len(ends.clients))
    used: Used | None = None
    warm_until = time.perf_counter() + warm_s(seconds)
    while (now := time.perf_counter()) < warm_until + seconds or used is None:
        if used is None and now >= warm_until:
            used, counted = Used(running.pid), done
        ready = poller.poll(int(_PATIENCE_S * 1000))
        if not ready:
            raise BenchmarkError(f"nothing arrived for {_PATIENCE_S:g} s")
        for socket, _ in ready:
            if socket is ends.worker:
                for found in ROUTED.finditer(b"".join(drain(socket))):
                    for form in forms:
                        socket.send(form % {b"id": found["id"], b"way": found["way"]})
            else:
                ended = sum(1 for frame in drain(socket) if last.match(frame))
                done += ended
                ask(socket, ended)
    return used.figures(done - counted)


def encode_prefix(form: bytes) -> re.Pattern[bytes]:
    """Return what finds messages that begin as this one does."""
    return re.compile(re.escape(form[:5]))


def connecting(ends: Peers, running: Relay, seconds: float) -> dict[str, float]:
    """Connect and leave, again and again."""
    waits = []
    used = Used(running.pid)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter_ns()
        socket = ends.greeted()
        waits.append(time.perf_counter_ns() - began)
        socket.close(linger=0)
    times = percentiles_ms(waits)
    return used.figures(len(waits)) | {name: times[name] for name in ("p50_ms", "p99_ms")}


Work = Callable[[Peers, Relay, float], dict[str, float]]
#: By name: clients, slots, and what is done.
CASES: Mapping[str, tuple[int, int, Work]] = {
    "flat": (16, 16, lambda ends, running, seconds: flat(ends, running, 1, seconds)),
    "flat-16": (4, 64, lambda ends, running, seconds: flat(ends, running, 16, seconds)),
    "paced": (20, 20, paced),
    "requests": (8, _IN_FLIGHT, closed),
    "connect": (0, 1, connecting),
}


def measure(case: str, how: str, seconds: float) -> Mapping[str, float]:
    """Return the figures of a case.

    Raises:
        BenchmarkError: one of those that take part does not do so.
    """
    clients, slots, work = CASES[case]
    with TemporaryDirectory(prefix="tokenmq-bench-") as folder:
        held = keys(Path(folder)) if how == CURVE else {}
        options = ("--curve", str(Path(folder) / "keys")) if held else ()
        with relay(BROKER, (*LIFTED, *_SILENCE, *options)) as running, peers(running, held, clients, slots) as ends:
            return work(ends, running, seconds)


def main() -> None:
    """Measure what the command line asks for."""
    options = rounds.parse(rounds.parser(__doc__, list(CASES), [PLAIN, CURVE], seconds=3.0))
    rounds.run("curve", options, lambda case, how: measure(case, how, options.seconds), COLUMNS, PLAIN, notes)


if __name__ == "__main__":
    main()
