"""What the broker knows of a request: soft state, from its arrival to its one answer and the release of its slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..protocol.messages import Request

if TYPE_CHECKING:
    from .registry import ClientSession, WorkerSession


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request.

    Attributes:
        id: the client's id for it.
        model: the model it asks for.
        attempt: which submission of it.
        client: who waits for the answer; None once nobody does (cancelled by the loss of the client, or past its
            deadline): then the record only keeps the slot charged until the worker answers.
        route: the client's return route; it outlives the client.
        message: what has to go to the worker; dropped when it went, since the client owns the request.
        size_bytes: bytes of payload and attachments.
        arrived_at: when it came.
        deadline_at: when its answer has lost its worth; None for never.
        worker: who runs it; None while it waits.
        dispatched_at: when it went to the worker.
        cancelled: a CANCEL went to the worker.
        parked: only the reader's credit is missing; no slot is charged for it.
    """

    id: bytes
    model: str
    attempt: int
    client: ClientSession | None
    route: bytes
    message: Request | None
    size_bytes: int
    arrived_at: float
    deadline_at: float | None
    worker: WorkerSession | None = None
    dispatched_at: float = 0.0
    cancelled: bool = False
    parked: bool = False

    @classmethod
    def of(cls, message: Request, client: ClientSession, now: float) -> RequestRecord:
        """Make the record of a request that has just arrived."""
        deadline_s = message.envelope.deadline_s
        return cls(
            id=message.id,
            model=message.envelope.model,
            attempt=message.envelope.attempt,
            client=client,
            route=client.route,
            message=message,
            size_bytes=len(message.payload) + sum(map(len, message.attachments)),
            arrived_at=now,
            deadline_at=None if deadline_s is None else now + deadline_s,
        )
