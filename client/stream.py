"""What both kinds of stream are: everything but the waiting, which is all that `Stream` and `AsyncStream` add."""

from __future__ import annotations

from typing import TypeVar

from ..protocol.errors import TokenmqError
from ..protocol.messages import Chunk, FinishReason, Timings, Usage
from .connection import Connection
from .events import Attempt, CancelStream, Ending, Grant
from .mailbox import Mailbox

StreamT_co = TypeVar("StreamT_co", bound="BaseStream", covariant=True)


class BaseStream:
    """One request's tokens on their way. It is cancelled when nobody refers to it any more.

    Attributes:
        model: the model that was asked for.
    """

    def __init__(self, connection: Connection, mailbox: Mailbox, model: str, owner: object) -> None:
        """Wrap a mailbox; `owner`, the client, lives as long as the stream."""
        self.model = model
        self._connection = connection
        self._mailbox = mailbox
        self._owner = owner
        self._token_ids: list[int] = []

    def __repr__(self) -> str:
        """Return id, model and how far it is."""
        state = self.finish_reason or "open"
        return f"<{type(self).__name__} {self.id} of {self.model!r}: {len(self._token_ids)} tokens, {state}>"

    def __del__(self) -> None:
        """Cancel what nobody can read any more."""
        self._leave()

    def _leave(self) -> None:
        """Have the stream end, if it has not. No lock may be taken here: finalizers run wherever memory is freed."""
        mailbox = getattr(self, "_mailbox", None)
        if mailbox is not None and mailbox.outcome is None:
            self._connection.post(CancelStream(mailbox.id))

    @property
    def id(self) -> str:
        """The request's id in hexadecimal, as in every log line and error."""
        return self._mailbox.id.hex()

    @property
    def token_ids(self) -> list[int]:
        """All tokens that were taken from the stream so far."""
        return list(self._token_ids)

    @property
    def finish_reason(self) -> str | None:
        """Why the stream ended: "stop", "length", "cancelled" or "error"; None while it goes on.

        It is known when the end has arrived, though chunks may still wait to be read.
        """
        outcome = self._mailbox.outcome
        if isinstance(outcome, Ending):
            return outcome.reason.value
        return None if outcome is None else "error"

    @property
    def usage(self) -> Usage | None:
        """Tokens that the request cost; None before the end, after an error, and where this side cancelled."""
        outcome = self._mailbox.outcome
        return outcome.usage if isinstance(outcome, Ending) else None

    @property
    def timings(self) -> Timings | None:
        """Where the time went, in seconds; None as for `usage`.

        `timings.routing` tells why the worker was chosen, one decision a broker, for requests with `explain`.
        """
        outcome = self._mailbox.outcome
        return outcome.timings if isinstance(outcome, Ending) else None

    @property
    def worker(self) -> str | None:
        """The name of the worker that finished the stream; None as for `usage`."""
        outcome = self._mailbox.outcome
        return (outcome.worker or None) if isinstance(outcome, Ending) else None

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """What has happened to the request: one entry for each time that it was submitted.

        An entry has `number`, `broker` (endpoint), `worker` (name), `first_token` (position where it began), `error`
        (what ended it, None if it has not failed), `hedge` (it was made beside one that was late) and `cancelled`
        (another one went on in its place). They stand in the order in which they ended. The last one is the one
        that goes on or has ended well; while a hedge and the attempt that it helps are both open, these are the
        last two.
        """
        return self._mailbox.attempts

    def cancel(self) -> None:
        """End the stream now: the worker stops, nothing more is delivered. After its end this does nothing."""
        if self._mailbox.end(Ending(FinishReason.CANCELLED), discard=True):
            self._connection.post(CancelStream(self._mailbox.id))

    def _next(self) -> Chunk | Ending | None:
        """Take the next chunk, or the end; None where neither is there yet.

        Raises:
            TokenmqError: the stream ended with it.
        """
        item, limit = self._mailbox.take()
        if isinstance(item, Chunk):
            self._token_ids.extend(item.token_ids)
            if limit is not None:
                self._connection.post(Grant(self._mailbox.id, limit))
        elif isinstance(item, TokenmqError):
            # Raised anew for every reader: without this, each raise would add to the same traceback.
            raise item.with_traceback(None)
        return item
