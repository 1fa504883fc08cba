"""A few seconds of each target of the fuzzer, the same ones each time; `make fuzz` is the long run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tokenmq.client import Client, TokenmqError
from tokenmq.protocol.codec import HEADER_BYTES, PREFIX, decode, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import Command, Heartbeat, Welcome

from . import corpus, wire
from .__main__ import TARGETS, Tally, fuzz, random_of
from .mutate import bomb, mutated
from .ports import PortsTarget
from .target import Broken
from .weight import weight
from .zmtp import Raw, frame, greeting, message, ready

#: Cases of each target, about a second or two.
_CASES = {"messages": 4000, "payloads": 4000, "large": 6, "broker": 30, "worker": 40, "client": 40}
ROOT = Path(__file__).parents[2]
_ROUTER = ready(((b"Socket-Type", b"ROUTER"),))


@pytest.mark.parametrize("name", _CASES)
def test_nothing_breaks(name: str) -> None:
    target = TARGETS[name]()
    for number in range(_CASES[name]):
        target.case(random_of(7, name, number))


def test_real_ports_hold() -> None:
    target = PortsTarget()
    try:
        for number in range(4):
            assert target.case(random_of(7, "ports", number)) > 0
    finally:
        target.close()


def test_a_case_comes_back_by_its_seed() -> None:
    def frames(number: int) -> list[bytes]:
        return mutated(random_of(1, "x", number), corpus.golden()[Command.READY][0], corpus.odd(), HEADER_BYTES)

    assert frames(3) == frames(3)
    assert len({tuple(frames(number)) for number in range(20)}) > 10


def test_mutations_reach_both_ends() -> None:
    taken = refused = 0
    for number in range(300):
        random = random_of(1, "reach", number)
        frames = mutated(random, random.choice(corpus.golden()[Command.REQUEST]), corpus.odd(), HEADER_BYTES)
        try:
            decode(frames)
            taken += 1
        except ProtocolError:
            refused += 1
    assert taken > 30
    assert refused > 30


@pytest.mark.parametrize("declared", [4_000, 65_535, 2**20, 2**32 - 1])
def test_declared_lengths_are_not_believed(declared: int) -> None:
    level = b"\xdd" + declared.to_bytes(4, "big")
    body = level * 800 + b"\xc0" * 3000
    frames = [PREFIX[Command.REPLY] + bytes(16) + body]
    found = wire.bounded(frames, True, lambda: decode(frames))
    assert isinstance(found, ProtocolError)


def _raises() -> None:
    raise KeyError("x")


@pytest.mark.parametrize(
    ("call", "told"),
    [(_raises, "KeyError"), (lambda: bytearray(50_000_000), "bytes of memory")],
)
def test_what_breaks_is_told(call: Callable[[], object], told: str) -> None:
    with pytest.raises(Broken, match=told) as caught:
        wire.bounded([b"xyz"], True, call)
    assert caught.value.inputs == [[b"xyz"]]


class _Breaks:
    name = "breaks"

    def case(self, random: Random) -> int:
        if random.random() < 0.2:
            raise Broken("it broke", [[b"\x01"]])
        return 2

    def close(self) -> None:
        """Have nothing to leave."""


def test_a_crash_is_counted_and_ends_the_turn() -> None:
    tally = Tally()
    ((number, broken),) = fuzz("breaks", _Breaks(), tally, 1, 60.0)
    assert (broken.what, tally.crashes, tally.cases, tally.inputs) == ("it broke", 1, number + 1, 2 * number)
    with pytest.raises(Broken):
        _Breaks().case(random_of(1, "breaks", number))


def test_the_command_prints_its_figures() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "1", "--target", "messages", "--target", "payloads"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "inputs in" in done.stdout
    assert ", 0 crashes" in done.stdout


def test_weight_grows_with_what_is_kept() -> None:
    kept: list[object] = []
    before = weight(kept)
    kept.extend([number] for number in range(100))
    assert weight(kept) >= before + 100


def test_bombs_are_small_and_refused() -> None:
    for number in range(200):
        body = bomb(random_of(1, "bomb", number))
        assert len(body) < 70_000
        with pytest.raises(ProtocolError):
            decode([PREFIX[Command.HEARTBEAT] + bytes(16) + body])


def test_zmtp_frames_are_those_of_the_rfc() -> None:
    assert len(greeting()) == 64
    assert frame(b"ab") == b"\x00\x02ab"
    assert frame(b"ab", long=True)[:9] == b"\x02" + bytes(7) + b"\x02"
    assert message([b"a", b""]) == b"\x01\x01a\x00\x00"
    assert ready()[:8] == b"\x04\x1c\x05READY"
    assert message(encode(Heartbeat(1)))[0] == 0


def test_a_client_outlives_a_broker_that_says_much_and_hangs_up() -> None:
    """The first message ends the session, and all the others are still to be read when the connection breaks."""
    met = 0
    much = message(encode(Heartbeat(77))) * 5000
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20.0)
        with Client(f"tcp://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_s=0.1) as client:
            for _ in range(6):
                raw = Raw.of(listener.accept()[0])
                if raw.send(greeting()) and raw.take(64) and raw.send(_ROUTER) and raw.frame() and raw.message():
                    met += raw.send(message(encode(Welcome("b", "b", 1.0, 5.0))) + much)
                raw.close()
            with pytest.raises(TokenmqError) as caught:
                client.models()
    assert met > 2
    assert caught.value.code in ("no_broker", "broker_lost"), caught.value


def test_one_case_is_run_even_in_no_time() -> None:
    tally = Tally()
    assert fuzz("messages", TARGETS["messages"](), tally, 1, 0.0) == []
    assert (tally.cases, tally.inputs) == (1, 1)
