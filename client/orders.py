"""The actions that ClientCore's parts collect during one call, in order."""

from __future__ import annotations

import logging
from typing import Any

from ..protocol.log import Log
from .events import Action


class Orders:
    """Collects actions."""

    def __init__(self) -> None:
        """Begin with none."""
        self._actions: list[Action] = []

    def add(self, action: Action) -> None:
        """Order something."""
        self._actions.append(action)

    def log(self, event: str, request_id: bytes | None = None, level: int = logging.INFO, **fields: Any) -> None:
        """Order a line in the log."""
        self._actions.append(Log(event, fields, request_id, level))

    def take(self) -> list[Action]:
        """Return what was ordered since the last call."""
        actions, self._actions = self._actions, []
        return actions
