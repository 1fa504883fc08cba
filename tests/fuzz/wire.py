"""Targets: what decodes frames and payloads. It returns or refuses, in bounded time and memory, and never else."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tokenmq.protocol import limits
from tokenmq.protocol.codec import HEADER_BYTES, decode, encode, with_route
from tokenmq.protocol.errors import BadRequestError, ProtocolError
from tokenmq.protocol.messages import Command, Request
from tokenmq.protocol.payload import pack_generation, unpack_generation

from . import corpus
from .mutate import mutated
from .target import Broken

#: Memory that decoding may take at its peak, by the bytes that came: an empty map takes 3 of them with its key, and
#: 350 as a dict with the pairs that it was made of. What is below `_BELIEVED` of packing.py may take 2 MB.
_MOST_PER_BYTE = 160
_MOST_MORE_BYTES = 2_500_000
#: Far longer than any input of these lengths takes, also on a machine that does something else.
_MOST_S = 10.0
#: To trace memory takes several times as long.
_TRACED = 0.02
#: What is told of a stranger's bytes.
_MOST_TOLD = 700


def bounded(frames: Sequence[bytes], traced: bool, call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error by which it refuses; raise Broken where it is too costly, or fails."""
    size = sum(map(len, frames))
    if traced:
        tracemalloc.start()
    began = time.process_time()
    try:
        found = call()
    except (ProtocolError, BadRequestError) as error:
        found = error
    except BaseException as error:
        raise Broken.by(error, [frames]) from error
    finally:
        peak = tracemalloc.get_traced_memory()[1] if traced else 0
        if traced:
            tracemalloc.stop()
    if peak > _MOST_PER_BYTE * size + _MOST_MORE_BYTES and not _by_others(call, peak):
        raise Broken(f"{peak} bytes of memory for {size}", [frames])
    if time.process_time() - began > _MOST_S:
        raise Broken(f"more than {_MOST_S} s for {size} bytes", [frames])
    return found


def _by_others(call: Callable[[], Any], peak: int) -> bool:
    """Tell whether a peak was not the call's own: other threads, of the target `ports`, take memory meanwhile."""
    for _ in range(3):
        tracemalloc.start()
        with contextlib.suppress(ProtocolError, BadRequestError):
            call()
        again = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        if again < peak // 2:
            return True
    return False


class Messages:
    """`decode`, and what the broker does with the bytes of a REQUEST. Every command, in both directions."""

    name = "messages"

    def __init__(self) -> None:
        self._all = [frames for each in corpus.golden().values() for frames in each] + corpus.odd()

    def case(self, random: Random) -> int:
        command = random.choice(list(Command))
        frames = mutated(random, random.choice(corpus.golden()[command]), self._all, HEADER_BYTES)
        self.check(frames, traced=random.random() < _TRACED)
        return 1

    def check(self, frames: list[bytes], *, traced: bool) -> None:
        """Decode; a message must come back from its own frames, a refusal must be short and name what it may."""
        found = bounded(frames, traced, lambda: decode(frames))
        if isinstance(found, ProtocolError):
            if not 0 < len(found.message) < _MOST_TOLD:
                raise Broken(f"a refusal of {len(found.message)} characters", [frames])
            answerable = bool(frames) and len(frames[0]) >= HEADER_BYTES and frames[0][4] in _ANSWERABLE
            if found.subject is not None and not (answerable and found.subject == frames[0][8:HEADER_BYTES]):
                raise Broken("a refusal that names a request which is none", [frames])
            return
        again = bounded(frames, False, lambda: decode(encode(found)))
        if again != found:
            raise Broken(f"{found!r:.500}\ncame back as\n{again!r:.500}", [frames])
        if isinstance(found, Request):
            self._check_route(frames)

    @staticmethod
    def _check_route(frames: list[bytes]) -> None:
        """Where the broker adds the route to a REQUEST without reading it, the worker reads just that."""
        first = with_route(frames[0], b"R" * 16)
        if first is None:
            return
        there = bounded(frames, False, lambda: decode([first, *frames[1:]]))
        if not isinstance(there, Request) or there.envelope.route != b"R" * 16:
            raise Broken(f"with a route it is {there!r:.500}", [frames])

    def close(self) -> None:
        """Have nothing to leave."""


_ANSWERABLE = (Command.REQUEST, Command.QUERY)


class Payloads:
    """`unpack_generation`: what only workers read."""

    name = "payloads"

    def case(self, random: Random) -> int:
        others = [[each] for each in corpus.payloads()]
        (payload, *_) = mutated(random, [random.choice(corpus.payloads())], others, 0) or [b""]
        found = bounded([payload], random.random() < _TRACED, lambda: unpack_generation(payload))
        if isinstance(found, BadRequestError):
            if not 0 < len(found.message) < _MOST_TOLD:
                raise Broken(f"a refusal of {len(found.message)} characters", [[payload]])
            return 1
        packed = bounded([payload], False, lambda: pack_generation(found))
        again = bounded([payload], False, lambda: unpack_generation(packed))
        if again != found:
            raise Broken(f"{found!r:.500}\ncame back as\n{again!r:.500}", [[payload]])
        return 1

    def close(self) -> None:
        """Have nothing to leave."""


class Large:
    """Both once more, with inputs as large as they may be: a few seconds each, and none of them harmless."""

    name = "large"

    def case(self, random: Random) -> int:
        command = random.choice(list(Command))
        size = random.choice((70_000, 270_000, 1_100_000, limits.MAX_BODY_BYTES + 1))
        unit = random.choice(_UNITS)
        body = _FIELDS.get(command, b"") + b"\xdd" + min(size // len(unit), 2**20).to_bytes(4, "big")
        body = (body + unit * (size // len(unit) + 1))[:size]
        if random.random() < 0.3:
            found = bounded([body], True, lambda: unpack_generation(body))
            return 1 + isinstance(found, str)
        frames = [bytes([*b"TMQ\x01", command, 0, 0, 0]) + bytes(16) + body]
        bounded(frames, True, lambda: decode(frames + [b""] * (command is Command.REQUEST)))
        return 1

    def close(self) -> None:
        """Have nothing to leave."""


#: Elements that take much more memory than bytes, or promise to.
_UNITS = (
    b"\x90", b"\x80", b"\x81\xa0\xc0", b"\xa2\xc4\x80", b"\xa3\xe2\x82\xac", b"\xcb" + b"\x01" * 8, b"\xc4\x02ab",
    b"\x91\x91\x91\x90", b"\xdd\x00\x0f\xff\xff", b"\xdf\x00\x00\xff\xff\xa1a", b"\x91", b"\xce\x7f\xff\xff\xff",
)  # fmt: skip
_FIELDS = {
    Command.REPLY: b"\x81\xa6result",
    Command.QUERY: b"\x82\xa6method\xa1m\xa9arguments\x81\xa1a",
    Command.READY: b"\x81\xa6models",
    Command.CHUNKS: b"",
}
