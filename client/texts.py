"""An open request for embeddings as the core sees it: a stream whose chunks are vectors, one for each text.

Vectors have no order and need no credit: their number bounds what may come. An attempt that follows another one is
asked for all of them once more, since workers compute them together; those that are here already are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protocol.errors import ErrorCode
from ..protocol.messages import Chunk, Finish
from .attempt import OpenAttempt
from .events import Ending
from .streams import OpenStream


@dataclass(slots=True, eq=False)
class OpenTexts(OpenStream):
    """A request for embeddings that has not ended.

    Attributes:
        arrived: numbers of the texts whose vectors are here.
    """

    arrived: set[int] = field(default_factory=set)

    @property
    def progress(self) -> int:
        """How much has come: vectors."""
        return len(self.arrived)

    @property
    def has_news(self) -> bool:
        """Whether the open attempt has brought a vector that was not there."""
        return len(self.arrived) > self.first_token

    def accept(self, attempt: OpenAttempt, chunk: Chunk, now: float) -> bool:
        """Account for a vector of an open attempt; tell whether it is new.

        Raises:
            StreamFaultError: it is no vector, or that of no text.
        """
        texts = self.order.texts
        if chunk.details is None or not chunk.details.vector or chunk.token_ids:
            raise self._fault(ErrorCode.PROTOCOL, "a chunk without a vector, and vectors were asked for")
        if chunk.index >= texts:
            raise self._fault(ErrorCode.PROTOCOL, f"a vector of text {chunk.index}, {texts} were given")
        attempt.heard_at = now  # a repeat is a sign of work, too
        if chunk.index in self.arrived:
            return False
        self.arrived.add(chunk.index)
        self.lost_at = None
        return True

    def finish(self, message: Finish) -> Ending:
        """Return the end that a FINISH tells.

        Raises:
            StreamFaultError: vectors are missing.
        """
        arrived, texts = len(self.arrived), self.order.texts
        if arrived < texts:
            what = f"the request ended with the vectors of {arrived} texts, {texts} were given"
            raise self._fault(ErrorCode.WORKER_LOST, what, retryable=True)
        return Ending(message.reason, message.usage, message.timings, message.worker)
