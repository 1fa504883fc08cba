"""One frozen class a command of TMQ/1, and the small records inside them.

These classes carry values only. What a value may be stands in `schema.py`, how it looks in bytes in `codec.py`.
Durations are in seconds and relative (peers share no clock); counts are non-negative integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from enum import Enum, IntEnum
from typing import Any, ClassVar, TypeAlias

from .limits import NORMAL_PRIORITY
from .values import value

ID_BYTES = 16
#: The id of messages that are about no single request.
NO_ID = bytes(ID_BYTES)


class Command(IntEnum):
    """The command byte of the header."""

    HELLO = 0x01
    WELCOME = 0x02
    READY = 0x03
    ACCEPTED = 0x04
    REQUEST = 0x10
    CREDIT = 0x11
    CANCEL = 0x12
    CHUNKS = 0x13
    FINISH = 0x14
    ERROR = 0x15
    PARKED = 0x16
    STARTED = 0x17
    ATTACH = 0x18
    QUERY = 0x20
    REPLY = 0x21
    HEARTBEAT = 0x30
    DRAINING = 0x31
    GOODBYE = 0x32
    DISCONNECT = 0x33
    DRAIN = 0x34


class WorkerState(str, Enum):
    """What a worker can do at the moment."""

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"


class FinishReason(str, Enum):
    """Why a stream ended well."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class DisconnectCode(str, Enum):
    """Why a broker ends a session."""

    #: The broker has no session with this peer: register anew.
    UNKNOWN_PEER = "unknown_peer"
    #: The peer sent what the protocol does not allow here.
    PROTOCOL = "protocol"
    #: Nothing was heard from the peer for the expiry time.
    EXPIRED = "expired"
    #: Messages of the session went missing.
    LOST_MESSAGES = "lost_messages"
    #: A newer incarnation of the same worker has registered: do not come back.
    SUPERSEDED = "superseded"
    #: An operator has removed the worker: do not come back.
    REMOVED = "removed"
    #: The peer is a broker that has this one below it.
    LOOP = "loop"
    #: The peer's key does not allow this: it is revoked, of another role, or the name is somebody else's.
    FORBIDDEN = "forbidden"
    #: The peer has sent more than it may, again and again: come back after a pause.
    RATE_LIMITED = "rate_limited"


@value
class ModelInfo:
    """A model as a worker serves it.

    Attributes:
        name: what requests ask for.
        context_tokens: most tokens of prompt and completion together; 0 where the engine sets no bound.
        chat: it has a chat template.
        resumes: the engine can continue a completion that another worker has begun, as if it had begun it itself.
        generates: it continues prompts.
        embeds: it gives vectors for texts.
        images: prompts may have images.
    """

    name: str
    context_tokens: int = 0
    chat: bool = False
    resumes: bool = False
    generates: bool = True
    embeds: bool = False
    images: bool = False


@value
class Load:
    """What a worker reports of itself.

    Attributes:
        state: whether it takes requests.
        running: requests in the engine's batch, of all brokers.
        waiting: requests that the worker holds but does not run yet, of all brokers.
        held: those of them that came from the broker that this report goes to.
        steps: engine steps since start: it stands still when the engine does.
        step_age_s: seconds that the current step has lasted; 0 when the engine is idle.
        tokens_per_s: tokens generated a second, all streams together, smoothed.
        kv_use: part of the KV cache in use, 0 to 1.
        steps_per_s: engine steps a second, smoothed.
        prefill_use: part of the time that went into prompts, 0 to 1, smoothed.
        decode_use: part of the time that went into further tokens, 0 to 1, smoothed.
        prefix_hits: part of the prompts' tokens that were found in the prefix cache, 0 to 1, smoothed.
        memory_used_bytes: the device's memory that is taken, by anybody; 0 where the engine does not know.
        memory_bytes: the device's memory.
    """

    state: WorkerState = WorkerState.READY
    running: int = 0
    waiting: int = 0
    held: int = 0
    steps: int = 0
    step_age_s: float = 0.0
    tokens_per_s: float = 0.0
    kv_use: float = 0.0
    steps_per_s: float = 0.0
    prefill_use: float = 0.0
    decode_use: float = 0.0
    prefix_hits: float = 0.0
    memory_used_bytes: int = 0
    memory_bytes: int = 0


@value
class Usage:
    """Tokens that a request cost."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@value
class Considered:
    """A worker that a dispatch decision looked at, as it was then.

    Attributes:
        worker: its name.
        load: requests there, running or waiting, of all brokers.
        slots: requests that it runs at a time.
        speed: tokens a second of one stream, as measured or as set; 0 where nothing is known.
        cost: what `shortest-queue` compares: less is better.
    """

    worker: str
    load: int = 0
    slots: int = 0
    speed: float = 0.0
    cost: float = 0.0


@value
class Decision:
    """Why a request went where it went, at one broker.

    Attributes:
        broker: the broker's name.
        policy: the name of the policy that chose.
        worker: whom it chose.
        candidates: how many workers could have taken the request at that moment.
        considered: the best of them by cost, at most 16, and the chosen one.
    """

    broker: str
    policy: str
    worker: str
    candidates: int = 0
    considered: tuple[Considered, ...] = ()


@value
class Timings:
    """Where a request's time went, in seconds.

    Attributes:
        broker_queue_s: in the waiting rooms of the brokers that it passed.
        worker_queue_s: at the worker, before its prefill began.
        prefill_s: from the begin of the prefill to the first token.
        decode_s: from the first token to the last.
        routing: the dispatch decisions, of the first broker first; empty unless the request asked to have them.
    """

    broker_queue_s: float = 0.0
    worker_queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    routing: tuple[Decision, ...] = ()


@value
class TokenLogprob:
    """A token, its text alone, and the logarithm of its probability, by the model's own logits."""

    token_id: int
    text: str
    logprob: float


@value
class TokenLogprobs:
    """A token as `TokenLogprob`, and the likeliest ones in its place, the likeliest first."""

    token_id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@value
class Details:
    """What a chunk has besides tokens and text, where the request asked for it.

    Attributes:
        logprobs: one for each token of the chunk.
        prompt_logprobs: one for each token of the prompt, None for the first; in the first chunk of an echo.
        vector: float32, little endian: the embedding of the text number `index`.
    """

    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    vector: bytes = b""


@value
class Chunk:
    """Consecutive tokens of one stream.

    Attributes:
        request_id: the stream's request.
        attempt: the submission of the request that the tokens belong to.
        index: which of the request's completions this is, or which of its texts; 0 where there is one.
        offset: position of the first token in the completion, from 0.
        token_ids: the tokens.
        text: the text that they complete. It lags behind the tokens inside a character or a possible stop string.
        details: more, where it was asked for.
    """

    request_id: bytes
    attempt: int
    index: int
    offset: int
    token_ids: tuple[int, ...]
    text: str
    details: Details | None = None

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The logprobs of the tokens, one for each; empty where they were not asked for."""
        return () if self.details is None else self.details.logprobs

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """Those of the prompt's tokens, None for its first; empty but in the first chunk of an echo with logprobs."""
        return () if self.details is None else self.details.prompt_logprobs


@value
class Hello:
    """client -> broker: open a session.

    Attributes:
        client: its name, for people.
        software: its name and version.
        heartbeat_s: a wish, None for the broker's own interval.
        direct: it takes chunks from workers themselves, where these offer it.
    """

    command: ClassVar[Command] = Command.HELLO
    client: str
    software: str
    heartbeat_s: float | None = None
    direct: bool = False


@value
class Welcome:
    """broker -> client: the session is open, with these intervals.

    `group` names the brokers that share the work of one address list: clients spread over them. "" for a broker that
    stands alone.
    """

    command: ClassVar[Command] = Command.WELCOME
    broker: str
    software: str
    heartbeat_s: float
    expiry_s: float
    group: str = ""


@value
class Ready:
    """worker -> broker: register; sent again in a session, it changes models, slots or speed.

    Attributes:
        worker: the worker's name, one process's own.
        incarnation: grows with each start of that process; the newer evicts the older.
        models: what it serves.
        slots: requests that it runs at a time.
        engine: the engine's name, for people.
        load: the first report.
        speed: tokens a second of one stream; only relations between workers count. None: the broker measures it.
        heartbeat_s: a wish, None for the broker's own interval.
        brokers: of a broker that registers at another one: the ids of all brokers behind it, its own first. Empty
            for workers.
        direct: the endpoint where clients can take their chunks themselves; "" for none.
    """

    command: ClassVar[Command] = Command.READY
    worker: str
    incarnation: int
    software: str
    models: tuple[ModelInfo, ...]
    slots: int
    engine: str
    load: Load
    speed: float | None = None
    heartbeat_s: float | None = None
    brokers: tuple[str, ...] = ()
    direct: str = ""


@value
class Accepted:
    """broker -> worker: registered, with these intervals."""

    command: ClassVar[Command] = Command.ACCEPTED
    broker: str
    software: str
    heartbeat_s: float
    expiry_s: float


@value
class Envelope:
    """The part of a REQUEST that the broker reads.

    Attributes:
        model: which model.
        attempt: which submission of this request it is, from 1.
        credit: the stream's first credit: tokens with a position below it may be sent.
        deadline_s: seconds from now until the request has lost its worth; None for never.
        route: broker -> worker only: what the worker puts into the header of CHUNKS for this client.
        prior_tokens: tokens that the client has from earlier attempts; the payload brings them along. More than 0
            needs a worker that resumes.
        avoid: names of workers that failed earlier attempts: they get this one only where no other can.
        queue_s: most seconds in the waiting room; None for no bound.
        expected_tokens: tokens that are still to be generated at most; 0 where the client does not tell.
        priority: 0 to 9: requests of a greater one leave the waiting room before others.
        affinity: requests with the same one are best served by the same worker, which has their beginning in its
            cache; "" for none.
        hedge: the attempt before this one goes on: the client takes the one that answers first.
        explain: FINISH is to tell why the worker was chosen.
        path: ids of the brokers that the request has passed, the first one first.
        key: broker -> worker only: who attaches with this key takes the chunks of the request himself; None where
            the broker forwards them.
    """

    model: str
    attempt: int
    credit: int
    deadline_s: float | None = None
    route: bytes | None = None
    prior_tokens: int = 0
    avoid: tuple[str, ...] = ()
    queue_s: float | None = None
    expected_tokens: int = 0
    priority: int = NORMAL_PRIORITY
    affinity: str = ""
    hedge: bool = False
    explain: bool = False
    path: tuple[str, ...] = ()
    key: bytes | None = None


@value
class Request:
    """client -> broker -> worker: generate. `payload` is packed by `payload.py`; a broker never opens it."""

    command: ClassVar[Command] = Command.REQUEST
    id: bytes
    envelope: Envelope
    payload: bytes
    attachments: tuple[bytes, ...] = ()


@value
class Credit:
    """client -> broker -> worker: tokens of this stream with a position below `limit` may be sent.

    The limit is absolute, so that a repeated or late grant does no harm; the highest one counts.
    """

    command: ClassVar[Command] = Command.CREDIT
    id: bytes
    attempt: int
    limit: int


@value
class Cancel:
    """client -> broker -> worker: stop; a FINISH with reason `cancelled` follows, unless the end was on its way."""

    command: ClassVar[Command] = Command.CANCEL
    id: bytes
    attempt: int


@value
class Chunks:
    """worker -> broker -> client: what one engine step brought for the streams of one client."""

    command: ClassVar[Command] = Command.CHUNKS
    route: bytes
    chunks: tuple[Chunk, ...]


@value
class Finish:
    """worker -> broker -> client: the request ended well; every token has been sent before.

    `chunks` is how many chunks were sent for this attempt, where they took another way and may come later than this;
    0 where they came the same way, and all of them are there.
    """

    command: ClassVar[Command] = Command.FINISH
    id: bytes
    attempt: int
    reason: FinishReason
    usage: Usage
    timings: Timings
    worker: str
    chunks: int = 0


@value
class Error:
    """worker -> broker -> client: the request (or query) ended badly.

    `worker` is the name of the worker that had it, "" where none had; the broker fills it in.
    """

    command: ClassVar[Command] = Command.ERROR
    id: bytes
    attempt: int
    code: str
    message: str
    retryable: bool = False
    retry_after_s: float | None = None
    worker: str = ""


@value
class Parked:
    """worker -> broker: the request's slot is free, though its FINISH is still to come.

    The engine has generated everything, and the rest waits at the worker for the reader's credit: so a reader that
    pauses keeps nobody else from the slot.
    """

    command: ClassVar[Command] = Command.PARKED
    id: bytes
    attempt: int


@value
class Started:
    """broker -> client: the request has left the waiting room for this worker.

    A broker with an uplink says so to the broker above it, too, which passes it on: then it comes once a hop, and
    the worker's name grows (`west`, then `west/gpu-3`). From now on silence is the worker's: the client's timeouts
    for the first and for the next token count from here. The broker may wait a moment with it, and leaves it out
    where the request has ended by then.

    Attributes:
        id: the request's.
        attempt: which submission.
        worker: the worker's name.
        direct: the endpoint where the client can take the chunks itself, with `key`; "" for none.
        key: as the worker knows it; see Attach.
        server_key: the public key that the worker has there, 40 characters of Z85; "" where it speaks no CURVE.
    """

    command: ClassVar[Command] = Command.STARTED
    id: bytes
    attempt: int
    worker: str
    direct: str = ""
    key: bytes | None = None
    server_key: str = ""


@value
class Attach:
    """client -> worker, at the worker's own endpoint: the chunks of all requests with this key are for me."""

    command: ClassVar[Command] = Command.ATTACH
    id: bytes


@value
class Query:
    """client -> broker -> broker below: a management question; answered with REPLY or ERROR of the same id."""

    command: ClassVar[Command] = Command.QUERY
    id: bytes
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@value
class Reply:
    """The answer to a QUERY, plain data; it goes where that came from."""

    command: ClassVar[Command] = Command.REPLY
    id: bytes
    result: Any


@value
class Heartbeat:
    """Any peer: I live.

    Attributes:
        sent: messages that the sender has sent in this session before this one. Connections keep order, so a
            receiver that has counted fewer knows that some were lost, and ends the session.
        load: from workers, their report; from others None.
    """

    command: ClassVar[Command] = Command.HEARTBEAT
    sent: int
    load: Load | None = None


@value
class Draining:
    """worker -> broker, or broker -> client: send me nothing more if you can help it; what I hold I finish."""

    command: ClassVar[Command] = Command.DRAINING


@value
class Goodbye:
    """Any peer: the session is over, by my own will; do not answer."""

    command: ClassVar[Command] = Command.GOODBYE


@value
class Disconnect:
    """broker -> client or worker: there is no session; open a new connection and say HELLO or READY."""

    command: ClassVar[Command] = Command.DISCONNECT
    code: DisconnectCode
    message: str


@value
class Drain:
    """broker -> worker: finish what you hold for all brokers, then stop; after `grace_s` give back what is left.

    Attributes:
        grace_s: None leaves the grace time to the worker.
        undo: take that back: stay, and say READY again.
    """

    command: ClassVar[Command] = Command.DRAIN
    grace_s: float | None = None
    undo: bool = False


Message: TypeAlias = (
    Hello
    | Welcome
    | Ready
    | Accepted
    | Request
    | Credit
    | Cancel
    | Chunks
    | Finish
    | Error
    | Parked
    | Started
    | Attach
    | Query
    | Reply
    | Heartbeat
    | Draining
    | Goodbye
    | Disconnect
    | Drain
)
