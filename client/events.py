"""What happens to a client, and what it wants done: the vocabulary between `ClientCore` and the I/O around it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, TypeAlias

from ..protocol.credit import ReceiveWindow
from ..protocol.errors import ProtocolError, TokenmqError
from ..protocol.limits import NORMAL_PRIORITY
from ..protocol.log import Log
from ..protocol.messages import Chunk, FinishReason, Message, Timings, Usage
from ..protocol.refusal import Refusal
from ..protocol.values import value

# Events


@value
class Submit:
    """The application wants a stream.

    Attributes:
        id: the request's id, new and random.
        model: which model.
        payload: the packed Generation.
        window: the stream's credit. The core calls `receive`, the reader calls `consume` and posts a Grant: each
            writes fields of its own, so that the reader needs no message to the I/O thread for every chunk.
        attachments: raw frames behind the request.
        deadline_s: seconds from now until the request has lost its worth.
        resume: whether what goes wrong is repaired by further attempts.
        max_tokens: most tokens of the completion, as the payload says; 0 where nobody tells, and for embeddings.
        priority: 0 to 9: a greater one leaves the broker's waiting room first.
        affinity: requests with the same one are best served by the same worker; "" for none.
        hedge_after_s: how long a worker may take for its first token before a second one is asked, too; None for
            ever.
        explain: the end is to tell why the worker was chosen.
        texts: how many texts the payload has that are to be embedded; 0 where it asks for a completion.
    """

    id: bytes
    model: str
    payload: bytes
    window: ReceiveWindow
    attachments: tuple[bytes, ...] = ()
    deadline_s: float | None = None
    resume: bool = True
    max_tokens: int = 0
    priority: int = NORMAL_PRIORITY
    affinity: str = ""
    hedge_after_s: float | None = None
    explain: bool = False
    texts: int = 0


@value
class CancelStream:
    """The application has lost interest in a stream."""

    id: bytes


@value
class Grant:
    """The application has consumed so much that the stream's window opens up to `limit`."""

    id: bytes
    limit: int


@value
class Ask:
    """The application asks a broker a management question."""

    id: bytes
    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@value
class Connected:
    """The present socket to this broker is connected: messages can leave."""

    endpoint: str


@value
class Refused:
    """The handshake with this broker failed; the present socket is of no more use."""

    endpoint: str
    refusal: Refusal


@value
class Lost:
    """The connection of the present socket to this broker is broken, or cannot be made."""

    endpoint: str
    reason: str


@value
class Received:
    """A message came in on the present socket to this broker."""

    endpoint: str
    message: Message


@value
class Malformed:
    """Bytes came in on the present socket to this broker that are no message."""

    endpoint: str
    error: ProtocolError


@value
class Garbled:
    """CHUNKS came in on the present socket to this broker that cannot be read: the broker forwards them unread."""

    endpoint: str
    error: ProtocolError


@value
class Reached:
    """The link to this worker is connected."""

    endpoint: str


@value
class Parted:
    """The link to this worker is broken, of no more use, or cannot be made."""

    endpoint: str
    reason: str


@value
class Heard:
    """A message came by the link to this worker."""

    endpoint: str
    message: Message


@value
class Close:
    """The application is done with the client."""


Event: TypeAlias = (
    Submit | CancelStream | Grant | Ask | Connected | Refused | Lost | Received | Malformed | Garbled
    | Reached | Parted | Heard | Close
)  # fmt: skip


# Actions


@value
class Ending:
    """A stream's good end.

    `usage` and `timings` are None where the client cancelled: it does not wait for the worker's figures.
    """

    reason: FinishReason
    usage: Usage | None = None
    timings: Timings | None = None
    worker: str = ""


@value
class Attempt:
    """One submission of a request.

    Attributes:
        number: 1 for the first.
        broker: the endpoint that it was sent to; "" where no broker was there.
        worker: the worker that had it, "" where none is known.
        first_token: position of the first token that was asked of it: what came before is kept. Of embeddings, how
            many texts had their vector then.
        error: what ended it; None for one that goes on, ended well or was cancelled.
        hedge: it was made beside an attempt that was late, and not because one had failed.
        cancelled: it has not failed, but another attempt went on in its place: the slower one of a hedged pair, or a
            hedge that no other worker was free for.
        direct: its chunks came from the worker itself, past the broker.
    """

    number: int
    broker: str = ""
    worker: str = ""
    first_token: int = 0
    error: TokenmqError | None = None
    hedge: bool = False
    cancelled: bool = False
    direct: bool = False


@value
class Open:
    """Make a new socket for this broker and connect it; tell Connected or Lost."""

    endpoint: str


@value
class CloseSocket:
    """Close the present socket to this broker; what was sent before may still leave."""

    endpoint: str


@value
class Send:
    """Send a message through the present socket to this broker."""

    endpoint: str
    message: Message


@value
class Dial:
    """Connect to a worker, with CURVE where it has a public key; tell Reached or Parted."""

    endpoint: str
    server_key: str = ""


@value
class HangUp:
    """Close the link to this worker; what was sent before may still leave."""

    endpoint: str


@value
class Tell:
    """Send a message by the link to this worker."""

    endpoint: str
    message: Message


@value
class Deliver:
    """Give a chunk to the stream's reader."""

    id: bytes
    chunk: Chunk


@value
class Attempted:
    """An attempt has come to a worker, a hedge has left, or one has ended and another goes on; `attempts` has all."""

    id: bytes
    attempts: tuple[Attempt, ...]


@value
class Ended:
    """The stream is over; nothing more comes for it."""

    id: bytes
    attempts: tuple[Attempt, ...]
    outcome: Ending | TokenmqError


@value
class Answered:
    """The question is answered: with `error` where that is set, else with `result`."""

    id: bytes
    result: Any = None
    error: TokenmqError | None = None


Action: TypeAlias = Open | CloseSocket | Send | Dial | HangUp | Tell | Deliver | Attempted | Ended | Answered | Log
