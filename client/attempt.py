"""One submission of a request that has not ended: what its worker knows, and since when that one owes a token.

It knows neither the request nor the tokens: these are the stream's (`streams.py`), which has one open attempt, or
two while a hedge runs beside the attempt that it helps.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol.messages import Finish


@dataclass(slots=True, eq=False)
class OpenAttempt:
    """A submission that is at a broker or a worker, or still here.

    Attributes:
        number: which submission of the request it is.
        hedge: it was made beside an attempt that goes on.
        hedged: another one was made beside it.
        worker: the worker that has it; "" before it is known.
        granted: the credit that the worker knows of.
        heard_at: when the worker was last heard of this stream, or last had reason to be silent; None before STARTED.
        tails: chunks without tokens that it has brought.
        direct: the endpoint where its worker offers the chunks; "" where it does not.
        link: the endpoint that its chunks came from, past the broker; "" where none has yet, or all come through it.
        chunks: how many have come so.
        finish: its FINISH, which was faster than the last of these.
    """

    number: int
    hedge: bool = False
    hedged: bool = False
    worker: str = ""
    granted: int = 0
    heard_at: float | None = None
    tails: int = 0
    direct: str = ""
    link: str = ""
    chunks: int = 0
    finish: Finish | None = None

    @property
    def served(self) -> bool:
        """Whether a worker had it."""
        return self.heard_at is not None or bool(self.worker)

    def started(self, worker: str, now: float) -> None:
        """Note which worker has it: the last name counts, since it grows from broker to broker."""
        self.worker = worker
        if self.heard_at is None:  # what is said again gives no more time
            self.heard_at = now

    def grant(self, limit: int, received: int, now: float) -> None:
        """Note that the worker is told of more credit; `received` is how many tokens the stream has."""
        if self.heard_at is not None and received >= self.granted:
            self.heard_at = now  # the worker had nothing to say until now
        self.granted = max(self.granted, limit)

    def owes_since(self, received: int) -> float | None:
        """Return since when the worker could have brought the next token; None where it is not its turn."""
        if self.finish is not None:
            return self.heard_at  # what is missing was sent, whatever the credit
        return None if received >= self.granted else self.heard_at
