"""Target: real ports of real processes, attacked with raw ZMTP, while an honest client reads streams through them.

The processes: a broker, a worker with a door of its own, and a client. The worker has hostile brokers besides its
own, and so has the client. Looked at after each round: all live, the client has read more, and nothing but whole
streams; memory stays within bounds, and no log has a traceback or a failed assertion.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from tokenmq.client.local import LocalCluster, LocalProcess, free_ports
from tokenmq.protocol.limits import MAX_FRAME_BYTES
from tokenmq.protocol.messages import Command

from .forge import Forger, Known
from .target import Broken
from .zmtp import COMMAND, LONG, MORE, Raw, command, frame, greeting, message, ready

_MODEL = "honest-model"
_READER = Path(__file__).with_name("reader.py")
#: The longest that a look waits for the honest client; far longer than it takes.
_PATIENCE_S = 60.0
#: Resident memory of each process: a broker begins with some 30 MB, a worker and a client with no more. Attacks of
#: one round send less than this.
_MOST_MB = 400
_ROUND = 60
_MECHANISMS = (b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b"", b"null", b"X" * 20, b"\xff" * 20, b"NULL\0\0x")
_DEALER = (b"Socket-Type", b"DEALER")


class HostileBroker:
    """A port where nobody should connect: it greets, or not, and then says what it likes."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed)
        self._forger = Forger(self._random, Known())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.2)
        self.port: int = self._listener.getsockname()[1]
        self.met = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        while not self._closed:
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                continue
            raw = Raw.of(accepted)
            raw.socket.settimeout(0.3)
            self.met += 1
            self._meet(raw)
            raw.close()

    def _meet(self, raw: Raw) -> None:
        random = self._random
        if random.random() < 0.2:
            raw.send(random.randbytes(random.choice((1, 10, 64, 500))))
            return
        router = ((b"Socket-Type", b"ROUTER"), (b"Identity", random.randbytes(random.choice((0, 5, 255)))))
        if not raw.send(greeting()) or raw.take(64) is None or not raw.send(ready(router)) or raw.frame() is None:
            return
        raw.message()  # HELLO, READY
        first = self._forger.frames((Command.WELCOME, Command.ACCEPTED), bent=0.1)
        raw.send(message(first))
        for _ in range(random.choice((0, 3, 30))):
            if random.random() < 0.15:
                raw.send(_odd(random))
                continue
            frames = self._forger.frames(tuple(Command), bent=0.2)
            if not frames or frames[0][4:5] != bytes((Command.DRAIN,)):  # a broker may have its workers leave
                raw.send(message(frames))


def _odd(random: Random) -> bytes:
    """Return frames that may come after a handshake, and should not."""
    kind = random.randrange(12)
    if kind == 0:
        return frame(b"x", declared=random.choice((MAX_FRAME_BYTES + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)))
    if kind == 1:
        return frame(b"", MORE) * random.choice((1, 255, 256, 257, 3000))
    if kind == 2:
        return frame(b"", MORE) * random.choice((1, 300)) + frame(b"")
    if kind == 3:
        return frame(b"") * random.choice((1, 50))
    if kind == 4:
        return command(b"PING", random.randbytes(2) + random.randbytes(random.choice((0, 16, 17, 300))))
    if kind == 5:
        return command(
            random.choice((b"PONG", b"SUBSCRIBE", b"CANCEL", b"ERROR", b"READY", b"XYZ", b"", b"JOIN")), b"abc"
        )
    if kind == 6:
        return command(b"PING", b"\0\0", named=random.choice((0, 3, 5, 255)))
    if kind == 7:
        return frame(random.randbytes(20), random.randrange(256))
    if kind == 8:
        return frame(b"x" * random.choice((300, 70_000)), random.choice((0, MORE, COMMAND, COMMAND | MORE)))
    if kind == 9:
        return bytes((LONG, *random.randbytes(random.randrange(9))))
    if kind == 10:
        return frame(b"short", long=True) + frame(b"x" * 2_000_000, MORE)
    return random.randbytes(random.choice((1, 9, 100, 5000)))


class Attacks:
    """One hostile connection after the other."""

    def __init__(self, random: Random, port: int, known: Known, *, client: bool) -> None:
        self._random, self._port = random, port
        self._forger = Forger(random, known)
        first = Command.HELLO if client else Command.READY
        self._commands = (first, *Command)
        self._first = first
        self._kinds: tuple[Callable[[], None], ...] = (
            self._garbage, self._greetings, self._half, self._properties, self._session, self._session, self._session,
            self._odd, self._odd, self._slowly, self._storm, self._commands_in_handshake,
        )  # fmt: skip

    def one(self) -> int:
        """Attack once; return how many connections that took."""
        kind = self._random.choice(self._kinds)
        with contextlib.suppress(OSError):  # refused, reset: it does as it likes with us
            kind()
        return 30 if kind == self._storm else 1

    def _end(self, raw: Raw) -> None:
        if self._random.random() < 0.3:
            raw.reset()
        else:
            raw.close()

    def _garbage(self) -> None:
        raw = Raw(self._port)
        raw.send(self._random.randbytes(self._random.choice((1, 9, 10, 11, 64, 4096))))
        self._end(raw)

    def _greetings(self) -> None:
        random, raw = self._random, Raw(self._port)
        hello = greeting(
            random.choice(_MECHANISMS), major=random.choice((0, 1, 2, 3, 4, 255)), minor=random.choice((0, 1, 255)),
            server=random.choice((0, 1, 255)),
        )  # fmt: skip
        old = b"\xff" + bytes(7) + b"\x01\x7f" + bytes((random.choice((0, 1, 2)), random.randrange(256)))
        raw.send(random.choice((hello, hello, old, b"\x01\x00", b"\x06\x00abcde")))
        raw.send(ready() + message(self._forger.frames((self._first,))))
        self._end(raw)

    def _half(self) -> None:
        raw = Raw(self._port)
        whole = greeting() + ready() + message(self._forger.frames((self._first,)))
        raw.send(whole[: self._random.randrange(len(whole))])
        self._end(raw)

    def _properties(self) -> None:
        """READY with properties of all kinds, identities first of all."""
        random, raw = self._random, Raw(self._port)
        identity = random.choice(
            (b"", b"x", b"\0", b"\0" + random.randbytes(4), random.randbytes(5), b"i" * 255, b"i" * 256, b"\0" * 255)
        )
        kind = random.choice((b"DEALER", b"DEALER", b"DEALER", b"REQ", b"ROUTER", b"PUB", b"", b"\xff" * 300))
        given = [(b"Socket-Type", kind), (b"Identity", identity)]
        if random.random() < 0.4:
            given.append(
                (random.choice((b"", b"X" * 255, b"Identity", b"User-Id")), b"v" * random.choice((0, 9, 70_000)))
            )
        raw.send(greeting())
        if raw.take(64) is not None:
            raw.send(ready(given))
            if raw.frame() is not None:
                for _ in range(random.choice((0, 1, 3))):
                    raw.send(message(self._forger.frames(self._commands)))
        self._end(raw)

    def _commands_in_handshake(self) -> None:
        random, raw = self._random, Raw(self._port)
        raw.send(greeting(random.choice(_MECHANISMS)))
        for _ in range(random.choice((1, 4))):
            body = random.randbytes(random.choice((0, 8, 194, 200, 1000)))
            raw.send(command(random.choice((b"HELLO", b"INITIATE", b"READY", b"ERROR", b"PING", b"")), body))
        self._end(raw)

    def _greeted(self) -> Raw | None:
        raw = Raw(self._port)
        if raw.handshake((_DEALER,)):
            return raw
        raw.close()
        return None

    def _session(self) -> None:
        """A session, as far as it goes: forged and broken messages behind an honest beginning."""
        random, raw = self._random, self._greeted()
        if raw is None:
            return
        raw.send(message(self._forger.frames((self._first,), bent=0.1)))
        for _ in range(random.choice((1, 5, 30))):
            if not raw.send(message(self._forger.frames(self._commands, bent=0.2))):
                break
        if random.random() < 0.3:
            raw.socket.settimeout(0.1)
            raw.message()
        self._end(raw)

    def _odd(self) -> None:
        random, raw = self._random, self._greeted()
        if raw is None:
            return
        if random.random() < 0.5:
            raw.send(message(self._forger.frames((self._first,), bent=0.0)))
        for _ in range(random.choice((1, 3))):
            raw.send(_odd(random))
        self._end(raw)

    def _slowly(self) -> None:
        """All of it byte by byte."""
        raw = Raw(self._port)
        whole = greeting() + ready() + message(self._forger.frames((self._first,), bent=0.2))[:600]
        for byte in whole:
            if not raw.send(bytes((byte,))):
                break
        self._end(raw)

    def _storm(self) -> None:
        """Many connections that end at once, and some that stay for a moment."""
        kept = []
        for _ in range(30):
            raw = Raw(self._port)
            if self._random.random() < 0.5:
                raw.send(greeting())
            if self._random.random() < 0.3:
                kept.append(raw)
            else:
                self._end(raw)
        for raw in kept:
            raw.close()


class PortsTarget:
    """A cluster that is attacked round by round."""

    name = "ports"

    def __init__(self, seed: int = 1) -> None:
        self._hostile = [HostileBroker(f"{seed} {number}") for number in range(6)]
        evil = [f"tcp://127.0.0.1:{each.port}" for each in self._hostile]
        self._cluster = LocalCluster()
        (door,) = free_ports(1)
        brokers = [part for each in (self._cluster.backend, *evil[:3]) for part in ("--broker", each)]
        self._worker = self._cluster.start_worker(
            "--engine", "synthetic", "--model", _MODEL, "--direct", f"tcp://127.0.0.1:{door}", *brokers
        )
        self._cluster.wait_ready(_MODEL)
        self._lines = self._cluster.folder / "reader.log"
        with self._lines.open("ab") as sink:
            self._reader = subprocess.Popen(
                [sys.executable, str(_READER), _MODEL, self._cluster.frontend, *evil[3:]],
                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            )  # fmt: skip
        self._ports = {
            "frontend": int(self._cluster.frontend.rpartition(":")[2]),
            "backend": int(self._cluster.backend.rpartition(":")[2]),
            "door": door,
        }
        self._look()

    def case(self, random: Random) -> int:
        known = Known(models=("m", "n"), names=("w1", "w2"))
        done = 0
        met = sum(each.met for each in self._hostile)
        for _ in range(_ROUND):
            name = random.choice(("frontend", "frontend", "backend", "backend", "door"))
            done += Attacks(random, self._ports[name], known, client=name != "backend").one()
        self._look()
        return done + sum(each.met for each in self._hostile) - met

    def close(self) -> None:
        self._reader.terminate()
        self._reader.wait()
        self._cluster.close()
        for each in self._hostile:
            each.close()

    def _look(self) -> None:
        """See whether all are well: the client must have read two streams more that began after the attacks."""
        wanted = self._whole() + 2
        until = time.monotonic() + _PATIENCE_S
        while self._whole() < wanted:
            self._alive()
            if time.monotonic() > until:
                raise Broken(f"the honest client has read nothing for {_PATIENCE_S} s\n{self._told()}", [])
            time.sleep(0.02)
        self._alive()
        for process in (self._cluster.broker, self._worker):
            log = process.log.read_text(errors="replace")
            for sign in ("Traceback", "Assertion", "Error:"):
                if sign in log:
                    raise Broken(f"{process.name} has logged {sign!r}\n{log[-3000:]}", [])
        for name, pid in self._pids().items():
            used = _resident_mb(pid)
            if used > _MOST_MB:
                raise Broken(f"{name} has taken {used} MB", [])

    def _whole(self) -> int:
        lines = self._lines.read_text(errors="replace").splitlines()
        odd = [line for line in lines if line != "whole"]
        if odd:
            raise Broken("the honest client says: " + "\n".join(odd[-30:]), [])
        return len(lines)

    def _alive(self) -> None:
        ended: list[LocalProcess] = [
            each for each in (self._cluster.broker, self._worker) if each.exit_code is not None
        ]
        for process in ended:
            raise Broken(f"{process.name} has ended with {process.exit_code}\n{process.log_tail()}", [])
        if self._reader.poll() is not None:
            raise Broken(f"the honest client has ended with {self._reader.returncode}\n{self._told()}", [])

    def _told(self) -> str:
        logs = (self._lines, self._cluster.broker.log, self._worker.log)
        return "\n".join(log.read_text(errors="replace")[-1500:] for log in logs)

    def _pids(self) -> dict[str, int]:
        return {"broker": self._cluster.broker.pid, "worker": self._worker.pid, "client": self._reader.pid}


def _resident_mb(pid: int) -> int:
    """Return the memory that a process has; 0 where the system does not tell it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) // 1024
    return 0
