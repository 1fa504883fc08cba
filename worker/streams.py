"""The requests that a worker holds, each with the tokens that it has no credit for yet.

An engine never waits for a reader: what it produces is kept here and leaves as credit allows. What is kept is bounded
by the request's max_tokens in number, and by the desk in time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..protocol.credit import SendWindow
from ..protocol.messages import Chunk, Details
from .engines.base import Done, Failed, Tokens

#: Tokens in one chunk, and characters after which no further piece is joined to it. A reader that has granted much
#: after a long pause gets several chunks, each far below the largest body.
MAX_CHUNK_TOKENS = 16_384
MAX_CHUNK_CHARS = 262_144
#: Bytes after which a CHUNKS message is closed: with a last chunk of the largest size it is still below the limit.
MAX_BATCH_BYTES = 4 * 1024 * 1024
#: What the logprobs of a token count for: with the most alternatives, and texts of a few letters. They are arrays in
#: arrays, and a body of nothing else must keep within MAX_CONTAINERS, too.
_DETAIL_CHARS = 1200

#: (token ids, text, details)
Piece: TypeAlias = tuple[tuple[int, ...], str, Details | None]
#: How chunks leave: (broker, its route to the client, None), or ("", key, connection) where the client fetches them.
Way: TypeAlias = tuple[str, bytes, "bytes | None"]


@dataclass(slots=True)
class Lane:
    """One completion: its unsent pieces, and the window that they leave through.

    Attributes:
        window: credit; `window.sent` is the offset of the next chunk.
        pieces: as the engine gave them; a text is never split, it leaves with its last token.
        cut: tokens of the first piece that have left already.
    """

    window: SendWindow
    pieces: deque[Piece] = field(default_factory=deque)
    cut: int = 0

    def ready(self) -> bool:
        """Tell whether something may leave now: a token with credit, or text whose tokens have all left."""
        return bool(self.pieces) and (self.window.available > 0 or not self.pieces[0][0])

    def take(self) -> tuple[int, tuple[int, ...], str, Details | None] | None:
        """Take what may leave now, joined: (offset, token ids, text, details), or None."""
        if not self.ready():
            return None
        offset = self.window.sent
        room = min(self.window.available, MAX_CHUNK_TOKENS)
        token_ids, text, details = self.pieces[0]
        if len(self.pieces) == 1 and not self.cut and len(token_ids) <= room:  # nearly always: the reader keeps up
            self.pieces.clear()
        else:
            token_ids, text, details = self._join(room)
        self.window.send(len(token_ids))
        return offset, token_ids, text, details

    def _join(self, room: int) -> Piece:
        taken: list[int] = []
        texts: list[str] = []
        more: list[Details] = []
        chars = 0
        while self.pieces and chars < MAX_CHUNK_CHARS:
            token_ids, text, details = self.pieces[0]
            rest = token_ids[self.cut :]
            some = rest[:room]
            taken.extend(some)
            if details is not None:
                more.append(_of_tokens(details, self.cut, len(some)))
                chars += _DETAIL_CHARS * len(details.logprobs)
            if len(rest) > room:
                self.cut += room
                break
            texts.append(text)
            chars += len(text)
            room -= len(rest)
            self.cut = 0
            self.pieces.popleft()
        return tuple(taken), "".join(texts), _joined(more)


def _of_tokens(details: Details, first: int, count: int) -> Details:
    """Return what a piece's details tell of `count` of its tokens; what is about all leaves with the first."""
    logprobs = details.logprobs[first : first + count]
    return replace(details, logprobs=logprobs) if first == 0 else Details(logprobs)


def _joined(parts: Sequence[Details]) -> Details | None:
    """Join the details of pieces in a row; a vector stands alone in its lane, and an echo in its first piece."""
    if not parts:
        return None
    return replace(parts[0], logprobs=tuple(one for part in parts for one in part.logprobs))


@dataclass(slots=True, eq=False)
class Stream:
    """A request that the worker holds.

    Attributes:
        ticket: the engine's number for it.
        broker: who sent it; (broker, request_id, attempt) is its key.
        request_id: its id on the wire.
        attempt: which submission.
        way: how its chunks leave: all of them the same way, lest one overtake another.
        limit: credit: tokens with a position below it may be sent.
        prior: tokens that earlier attempts have brought; offsets go on behind them.
        accepted_at: when it came.
        key: who shows it takes the chunks; None where they go through the broker.
        chunks: how many have left.
        lanes: its completions by index.
        tokens: tokens of the completion so far: those of `prior`, and those that the engine has brought.
        kept: those of them that wait for credit.
        end: how it ended in the engine; None while the engine has it.
        cancelled: nothing more is sent but FINISH.
        parked: the broker knows that only the reader's credit is missing; it charges no slot for it.
    """

    ticket: int
    broker: str
    request_id: bytes
    attempt: int
    way: Way
    limit: int
    prior: int
    accepted_at: float
    key: bytes | None = None
    chunks: int = 0
    lanes: dict[int, Lane] = field(default_factory=dict)
    tokens: int = field(init=False)
    kept: int = 0
    end: Done | Failed | None = None
    cancelled: bool = False
    parked: bool = False

    def __post_init__(self) -> None:
        """Begin where the prior ends."""
        self.tokens = self.prior

    def push(self, output: Tokens) -> None:
        """Keep what the engine brought."""
        self.tokens += len(output.token_ids)
        text = output.text
        if self.cancelled or not (output.token_ids or text or output.details):
            return
        if not text.isascii():  # a lone surrogate from an odd tokenizer cannot be packed
            text = text.encode("utf-8", "replace").decode()
        lane = self.lanes.get(output.index)
        if lane is None:
            lane = self.lanes[output.index] = Lane(SendWindow(self.limit, self.prior))
        lane.pieces.append((output.token_ids, text, output.details))
        self.kept += len(output.token_ids)

    def grant(self, limit: int) -> None:
        """Raise the credit; a lower limit than before changes nothing."""
        self.limit = max(self.limit, limit)
        for lane in self.lanes.values():
            lane.window.grant(limit)

    def take(self) -> list[Chunk]:
        """Take what may leave now, at most one chunk a completion."""
        chunks = []
        for index, lane in self.lanes.items():
            taken = lane.take()
            if taken is not None:
                chunks.append(Chunk(self.request_id, self.attempt, index, *taken))
                self.kept -= len(taken[1])
        self.chunks += len(chunks)
        return chunks

    def cancel(self) -> None:
        """Drop what is unsent, and whatever still comes."""
        self.cancelled = True
        self.lanes.clear()
        self.kept = 0

    @property
    def peer(self) -> bytes | None:
        """The client's own connection that the chunks leave by; None for the broker's."""
        return self.way[2]

    @property
    def ready(self) -> bool:
        """Whether `take` would bring something."""
        return any(lane.ready() for lane in self.lanes.values())


def batches(chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, ...]]:
    """Divide what one client is to get among messages of a size that the wire carries; nearly always one."""
    begin = weight = 0
    for end, chunk in enumerate(chunks):
        if weight > MAX_BATCH_BYTES:
            yield tuple(chunks[begin:end])
            begin, weight = end, 0
        weight += 64 + 5 * len(chunk.token_ids) + 4 * len(chunk.text)
        if chunk.details is not None:
            given = len(chunk.details.logprobs) + len(chunk.details.prompt_logprobs)
            weight += len(chunk.details.vector) + _DETAIL_CHARS * given
    yield tuple(chunks[begin:])


class Streams:
    """All held requests, by ticket and by key.

    Attributes:
        parked: how many of them are parked.
        parked_tokens: tokens that are kept for these.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        #: Since when tokens of a stream have waited for credit, by ticket: those that have waited longest come first.
        self._waiting: OrderedDict[int, float] = OrderedDict()
        self._by_ticket: dict[int, Stream] = {}
        self._by_key: dict[tuple[str, bytes, int], Stream] = {}
        self._of_broker: dict[str, dict[int, Stream]] = {}
        #: Streams that the engine has not ended yet, by broker: counted, since it is asked for in each round.
        self._in_engine: Counter[str] = Counter()
        self.parked = 0
        self.parked_tokens = 0

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._by_ticket)

    def __iter__(self) -> Iterator[Stream]:
        """Go through a copy, oldest first."""
        return iter(list(self._by_ticket.values()))

    def add(self, stream: Stream) -> None:
        """Hold one more."""
        self._by_ticket[stream.ticket] = stream
        self._by_key[stream.broker, stream.request_id, stream.attempt] = stream
        self._of_broker.setdefault(stream.broker, {})[stream.ticket] = stream
        self._in_engine[stream.broker] += 1

    def end(self, stream: Stream, end: Done | Failed) -> None:
        """Note how the stream has ended in the engine."""
        if stream.end is None:
            self._in_engine[stream.broker] -= 1
        stream.end = end

    def park(self, stream: Stream) -> None:
        """Note that the stream is parked."""
        stream.parked = True
        self.parked += 1
        self.parked_tokens += stream.kept

    def take(self, stream: Stream) -> list[Chunk]:
        """Take what may leave of a stream now; if something does, its wait for credit is over."""
        kept = stream.kept
        chunks = stream.take()
        if chunks:
            self._waiting.pop(stream.ticket, None)
            if stream.parked:
                self.parked_tokens -= kept - stream.kept
        return chunks

    def wait(self, stream: Stream, now: float) -> None:
        """Note that the stream's tokens wait for credit from now on, unless they do so already."""
        self._waiting.setdefault(stream.ticket, now)

    def waiting_since(self) -> float | None:
        """Return since when the stream that has waited longest for credit has done so; None where none waits."""
        return next(iter(self._waiting.values()), None)

    def waiting_longest(self) -> Stream:
        """Return the stream that has waited longest for credit; one must wait."""
        return self._by_ticket[next(iter(self._waiting))]

    def cancel(self, stream: Stream) -> None:
        """Drop what is unsent of a stream, and whatever still comes."""
        if stream.parked:
            self.parked_tokens -= stream.kept
        self._waiting.pop(stream.ticket, None)
        stream.cancel()

    def remove(self, stream: Stream) -> None:
        """Let go of one."""
        if stream.end is None:
            self._in_engine[stream.broker] -= 1
        if stream.parked:
            self.parked -= 1
            self.parked_tokens -= stream.kept
        self._waiting.pop(stream.ticket, None)
        del self._by_ticket[stream.ticket]
        del self._by_key[stream.broker, stream.request_id, stream.attempt]
        del self._of_broker[stream.broker][stream.ticket]

    def by_ticket(self, ticket: int) -> Stream | None:
        """Return the stream with this ticket."""
        return self._by_ticket.get(ticket)

    def by_key(self, broker: str, request_id: bytes, attempt: int) -> Stream | None:
        """Return the stream that this broker means."""
        return self._by_key.get((broker, request_id, attempt))

    def of_broker(self, broker: str) -> list[Stream]:
        """Return this broker's streams, oldest first."""
        return list(self._of_broker.get(broker, {}).values())

    def held(self, broker: str) -> int:
        """Return how many this broker has here."""
        return len(self._of_broker.get(broker, ()))

    def in_engine(self, broker: str | None = None) -> int:
        """Return how many the engine has not ended yet, of one broker or of all."""
        return sum(self._in_engine.values()) if broker is None else self._in_engine[broker]

    def validate(self) -> None:
        """Check what must hold between two events; raises AssertionError with the stream at fault."""
        assert len(self._by_ticket) == len(self._by_key) == sum(map(len, self._of_broker.values())), "indexes differ"
        in_engine = Counter(stream.broker for stream in self._by_ticket.values() if stream.end is None)
        assert +self._in_engine == in_engine, (self._in_engine, in_engine)
        parked = [stream for stream in self._by_ticket.values() if stream.parked]
        assert (self.parked, self.parked_tokens) == (len(parked), sum(stream.kept for stream in parked)), parked
        assert list(self._waiting.values()) == sorted(self._waiting.values()), self._waiting
        assert self._waiting.keys() == {ticket for ticket, stream in self._by_ticket.items() if stream.kept}
        for ticket, stream in self._by_ticket.items():
            assert stream.ticket == ticket, stream
            assert stream.end is not None or not stream.parked, stream
            assert self.by_key(stream.broker, stream.request_id, stream.attempt) is stream, stream
            assert self._of_broker[stream.broker].get(ticket) is stream, stream
            assert not stream.ready, stream  # what may leave has left
            assert stream.end is None or (stream.kept and isinstance(stream.end, Done)), stream
            found = sum(len(piece[0]) for lane in stream.lanes.values() for piece in lane.pieces)
            assert stream.kept == found - sum(lane.cut for lane in stream.lanes.values()), stream
            for lane in stream.lanes.values():
                assert lane.window.limit == stream.limit, stream
                assert stream.prior <= lane.window.sent <= max(stream.prior, stream.limit), stream
                assert lane.cut == 0 or lane.cut < len(lane.pieces[0][0]), stream
