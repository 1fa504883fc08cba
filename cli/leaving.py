"""What `drain --wait` waits for: that a worker has finished or left, as far as the brokers before it tell."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from ..broker.hops import name_there
from .lifecycle import fail

if TYPE_CHECKING:
    from ..client import Client

#: How often the list of workers is looked at.
_LOOK_S = 0.1


class Leaver:
    """A worker that is to leave. Make it before the worker is told: a new one of its name is another one.

    Attributes:
        row: what the list of workers says of it; None where it is not in there.
        silent: brokers that it may be behind and that had no part in the list: it may be missing because of them.
    """

    def __init__(self, client: Client, name: str) -> None:
        """Look for the first time."""
        self.name = name
        self._client = client
        self._incarnation: int | None = None
        self._way: set[str] = set()
        self.look()

    def look(self) -> None:
        """See what the list says now."""
        # A name with a slash may be that of a worker behind another broker.
        rows = self._client.workers(tree="/" in self.name)
        answered = {row["name"]: row["answered"] for row in rows if "answered" in row}
        # Brokers stay on the way when they are not in the list any more: nobody speaks for what is behind them.
        self._way |= {broker for broker in answered if name_there(broker, self.name)}
        self.silent = sorted(broker for broker in self._way if not answered.get(broker))
        self.row: dict[str, Any] | None = next((row for row in rows if row["name"] == self.name), None)
        if self.row is not None and self._incarnation is None:
            self._incarnation = self.row["incarnation"]

    @property
    def gone(self) -> bool:
        """It has left for certain."""
        if self.row is None:
            return not self.silent
        return bool(self.row["incarnation"] != self._incarnation)

    def wait(self, held: int, wait_s: float, *, stay: bool) -> None:
        """Tell on standard error how many requests are left, until there is none or the worker has left.

        Args:
            held: how many there were when it was told.
            wait_s: seconds that it gets; the command ends with an error when they are over.
            stay: it does not leave: that nothing is left is enough.
        """
        until = time.monotonic() + wait_s
        while True:
            self.look()
            if self.gone:
                return
            if self.row is not None and self.row["in_flight"] != held:
                held = self.row["in_flight"]
                click.echo(f"{self.name}: requests in flight: {held}", err=True)
            if stay and self.row is not None and not held:
                return
            if time.monotonic() > until:
                self._fail(held, wait_s, "finished" if stay else "left")
            time.sleep(_LOOK_S)

    def _fail(self, held: int, wait_s: float, done: str) -> None:
        if self.row is None:
            fail(f"cannot tell whether {self.name} has {done} within {wait_s:g} s: no answer of {self.silent[0]}")
        fail(f"{self.name} has not {done} within {wait_s:g} s; requests in flight: {held}")
