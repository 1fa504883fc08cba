"""Collects the actions of one step of the core, and counts what each session is sent."""

from __future__ import annotations

from collections.abc import Sequence

from ..protocol.limits import MAX_TEXT_CHARS
from ..protocol.messages import Heartbeat, Message
from ..protocol.orders import Orders
from .events import Action, ToClient, ToWorker
from .guests import Guest
from .registry import ClientSession, WorkerSession


class Outbox(Orders[Action]):
    """The only way out of the core: whoever sends, sends through here, so that no message goes uncounted."""

    def __init__(self) -> None:
        """Make an empty one."""
        super().__init__()
        self.now = 0.0

    def to_client(self, client: ClientSession, message: Message, frames: Sequence[bytes] | None = None) -> None:
        """Send to a client; `frames` is the message encoded, where it is at hand."""
        if type(client) is Guest:
            client.tell(client, message)
            return
        client.sent += 1
        client.liveness.spoke_at = self.now
        self._actions.append(ToClient(client.peer, message, frames))

    def to_worker(self, worker: WorkerSession, message: Message, frames: Sequence[bytes] | None = None) -> None:
        """Send to a worker; `frames` is what it gets, where that is at hand."""
        worker.sent += 1
        worker.liveness.spoke_at = self.now
        self._actions.append(ToWorker(worker.peer, message, frames))

    def heartbeat_client(self, client: ClientSession) -> None:
        """Tell a client that the broker lives."""
        self.to_client(client, Heartbeat(client.sent))

    def heartbeat_worker(self, worker: WorkerSession) -> None:
        """Tell a worker that the broker lives."""
        self.to_worker(worker, Heartbeat(worker.sent))

    def to_stranger(self, action: ToClient | ToWorker) -> None:
        """Send to a peer that has no session."""
        self.add(action)


def clip(message: str) -> str:
    """Cut a message for a person to the length that the wire allows."""
    return message if len(message) <= MAX_TEXT_CHARS else message[: MAX_TEXT_CHARS - 3] + "..."
