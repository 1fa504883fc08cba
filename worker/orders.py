"""The actions that WorkerCore's parts collect during one call, in order."""

from __future__ import annotations

from collections.abc import Mapping

from ..protocol.messages import Message
from ..protocol.orders import Orders as CoreOrders
from .events import Action, Send
from .session import Session


class Orders(CoreOrders[Action]):
    """Collects actions; counts what is sent in each session."""

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        """Collect for these sessions, by broker."""
        super().__init__()
        self._sessions = sessions

    def send(self, broker: str, message: Message) -> None:
        """Order a message in this broker's session."""
        self._sessions[broker].sent += 1
        self.add(Send(broker, message))
