"""The sockets of a member, one a broker: what its core orders of them is done, and what happens there is told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import zmq

from ..protocol.codec import decode, encode
from ..protocol.errors import ProtocolError
from ..protocol.links import Connected, LinkAction, LinkEvent, Lost, Malformed, Open, Received, Refused, Send
from .keys import Curve
from .link import Link
from .monitor import REFUSALS, ConnectionEvent
from .pump import Pump

#: Messages taken from one broker in one round, so that one cannot starve the others.
_BATCH = 200


class Links:
    """The open sockets, by broker."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], pump: Pump, curves: Mapping[str, Curve] | None = None
    ) -> None:
        """Have none.

        Args:
            context: where the sockets live.
            pump: waits for them.
            curves: the keys for each broker; None where no keys are used.
        """
        self._context = context
        self._pump = pump
        self._curves = curves or {}
        self._links: dict[str, Link] = {}

    def perform(self, action: LinkAction) -> Lost | None:
        """Do what was ordered; return the end of a link that is of no more use.

        Raises:
            EndpointError: libzmq refuses an endpoint.
        """
        if isinstance(action, Send):
            return self.send(action.broker, encode(action.message))
        if isinstance(action, Open):
            self._links[action.broker] = Link(
                self._context, action.broker, self._pump, curve=self._curves.get(action.broker)
            )
        else:
            self._links.pop(action.broker).close()
        return None

    def send(self, broker: str, frames: Sequence[bytes]) -> Lost | None:
        """Send a message after all before it; return the end of a link that is of no more use."""
        if self._links[broker].send(frames):
            return None
        return Lost(broker, "it has stopped reading: the outbox is full")

    def events(self, ready: Mapping[Any, int]) -> Iterator[LinkEvent]:
        """Go through what has happened at the sockets that the pump found ready.

        A session that ends while its messages are gone through is left at once: the rest is of no session any more.
        """
        for broker, link in list(self._links.items()):
            if link.among(ready):
                yield from self._events(broker, link)

    def _events(self, broker: str, link: Link) -> Iterator[LinkEvent]:
        happened = link.events()
        refusal = next((REFUSALS[event] for event in happened if event in REFUSALS), None)
        if refusal is not None:
            yield Refused(broker, refusal)
            return
        if ConnectionEvent.CONNECTED in happened:
            yield Connected(broker)
        for frames in link.receive(_BATCH):
            if self._links.get(broker) is not link:
                return
            yield _received(broker, frames)
        if self._links.get(broker) is not link:
            return
        # It counts after what was received before it.
        if ConnectionEvent.DISCONNECTED in happened:
            yield Lost(broker)
        else:
            link.flush()

    def close(self) -> None:
        """Close them all; what was sent may still leave for a moment."""
        while self._links:
            self._links.popitem()[1].close()


def _received(broker: str, frames: list[bytes]) -> LinkEvent:
    try:
        return Received(broker, decode(frames))
    except ProtocolError as error:
        return Malformed(broker, error)
