"""The actions that the parts of a core collect during one call, in order."""

from __future__ import annotations

import logging
from typing import Any, Generic, TypeVar

from .log import Log

ActionT = TypeVar("ActionT")


class Orders(Generic[ActionT]):
    """Collects what a core wants done, lines of the log among it.

    Attributes:
        log_level: lines below it are dropped, since nobody would write them.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._actions: list[ActionT | Log] = []
        self.log_level = logging.NOTSET

    def add(self, action: ActionT) -> None:
        """Order something."""
        self._actions.append(action)

    def log(self, event: str, request_id: bytes | None = None, level: int = logging.INFO, **fields: Any) -> None:
        """Order a line in the log."""
        if level >= self.log_level:
            self._actions.append(Log(event, fields, request_id, level))

    def take(self) -> list[ActionT | Log]:
        """Return what was ordered since the last call."""
        actions, self._actions = self._actions, []
        return actions
