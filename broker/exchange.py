"""Requests on their way: from a client through the waiting room to a worker, and the answer back.

Everything that charges or frees a slot is here. Each request ends once: with the worker's FINISH or ERROR, with the
worker's death, or, while it waits, with an answer of the broker's own. A request that nobody waits for any more keeps
its slot charged until then, because the worker still computes.

What is called a request here is one submission of it, known by id and attempt: the next attempt may come while the
former still runs at a worker that nobody believes in any more.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from random import Random

from ..protocol.errors import ErrorCode
from ..protocol.messages import Cancel, Credit, Error, Finish, FinishReason, Parked, Request, Started, Timings, Usage
from ..protocol.timers import Timers
from .dispatch import POLICIES
from .eligible import candidates, first_served
from .metrics import Counters
from .outbox import Outbox, clip
from .queue import WaitingRoom
from .registry import ClientSession, Registry, WorkerSession
from .requests import RequestRecord, key_of
from .settings import BrokerSettings

#: Models that nobody serves any more are remembered up to this number: workers choose their names.
_MAX_SEEN_MODELS = 16_384


class Exchange:
    """All requests that have no answer yet."""

    def __init__(
        self,
        registry: Registry,
        outbox: Outbox,
        counters: Counters,
        settings: BrokerSettings,
        random: Random,
        now: float,
    ) -> None:
        """Make an exchange without requests."""
        #: By `RequestRecord.key`.
        self.records: dict[bytes, RequestRecord] = {}
        self.draining = False
        self._registry = registry
        self._outbox = outbox
        self._counters = counters
        self._policy = POLICIES[settings.policy]
        self._random = random
        self._max_waiting = settings.max_waiting
        self._started_at = now
        #: Until then workers may still be on their way back to a broker that has been started again.
        self._young_until = now + settings.expiry_s
        self._rooms: dict[str, WaitingRoom] = {}
        #: When the requests that somebody waits for must be ended, by key.
        self._deadlines = Timers()
        self._dispatches = 0
        #: Models that were served once: asking for one is no mistake of the client's. The latest come last.
        self._seen_models: OrderedDict[str, None] = OrderedDict()

    # What clients do.

    def submit(self, client: ClientSession, request: Request, now: float) -> None:
        """Take a request: dispatch it, let it wait, or refuse it."""
        record = RequestRecord.of(request, client, now)
        former = client.requests.get(record.id)
        if former is not None and former.attempt >= record.attempt:
            self._counters.refused += 1  # a repeat, or too late: the client has gone on
            return
        if former is not None:
            # Also where the new one is refused: the client waits for no other any more.
            self._supersede(former)
            if former.worker is not None:
                record.avoid |= {former.worker.name}
        refusal = self._refusal(record)
        if refusal is not None:
            self._counters.refused += 1
            self._outbox.to_client(client, refusal)
            self._outbox.log(
                "request_refused", record.id, model=record.model, attempt=record.attempt, code=refusal.code,
                client=client.name,
            )  # fmt: skip
            return
        self._counters.requests += 1
        self.records[record.key] = record
        client.requests[record.id] = record
        self._watch(record)
        self._room(record.model).append(record)
        self.dispatch((record.model,), now)

    def credit(self, client: ClientSession, message: Credit) -> None:
        """Pass a grant on, or keep it with a request that waits."""
        record = client.requests.get(message.id)
        if record is None or record.attempt != message.attempt:
            return
        if record.worker is not None:
            self._outbox.to_worker(record.worker, message)
        elif record.message is not None and message.limit > record.message.envelope.credit:
            envelope = replace(record.message.envelope, credit=message.limit)
            record.message = replace(record.message, envelope=envelope)

    def cancel(self, client: ClientSession, message: Cancel) -> None:
        """Cancel a request for its client; what has ended already is ignored."""
        record = client.requests.get(message.id)
        if record is None or record.attempt != message.attempt:
            return
        if record.worker is not None:
            self._cancel_at_worker(record)
            return
        self._counters.cancelled += 1
        finish = Finish(record.id, record.attempt, FinishReason.CANCELLED, Usage(), self._waited(record), worker="")
        self._end_waiting(record, finish)

    def client_lost(self, client: ClientSession) -> None:
        """Cancel everything that the client was waiting for."""
        for record in list(client.requests.values()):
            if record.worker is None:
                self._counters.cancelled += 1
                self._forget_waiting(record)
                self._log_cancelled(record)
            else:
                self._orphan(record)
        # Also where it has only requests left that it no longer waits for: past their deadline.
        for worker in self._registry:
            worker.close_route(client)

    # What workers do.

    def answered(self, worker: WorkerSession, answer: Finish | Error, now: float) -> None:
        """Pass the end of a request on and free its slot."""
        record = worker.in_flight.get(key_of(answer.id, answer.attempt))
        if record is None:
            self._counters.late_answers += 1
            return
        worker.release(record)
        self._forget(record)
        if record.client is not None:
            if isinstance(answer, Finish):
                timings = replace(answer.timings, broker_queue_s=record.dispatched_at - record.arrived_at)
                answer = replace(answer, timings=timings)
            self._answer(record, replace(answer, worker=worker.name))
        self._slot_freed(worker, now)

    def parked(self, worker: WorkerSession, message: Parked, now: float) -> None:
        """Free the slot of a request whose worker has only to wait for the reader."""
        record = worker.in_flight.get(key_of(message.id, message.attempt))
        if record is not None:
            worker.park(record)
            self._slot_freed(worker, now)

    def worker_lost(self, worker: WorkerSession, why: str, now: float) -> None:
        """Fail what the worker held; the worker must be out of the registry."""
        message = f"worker {worker.name} was lost: {why}"
        for record in list(worker.in_flight.values()):
            worker.release(record)
            self._forget(record)
            if record.client is not None:
                self._answer(record, self._error(record, ErrorCode.WORKER_LOST, message, retryable=True))
        self.workers_changed((info.name for info in worker.ready.models), now)

    def registered(self, worker: WorkerSession) -> None:
        """Note that a worker has come, or come back.

        It begins anew: nobody goes on waiting for another one's slot because of what it did before. When a full
        cluster is restarted worker by worker, that would be until somebody else's stream ends.
        """
        models = [info.name for info in worker.ready.models]
        self.models_served(models)
        for model in models:
            for record in self._rooms.get(model, ()):
                record.avoid -= {worker.name}

    def models_served(self, models: Iterable[str]) -> None:
        """Note that a worker has registered for these models."""
        for model in models:
            self._seen_models[model] = None
            self._seen_models.move_to_end(model)
        while len(self._seen_models) > _MAX_SEEN_MODELS:
            self._seen_models.popitem(last=False)

    def workers_changed(self, models: Iterable[str], now: float) -> None:
        """Look at what waits for these models after workers of theirs have come, gone or changed.

        What nobody can serve any more fails. The rest may have got a worker, also because another one has gone: who
        is avoided is no longer avoided when nobody else is left.
        """
        here = list(dict.fromkeys(model for model in models if model in self._rooms))
        for model in here:
            self._fail_unservable(model, self._rooms[model])
        self.dispatch(here, now)

    def dispatch(self, models: Iterable[str], now: float) -> None:
        """Give out the free slots for these models: resumed requests first, then by the longest wait."""
        rooms = [room for model in models if (room := self._rooms.get(model)) and self._anyone_free(model)]
        while rooms:
            found = [(room, *first) for room in rooms if (first := first_served(self._registry, room))]
            if not found:
                return
            rooms = [room for room, *_ in found]
            room, record, workers = min(found, key=lambda each: (not each[1].resumed, each[1].arrived_at))
            room.serve(record, now)
            worker = self._policy(workers, self._random)
            assert isinstance(worker, WorkerSession)
            self._assign(record, worker, now)

    # What time does.

    def expire(self, now: float) -> None:
        """End the requests whose deadline has passed, or whose time in the waiting room."""
        for record in [self.records[key] for key in self._deadlines.due(now)]:
            waited = now - record.arrived_at
            if record.waits_too_long_first:
                message = f"no worker was free for it in the {waited:.3f} s that it waited for {record.model!r}"
                self._end_waiting(record, self._error(record, ErrorCode.QUEUE_TIMEOUT, message, retryable=False))
                continue
            where = f"at worker {record.worker.name}" if record.worker else "in the waiting room"
            message = f"the deadline passed after {waited:.3f} s, {where}"
            self._end(record, self._error(record, ErrorCode.DEADLINE, message, retryable=False))

    def next_deadline(self) -> float | None:
        """Return the time of the earliest deadline."""
        return self._deadlines.next()

    def give_up(self, why: str) -> None:
        """Fail everything that is left, because the broker stops."""
        for record in list(self.records.values()):
            if record.client is None:
                continue
            self._end(record, self._error(record, ErrorCode.DRAINING, why, retryable=True))

    # What management asks.

    def waiting(self, model: str) -> int:
        """Return how many requests wait for a model."""
        return len(self._rooms.get(model, ()))

    def tally(self) -> dict[str, int]:
        """Return how many requests wait, run, and run without anybody waiting for them."""
        waiting = sum(map(len, self._rooms.values()))
        orphaned = sum(1 for record in self.records.values() if record.client is None)
        return {"waiting": waiting, "running": len(self.records) - waiting - orphaned, "orphaned": orphaned}

    def validate(self) -> None:
        """Check every invariant of requests, slots and routes.

        Raises:
            AssertionError: one does not hold.
        """
        waiting = {record.key: record for room in self._rooms.values() for record in room}
        timed = [key for key, record in self.records.items() if record.client and record.due_at is not None]
        assert all(key in self._deadlines for key in timed), "a deadline is not watched"
        assert len(self._deadlines) == len(timed), "a deadline of a request that has ended"
        running = {key: record for worker in self._registry for key, record in worker.in_flight.items()}
        assert not waiting.keys() & running.keys(), "a request waits and runs"
        assert {**waiting, **running} == self.records, "a request is lost or left over"
        for model, room in self._rooms.items():
            resumed = room.resumed()
            assert len(resumed) <= self._max_waiting
            assert len(room) - len(resumed) <= self._max_waiting
            assert room.bytes == sum(record.size_bytes for record in room)
            assert all(record.model == model for record in room)
            assert not resumed or self._registry.resuming(model), "nobody can resume it"
        for record in waiting.values():
            assert not candidates(self._registry, record), "idle slot"
            assert record.worker is None
            assert record.client is not None
            assert record.message is not None
        for worker in self._registry:
            assert worker.parked == sum(record.parked for record in worker.in_flight.values())
            holds: dict[bytes, int] = {}
            for record in worker.in_flight.values():
                assert record.worker is worker
                assert record.message is None
                holds[record.route] = holds.get(record.route, 0) + 1
            assert holds == {route: hold.count for route, hold in worker.routes.items()}, "a route leaks"

    # Inside.

    def _refusal(self, record: RequestRecord) -> Error | None:
        model = record.model
        if record.key in self.records:
            return self._error(record, ErrorCode.BAD_REQUEST, "this request id is in use", retryable=False)
        if self.draining:
            return self._error(record, ErrorCode.DRAINING, "the broker is shutting down", retryable=True)
        if not self._registry.serves(model):
            return self._unserved(record)
        if record.resumed and not self._registry.resuming(model):
            return self._cannot_resume(record)
        if record.deadline_at is not None and record.deadline_at <= record.arrived_at:
            return self._error(record, ErrorCode.DEADLINE, "the deadline had passed on arrival", retryable=False)
        room = self._room(model)
        if not room.has_place_for(record) and not candidates(self._registry, record):
            message = f"{len(room)} requests wait for {model!r} already"
            refusal = self._error(record, ErrorCode.BUSY, message, retryable=True)
            return replace(refusal, retry_after_s=room.retry_after_s())
        return None

    def _unserved(self, record: RequestRecord) -> Error:
        model, here = record.model, ", ".join(self._registry.models()) or "none"
        if model in self._seen_models:
            message = f"no worker serves {model!r} at the moment; models here: {here}"
            return self._error(record, ErrorCode.NO_WORKER, message, retryable=True)
        if record.arrived_at < self._young_until:
            age_s = record.arrived_at - self._started_at
            message = f"no worker serves {model!r} yet; this broker started {age_s:.1f} s ago; models here: {here}"
            return self._error(record, ErrorCode.NO_WORKER, message, retryable=True)
        message = f"no worker serves {model!r}; models here: {here}"
        return self._error(record, ErrorCode.MODEL_NOT_FOUND, message, retryable=False)

    def _cannot_resume(self, record: RequestRecord) -> Error:
        if self._outbox.now < self._young_until:
            message = f"no worker that can go on with {record.model!r} is back yet; this broker has just started"
            return self._error(record, ErrorCode.NO_WORKER, message, retryable=True)
        message = (
            f"the stream broke after {record.prior_tokens} tokens, and no worker of {record.model!r} can go on with "
            "what another one has begun"
        )
        return self._error(record, ErrorCode.CANNOT_RESUME, message, retryable=False)

    def _fail_unservable(self, model: str, room: WaitingRoom) -> None:
        if not self._registry.serves(model):
            for record in list(room):
                message = f"the last worker for {model!r} has left"
                self._end_waiting(record, self._error(record, ErrorCode.NO_WORKER, message, retryable=True))
            del self._rooms[model]
        elif not self._registry.resuming(model):
            for record in room.resumed():
                self._end_waiting(record, self._cannot_resume(record))

    def _supersede(self, former: RequestRecord) -> None:
        """End a submission without a word, since its client has made another one."""
        self._counters.superseded += 1
        client = former.client
        assert client is not None
        del client.requests[former.id]
        if former.worker is None:
            self._forget_waiting(former)
        else:
            self._orphan(former)

    def _room(self, model: str) -> WaitingRoom:
        room = self._rooms.get(model)
        if room is None:
            room = self._rooms[model] = WaitingRoom(self._max_waiting)
        return room

    def _anyone_free(self, model: str) -> bool:
        return any(worker.free for worker in self._registry.serving(model))

    def _slot_freed(self, worker: WorkerSession, now: float) -> None:
        if worker.free:
            self.dispatch((info.name for info in worker.ready.models), now)

    def _watch(self, record: RequestRecord) -> None:
        """See to it that the request ends when it is due, now that it waits or runs."""
        if record.due_at is None:
            self._deadlines.drop(record.key)
        else:
            self._deadlines.set(record.key, record.due_at)

    def _assign(self, record: RequestRecord, worker: WorkerSession, now: float) -> None:
        message, record.message = record.message, None
        assert message is not None
        left = None if record.deadline_at is None else max(0.0, record.deadline_at - now)
        envelope = replace(message.envelope, route=record.route, deadline_s=left, avoid=(), queue_s=None)
        record.worker, record.dispatched_at = worker, now
        if record.queue_until is not None:
            self._watch(record)
        self._dispatches += 1
        worker.last_used = self._dispatches
        worker.charge(record)
        self._outbox.to_worker(worker, replace(message, envelope=envelope))
        assert record.client is not None
        self._outbox.to_client(record.client, Started(record.id, record.attempt, worker.name))
        self._outbox.log(
            "request_dispatched", record.id, level=logging.DEBUG, model=record.model, worker=worker.name,
            attempt=record.attempt, prior_tokens=record.prior_tokens, waited_s=now - record.arrived_at,
        )  # fmt: skip

    def _cancel_at_worker(self, record: RequestRecord) -> None:
        if record.cancelled:
            return
        record.cancelled = True
        self._counters.cancelled += 1
        assert record.worker is not None
        self._outbox.to_worker(record.worker, Cancel(record.id, record.attempt))
        self._log_cancelled(record)

    def _log_cancelled(self, record: RequestRecord) -> None:
        worker = record.worker.name if record.worker else ""
        waited_s = self._outbox.now - record.arrived_at
        self._outbox.log(
            "request_cancelled", record.id, model=record.model, worker=worker, attempt=record.attempt, s=waited_s
        )

    def _orphan(self, record: RequestRecord) -> None:
        """Let nobody wait for a running request any more; its slot stays charged."""
        record.client = None
        self._deadlines.drop(record.key)
        self._cancel_at_worker(record)

    def _forget(self, record: RequestRecord) -> None:
        del self.records[record.key]
        self._deadlines.drop(record.key)

    def _forget_waiting(self, record: RequestRecord) -> None:
        self._rooms[record.model].remove(record)
        self._forget(record)
        record.message = None  # it goes to no worker any more

    def _end(self, record: RequestRecord, answer: Error) -> None:
        """Answer a request before its worker does; what runs keeps its slot until then."""
        if record.worker is None:
            self._end_waiting(record, answer)
        else:
            self._answer(record, answer)
            self._orphan(record)

    def _end_waiting(self, record: RequestRecord, answer: Finish | Error) -> None:
        self._forget_waiting(record)
        self._answer(record, answer)

    def _answer(self, record: RequestRecord, answer: Finish | Error) -> None:
        """Send the client its one answer."""
        client = record.client
        assert client is not None
        del client.requests[record.id]
        self._outbox.to_client(client, answer)
        worker = record.worker.name if record.worker else ""
        if isinstance(answer, Finish):
            self._counters.finished += 1
            self._outbox.log(
                "request_finished", record.id, model=record.model, worker=worker, attempt=record.attempt,
                reason=answer.reason.value, prior_tokens=record.prior_tokens, tokens=answer.usage.completion_tokens,
                s=self._outbox.now - record.arrived_at,
            )  # fmt: skip
        else:
            self._counters.failed += 1
            self._outbox.log(
                "request_failed", record.id, model=record.model, worker=worker, attempt=record.attempt,
                code=answer.code, message=answer.message, s=self._outbox.now - record.arrived_at,
            )  # fmt: skip

    def _waited(self, record: RequestRecord) -> Timings:
        return Timings(broker_queue_s=self._outbox.now - record.arrived_at)

    @staticmethod
    def _error(record: RequestRecord, code: ErrorCode, message: str, *, retryable: bool) -> Error:
        # Names in it are a peer's choice; a longer message would be malformed, and end the client's session.
        worker = record.worker.name if record.worker else ""
        return Error(record.id, record.attempt, code.value, clip(message), retryable, worker=worker)
