"""A flow-control window over the tokens of one stream.

The limit is absolute: tokens with a position below it may be sent. Grants may therefore arrive twice or out of
order without harm. The receiver opens the window again when half of it has been consumed, so that there is one
CREDIT for many chunks and the sender does not run dry.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ProtocolError

#: Tokens in flight for one stream. At 100 tokens/s a reader may pause for over a second before its stream does;
#: 1,000 paused streams keep about a megabyte in flight.
WINDOW_TOKENS = 256


@dataclass(slots=True)
class SendWindow:
    """The worker's side: how much may be sent.

    Attributes:
        limit: first position that may not be sent yet.
        sent: first position not sent yet.
    """

    limit: int
    sent: int = 0

    @property
    def available(self) -> int:
        """Tokens that may be sent now."""
        return max(0, self.limit - self.sent)

    def grant(self, limit: int) -> bool:
        """Raise the limit; tell whether it rose."""
        if limit <= self.limit:
            return False
        self.limit = limit
        return True

    def send(self, tokens: int) -> None:
        """Account for tokens that are sent.

        Raises:
            ValueError: more than `available`.
        """
        if tokens > self.available:
            raise ValueError(f"{tokens} tokens to send, credit for {self.available}")
        self.sent += tokens


@dataclass(slots=True)
class ReceiveWindow:
    """The reader's side: what was granted, received and consumed.

    Attributes:
        size: tokens that may be in flight or unread.
        limit: what has been granted so far.
        received: first position not received yet.
        consumed: first position that the application has not taken yet.
    """

    size: int = WINDOW_TOKENS
    limit: int = 0
    received: int = 0
    consumed: int = 0

    def __post_init__(self) -> None:
        """Grant the first window."""
        if self.size < 1:
            raise ValueError(f"the credit window must be at least 1 token, got {self.size}")
        self.limit = max(self.limit, self.size)

    def receive(self, tokens: int) -> None:
        """Account for tokens that arrived.

        Raises:
            ProtocolError: the sender overran its credit.
        """
        if self.received + tokens > self.limit:
            raise ProtocolError(
                f"credit overrun: {self.received + tokens} tokens received, {self.limit} were granted"
            )
        self.received += tokens

    def consume(self, tokens: int) -> int | None:
        """Account for tokens that the application took; return the new limit when it is time to grant one.

        Raises:
            ValueError: more than have been received.
        """
        if self.consumed + tokens > self.received:
            raise ValueError(f"{self.consumed + tokens} tokens consumed, {self.received} were received")
        self.consumed += tokens
        limit = self.consumed + self.size
        if 2 * (limit - self.limit) < self.size:
            return None
        self.limit = limit
        return limit
