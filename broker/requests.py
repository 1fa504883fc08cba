"""What the broker knows of a request: soft state, from its arrival to its one answer and the release of its slot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..protocol.limits import NORMAL_PRIORITY
from ..protocol.messages import Decision, Request

if TYPE_CHECKING:
    from .registry import ClientSession, WorkerSession

_ATTEMPT_BYTES = 8
#: The broker reads no prompts: four bytes a token is what English text has in common tokenizers, and every prompt is
#: measured with the same measure.
_BYTES_PER_TOKEN = 4
#: What a vision model makes of one image, about.
_ATTACHMENT_TOKENS = 512
#: A client that does not tell what it asks for is taken for one that asks for much, so that silence does not pay.
_UNKNOWN_TOKENS = 1_024
_NOBODY: frozenset[str] = frozenset()


def key_of(id: bytes, attempt: int) -> bytes:
    """Return what tells a submission from all others: a request's earlier attempt may still run elsewhere."""
    return id + attempt.to_bytes(_ATTEMPT_BYTES, "big")


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One submission of a request.

    Attributes:
        id: the client's id for the request.
        model: the model it asks for.
        attempt: which submission of it.
        client: who waits for the answer; None once nobody does (the client is gone, has submitted it anew, or the
            deadline has passed): then the record only keeps the slot charged until the worker answers.
        route: the client's return route; it outlives the client.
        message: what has to go to the worker; dropped when it went, since the client owns the request.
        size_bytes: bytes of payload and attachments.
        arrived_at: when it came.
        deadline_at: when its answer has lost its worth; None for never.
        queue_until: when it has waited for too long; None for never.
        prior_tokens: tokens of earlier attempts: more than 0 needs a worker that resumes.
        avoid: names of workers that failed it: they get it only where no other can. One that registers while it waits
            has begun anew, and is none of them.
        share: whose share of the workers it counts to: the client's.
        priority: 0 to 9, the greatest first.
        prompt_tokens: tokens of the prompt and of what there is of the answer, estimated from their size.
        expected_tokens: tokens that are still to come at most, as the client tells.
        affinity: what requests have in common that one worker best serves; "" for nothing.
        hedge: it runs beside an earlier attempt, and never waits.
        explain: its FINISH is to tell why the worker was chosen.
        decision: why that was, where `explain` asks for it and once it is dispatched.
        worker: who runs it; None while it waits.
        holder: the name of who runs it, as far as it is known: where the worker is a broker, by its path.
        dispatched_at: when it went to the worker.
        cancelled: a CANCEL went to the worker.
        parked: only the reader's credit is missing; no slot is charged for it.
        granted: the greatest credit that its worker was told.
        key: what it is filed under.
        cost_tokens: what it costs a worker at most, as its client's share counts it; 1 or more.
    """

    id: bytes
    model: str
    attempt: int
    client: ClientSession | None
    route: bytes
    message: Request | None
    size_bytes: int
    arrived_at: float
    deadline_at: float | None = None
    queue_until: float | None = None
    prior_tokens: int = 0
    avoid: frozenset[str] = frozenset()
    share: str = ""
    priority: int = NORMAL_PRIORITY
    prompt_tokens: int = 0
    expected_tokens: int = _UNKNOWN_TOKENS
    affinity: str = ""
    hedge: bool = False
    explain: bool = False
    decision: Decision | None = None
    worker: WorkerSession | None = None
    holder: str = ""
    dispatched_at: float = 0.0
    cancelled: bool = False
    parked: bool = False
    granted: int = 0
    key: bytes = field(init=False)
    cost_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        """Make what is asked for again and again."""
        self.key = key_of(self.id, self.attempt)
        self.cost_tokens = max(1, self.prompt_tokens + self.expected_tokens)

    @property
    def resumed(self) -> bool:
        """It goes on where an earlier attempt stopped."""
        return self.prior_tokens > 0

    @property
    def waits_too_long_first(self) -> bool:
        """It waits, and may not wait until its deadline."""
        if self.worker is not None or self.queue_until is None:
            return False
        return self.deadline_at is None or self.queue_until < self.deadline_at

    @property
    def due_at(self) -> float | None:
        """When the broker must end it as things stand; None for never."""
        return self.queue_until if self.waits_too_long_first else self.deadline_at

    @classmethod
    def of(cls, message: Request, client: ClientSession, now: float) -> RequestRecord:
        """Make the record of a request that has just arrived."""
        envelope = message.envelope
        expected = envelope.expected_tokens or _UNKNOWN_TOKENS
        attached = _ATTACHMENT_TOKENS * len(message.attachments)
        size = len(message.payload)
        return cls(  # by position: names of 19 arguments take a microsecond
            message.id,
            envelope.model,
            envelope.attempt,
            client,
            client.route,
            message,
            size + sum(map(len, message.attachments)) if attached else size,
            now,
            None if envelope.deadline_s is None else now + envelope.deadline_s,
            None if envelope.queue_s is None else now + envelope.queue_s,
            envelope.prior_tokens,
            frozenset(envelope.avoid) if envelope.avoid else _NOBODY,
            client.share,
            envelope.priority,
            size // _BYTES_PER_TOKEN + attached,
            expected,
            envelope.affinity,
            envelope.hedge,
            envelope.explain,
        )
