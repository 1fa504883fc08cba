"""The actions that WorkerCore's parts collect during one call, in order."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..protocol.log import Log
from ..protocol.messages import Message
from .events import Action, Send
from .session import Session


class Orders:
    """Collects actions; counts what is sent in each session."""

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        """Collect for these sessions, by broker."""
        self._sessions = sessions
        self._actions: list[Action] = []

    def add(self, action: Action) -> None:
        """Order something."""
        self._actions.append(action)

    def send(self, broker: str, message: Message) -> None:
        """Order a message in this broker's session."""
        self._sessions[broker].sent += 1
        self._actions.append(Send(broker, message))

    def log(self, event: str, request_id: bytes | None = None, level: int = logging.INFO, **fields: Any) -> None:
        """Order a line in the log."""
        self._actions.append(Log(event, fields, request_id, level))

    def take(self) -> list[Action]:
        """Return what was ordered since the last call."""
        actions, self._actions = self._actions, []
        return actions
