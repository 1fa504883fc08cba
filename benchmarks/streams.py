"""Streams of tokens through a relay: flat out, or paced as an engine would bring them.

One worker brings the tokens of all streams. What an engine step brings is encoded before the measurement, since only
the relay is to have work. Each message is one token of one stream; where a relay's protocol joins what a step brings
for one client, as TMQ/1 does, it is one message with all of them.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from chaos_figures import percentile
from connection import Connection
from ends import Ends
from relays import Relay
from rounds import BehindError, BenchmarkError
from strides import STAMP, Strides, stamp

from tokenmq.protocol.codec import encode
from tokenmq.protocol.messages import Chunk, Chunks

#: Tokens in flight when it goes flat out, for all relays alike. No client has so many of them that a queue of a relay
#: would overflow.
WINDOW_TOKENS = 20_000
_BURST_TOKENS = 512
#: How often what has arrived is counted; in this time not even the fastest relay empties the window.
_PAUSE_S = 0.001
_PATIENCE_S = 10.0
#: Ordinary numbers, of ordinary length.
_OFFSET, _TOKEN = 1000, 12345
_NS = 1e9
PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999, "max_ms": 1.0}


@dataclass(frozen=True, slots=True)
class Case:
    """The shape of the traffic.

    Attributes:
        clients: connections of clients.
        streams: streams of each of them.
        interval_s: time between two tokens of a stream; None for as fast as it goes.
        groups: into how many steps at equal distances the interval is divided; 1 brings all tokens at once. Each step
            is made by one worker, in turns, and brings the tokens of a part of that one's streams.
        workers: connections of workers, of which `groups` is a multiple.
        together: such a part has streams of few clients, so that their tokens are joined; else it has streams of as
            many clients as possible.
    """

    clients: int
    streams: int
    interval_s: float | None = None
    groups: int = 1
    workers: int = 1
    together: bool = False

    @property
    def slots(self) -> int:
        """Slots of each worker: as many as it has streams."""
        return self.clients * self.streams // self.workers


@dataclass(slots=True)
class Burst:
    """Messages that a worker writes at once.

    Attributes:
        data: all of them, each of the same length.
        messages: how many.
        tokens: how many tokens they bring.
        stamp_at: where the first one's stamp stands.
    """

    data: bytearray
    messages: int
    tokens: int
    stamp_at: int

    def stamp(self, moment: int) -> None:
        """Write the moment into all messages."""
        stamp(self.data, self.stamp_at, len(self.data) // self.messages, moment)


def bodies(ends: Ends, streams: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """Return the messages that bring one token of each of these streams, each with its client.

    Args:
        ends: knows whether tokens of one client are joined.
        streams: client and number of each, those of one client beside each other.
    """
    by_client: dict[int, list[Chunk]] = {}
    for client, number in streams:
        by_client.setdefault(client, []).append(Chunk(ends.ids[client][number], 1, 0, _OFFSET, (_TOKEN,), STAMP))
    made = []
    for client, chunks in by_client.items():
        parts = [tuple(chunks)] if ends.joined else [(chunk,) for chunk in chunks]
        made += [(client, encode(Chunks(ends.route(client), part))[0]) for part in parts]
    return made


def burst(ends: Ends, streams: Sequence[tuple[int, int]], repeat: int = 1) -> Burst:
    """Return one token of each of these streams, so many times, as the worker writes it."""
    wire = [ends.outgoing(client, body) for client, body in bodies(ends, streams)]
    assert len({len(message) for message in wire}) == 1, "messages of different lengths"
    return Burst(
        bytearray(b"".join(wire) * repeat),
        len(wire) * repeat,
        len(streams) * repeat,
        wire[0].index(STAMP.encode()),
    )


class Meter:
    """What was used and done since the measurement began."""

    def __init__(self, relay: Relay, tokens: int, messages: int) -> None:
        """Begin; so much has arrived before."""
        self._relay = relay
        self._before = (tokens, messages)
        self._cpu_s = relay.cpu_s()
        self._own_s = time.process_time()
        self._began = time.perf_counter()

    def figures(self, tokens: int, messages: int) -> dict[str, float]:
        """Return the figures of the time since; so much has arrived in all.

        Raises:
            BenchmarkError: nothing has.
        """
        seconds = time.perf_counter() - self._began
        own_s = time.process_time() - self._own_s
        cpu_s = self._relay.cpu_s() - self._cpu_s
        tokens, messages = tokens - self._before[0], messages - self._before[1]
        if not tokens:
            raise BenchmarkError(f"nothing arrived in {seconds:.1f} s")
        return {
            "tokens_per_s": tokens / seconds,
            "messages_per_s": messages / seconds,
            "cpu_s_per_million_tokens": cpu_s / tokens * 1e6,
            "relay_cpu_share": cpu_s / seconds,
            "ends_cpu_share": own_s / seconds,
        }


def warm_s(seconds: float) -> float:
    """Return how long the work goes on before it is measured for so long."""
    return min(0.5, seconds / 3)


def all_streams(case: Case) -> list[tuple[int, int]]:
    """Return client and number of every stream."""
    return [(client, number) for client in range(case.clients) for number in range(case.streams)]


def steps(ends: Ends, case: Case) -> list[list[tuple[int, int]]]:
    """Return the streams of each step of an interval; the workers take turns."""
    parts = case.groups // case.workers
    size = case.slots // parts
    assert parts * case.workers == case.groups, "the steps cannot be divided among the workers"
    assert size * case.groups == case.clients * case.streams, "the streams cannot be divided among the steps"
    of = [ends.streams_of(number) for number in range(case.workers)]
    places = (divmod(step, case.workers) for step in range(case.groups))
    if case.together:
        return [of[worker][part * size : (part + 1) * size] for part, worker in places]
    return [of[worker][part::parts] for part, worker in places]


class Receivers:
    """All clients: what they get is counted.

    Attributes:
        messages: how many messages with tokens have arrived.
    """

    def __init__(self, ends: Ends, group: Sequence[tuple[int, int]]) -> None:
        """Expect messages like those for this group of streams."""
        self.messages = 0
        made = bodies(ends, group)
        _, body = made[0]
        self._strides = [
            Strides(ends.incoming(client.number, body), ends.units, partial(ends.take, client))
            for client in ends.clients
        ]
        self._tokens = len(group) // len(made)

    @property
    def tokens(self) -> int:
        """How many tokens have arrived."""
        return self.messages * self._tokens

    def receive(self, client: Connection) -> bytes:
        """Count what has arrived for a client; return its whole messages."""
        strides = self._strides[client.number]
        whole, client.rest = strides.split(client.rest + client.receive())
        self.messages += len(whole) // strides.size
        return whole

    def moments(self, client: Connection, whole: bytes) -> list[int]:
        """Return when these messages were sent."""
        return self._strides[client.number].moments(whole)


def flat_out(ends: Ends, relay: Relay, case: Case, seconds: float) -> dict[str, float]:
    """Send as fast as the relay takes it; return the figures.

    Raises:
        BenchmarkError: the relay has stopped.
    """
    streams = all_streams(case)
    part = burst(ends, streams, max(1, _BURST_TOKENS // len(streams)))
    receivers = Receivers(ends, streams)
    worker = ends.workers[0]
    sent = 0
    meter: Meter | None = None
    warm_until = time.perf_counter() + warm_s(seconds)
    end = warm_until + seconds
    last, moved_at = 0, time.perf_counter()
    while (now := time.perf_counter()) < end or meter is None:
        for client in ends.clients:
            receivers.receive(client)
        got = receivers.tokens
        if got != last:
            last, moved_at = got, now
        elif now > moved_at + _PATIENCE_S:
            raise BenchmarkError(f"nothing arrived for {_PATIENCE_S:g} s")
        if meter is None and now >= warm_until:
            meter = Meter(relay, got, receivers.messages)
            end = now + seconds
        while sent - got <= WINDOW_TOKENS - part.tokens and worker.flush():
            worker.send(part.data, part.messages)
            sent += part.tokens
        for heard in ends.beat():
            ends.listen(heard)
        time.sleep(_PAUSE_S)
    return meter.figures(receivers.tokens, receivers.messages)


def paced(ends: Ends, relay: Relay, case: Case, seconds: float) -> dict[str, float]:
    """Send at the case's pace; return the figures, with percentiles of the time from write to read.

    The ends wait in the kernel as real ones do: for the next token's time, or for what arrives.

    Raises:
        BehindError: the relay does not keep up.
        BenchmarkError: not all that was sent has arrived in the end.
    """
    assert case.interval_s is not None
    groups = steps(ends, case)
    bursts = [burst(ends, group) for group in groups]
    receivers = Receivers(ends, groups[0])
    poll = ends.poll
    clients = {client.socket.fileno(): client for client in ends.clients}
    for number in clients:
        poll.register(number, select.EPOLLIN)
    gap = case.interval_s * _NS / case.groups
    waits: list[int] = []
    meter: Meter | None = None
    began = time.perf_counter_ns()
    warm_until = measured_from = began + int(warm_s(seconds) * _NS)
    end = warm_until + int(seconds * _NS)
    tick = sent = 0

    def receive(wait_s: float) -> None:
        # epoll rounds its timeout to milliseconds; select does not, and waits for the epoll itself.
        select.select([poll], [], [], wait_s)
        for number, _ in poll.poll(0):
            client = clients[number]
            whole = receivers.receive(client)
            arrived = time.perf_counter_ns()
            waits.extend(arrived - at for at in receivers.moments(client, whole) if at >= measured_from)

    while (now := time.perf_counter_ns()) < end:
        due = began + int(tick * gap)
        if now < due:
            receive((due - now) / _NS)
            continue
        worker = ends.workers[tick % case.workers]
        if not worker.flush():
            raise BehindError(f"the relay does not keep up with {case.clients * case.streams} paced streams")
        part = bursts[tick % case.groups]
        tick += 1
        part.stamp(time.perf_counter_ns())
        worker.send(part.data, part.messages)
        sent += part.tokens
        for heard in ends.beat():
            ends.listen(heard)
        if meter is None and now >= warm_until:
            meter = Meter(relay, receivers.tokens, receivers.messages)
            measured_from = now
    if meter is None or not waits:
        raise BehindError(f"nothing arrived in {seconds:g} s")
    figures = meter.figures(receivers.tokens, receivers.messages)
    moved_at = time.perf_counter()
    while (missing := sent - receivers.tokens) and time.perf_counter() < moved_at + _PATIENCE_S:
        for worker in ends.workers:
            worker.flush()
        receive(_PAUSE_S)
        ends.beat()
    if missing:
        raise BenchmarkError(f"{missing} of {sent} tokens did not arrive within {_PATIENCE_S:g} s")
    return figures | percentiles_ms(waits)


def percentiles_ms(waits: Sequence[int]) -> dict[str, float]:
    """Return percentiles, in milliseconds, of times in nanoseconds."""
    ranked = sorted(waits)
    return {name: percentile(ranked, share) / 1e6 for name, share in PERCENTILES.items()}


def stream(ends: Ends, relay: Relay, case: Case, seconds: float) -> dict[str, float]:
    """Run a case; return its figures."""
    return (flat_out if case.interval_s is None else paced)(ends, relay, case, seconds)
