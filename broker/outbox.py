"""Collects the actions of one step of the core, and counts what each session is sent."""

from __future__ import annotations

import logging
from typing import Any

from ..protocol.limits import MAX_TEXT_CHARS
from ..protocol.log import Log
from ..protocol.messages import Heartbeat, Message
from .events import Action, ToClient, ToWorker
from .registry import ClientSession, WorkerSession


class Outbox:
    """The only way out of the core: whoever sends, sends through here, so that no message goes uncounted."""

    def __init__(self) -> None:
        """Make an empty one."""
        self.now = 0.0
        self._actions: list[Action] = []

    def to_client(self, client: ClientSession, message: Message) -> None:
        """Send to a client."""
        client.sent += 1
        client.liveness.spoke(self.now)
        self._actions.append(ToClient(client.peer, message))

    def to_worker(self, worker: WorkerSession, message: Message) -> None:
        """Send to a worker."""
        worker.sent += 1
        worker.liveness.spoke(self.now)
        self._actions.append(ToWorker(worker.peer, message))

    def heartbeat_client(self, client: ClientSession) -> None:
        """Tell a client that the broker lives."""
        self.to_client(client, Heartbeat(client.sent))

    def heartbeat_worker(self, worker: WorkerSession) -> None:
        """Tell a worker that the broker lives."""
        self.to_worker(worker, Heartbeat(worker.sent))

    def to_stranger(self, action: ToClient | ToWorker) -> None:
        """Send to a peer that has no session."""
        self._actions.append(action)

    def log(self, event: str, request_id: bytes | None = None, *, level: int = logging.INFO, **fields: Any) -> None:
        """Write a line to the log."""
        self._actions.append(Log(event, fields, request_id, level))

    def take(self) -> list[Action]:
        """Return what has been collected, in order, and begin anew."""
        actions, self._actions = self._actions, []
        return actions


def clip(message: str) -> str:
    """Cut a message for a person to the length that the wire allows."""
    return message if len(message) <= MAX_TEXT_CHARS else message[: MAX_TEXT_CHARS - 3] + "..."
