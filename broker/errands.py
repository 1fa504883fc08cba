"""Queries that are not answered at once: what the brokers below this one say is part of the answer, or time is.

An errand ends when all who were asked have answered or are gone, or when its time is up, whichever is first. One that
asks nobody ends when its time is up. A broker below is asked by QUERY, as a client asks this one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeAlias

from ..protocol.errors import BusyError, ErrorCode
from ..protocol.messages import ID_BYTES, Error, Query, Reply
from ..protocol.timers import Timers
from .outbox import Outbox, clip
from .registry import WorkerSession

Answer: TypeAlias = Reply | Error

#: Errands of one client at a time: a person has one, and each costs every broker below something.
MAX_OF_CLIENT = 16
#: A broker above asks for all its clients.
MAX_OF_PARENT = 1_024


@dataclass(frozen=True, slots=True, eq=False)
class Asker:
    """Whoever has sent a QUERY.

    Attributes:
        session: its session, which it is known by: when that ends, nobody waits for the answer.
        name: what it calls itself, for the log.
        say: sends it the answer.
        admin: it may change things.
        at_a_time: how many errands it may have under way.
    """

    session: Hashable
    name: str
    say: Callable[[Answer], None]
    admin: bool
    at_a_time: int


@dataclass(frozen=True, slots=True)
class Errand:
    """What has to be done for an answer.

    Attributes:
        within_s: the answer is made after this time, whoever has answered by then.
        asks: queries for brokers below this one: the session, the method, its arguments.
        finish: makes the result from what they said, by their names, or raises a TokenmqError. Who has not answered
            in time is missing; for one that is gone there is an ERROR.
    """

    within_s: float
    finish: Callable[[Mapping[str, Answer]], Any]
    asks: tuple[tuple[WorkerSession, str, Mapping[str, Any]], ...] = ()


@dataclass(slots=True, eq=False)
class _Open:
    """An errand on its way; `waiting` has the ids of the queries that have no answer yet."""

    asker: Asker
    id: bytes
    finish: Callable[[Mapping[str, Answer]], Any]
    waiting: set[bytes] = field(default_factory=set)
    answers: dict[str, Answer] = field(default_factory=dict)


class Errands:
    """All errands that are on their way."""

    def __init__(
        self, outbox: Outbox, random: Random, settle: Callable[[Asker, bytes, Callable[[], Any]], None]
    ) -> None:
        """Have none. `settle` answers the query of that id with what its function returns or raises."""
        self._outbox = outbox
        self._random = random
        self._settle = settle
        #: By a number of their own: the ids of queries are their askers' choice.
        self._open: dict[bytes, _Open] = {}
        self._of: dict[Hashable, set[bytes]] = {}
        self._timers = Timers()
        #: Who was asked for which errand, by the id of the query.
        self._asked: dict[bytes, tuple[WorkerSession, bytes]] = {}

    def begin(self, asker: Asker, id: bytes, errand: Errand, now: float) -> None:
        """Set out: ask whom there is to ask.

        Raises:
            BusyError: this asker has too many errands under way.
        """
        if len(self._of.get(asker.session, ())) >= asker.at_a_time:
            raise BusyError(f"{asker.at_a_time} queries of yours wait for their answers already", retryable=True)
        number = self._random.randbytes(ID_BYTES)
        opened = self._open[number] = _Open(asker, id, errand.finish)
        self._of.setdefault(asker.session, set()).add(number)
        self._timers.set(number, now + errand.within_s)
        for worker, method, arguments in errand.asks:
            query = Query(self._random.randbytes(ID_BYTES), method, arguments)
            opened.waiting.add(query.id)
            self._asked[query.id] = worker, number
            self._outbox.to_worker(worker, query)

    def answered(self, worker: WorkerSession, answer: Answer) -> bool:
        """Take what a broker below says; tell whether it was asked."""
        asked, number = self._asked.get(answer.id, (None, b""))
        if asked is not worker:
            return False
        self._take(number, worker, answer)
        return True

    def worker_lost(self, worker: WorkerSession, why: str) -> None:
        """Wait no longer for a broker below: its session has ended."""
        for id, number in [(id, number) for id, (asked, number) in self._asked.items() if asked is worker]:
            message = clip(f"{worker.name} was lost before it answered: {why}")
            self._take(number, worker, Error(id, 0, ErrorCode.WORKER_LOST.value, message, retryable=True))

    def asker_lost(self, session: Hashable) -> None:
        """Forget what was asked in a session that has ended; what was ordered elsewhere is done all the same."""
        for number in list(self._of.get(session, ())):
            self._forget(number)

    def expire(self, now: float) -> None:
        """End the errands whose time is up."""
        for number in self._timers.due(now):
            self._finish(number)

    def next_deadline(self) -> float | None:
        """Return when `expire` is next needed, None for never."""
        return self._timers.next()

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        assert all(number in self._timers for number in self._open), "an errand without a bound"
        assert len(self._timers) == len(self._open), "a stray timer"
        assert {number for mine in self._of.values() for number in mine} == self._open.keys()
        assert all(self._of.values()), "an asker without errands"
        waiting = {id: number for number, opened in self._open.items() for id in opened.waiting}
        assert waiting == {id: number for id, (_, number) in self._asked.items()}

    def _take(self, number: bytes, worker: WorkerSession, answer: Answer) -> None:
        del self._asked[answer.id]
        opened = self._open[number]
        opened.waiting.remove(answer.id)
        opened.answers[worker.name] = answer
        if not opened.waiting:
            self._finish(number)

    def _finish(self, number: bytes) -> None:
        opened = self._forget(number)
        self._settle(opened.asker, opened.id, lambda: opened.finish(opened.answers))

    def _forget(self, number: bytes) -> _Open:
        opened = self._open.pop(number)
        self._timers.drop(number)
        mine = self._of[opened.asker.session]
        mine.remove(number)
        if not mine:
            del self._of[opened.asker.session]
        for id in opened.waiting:
            del self._asked[id]
        return opened
