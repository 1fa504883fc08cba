"""Requests on their way: from a client through the waiting room to a worker, and the answer back.

Everything that charges or frees a slot is here. Each request ends once: with the worker's FINISH or ERROR, with the
worker's death, or, while it waits, with an answer of the broker's own. A request that nobody waits for any more keeps
its slot charged until then, because the worker still computes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from random import Random

from ..protocol.errors import ErrorCode
from ..protocol.messages import Cancel, Credit, Error, Finish, FinishReason, Parked, Request, Timings, Usage
from ..protocol.timers import Timers
from .dispatch import Candidate, Policy
from .metrics import Counters
from .outbox import Outbox, clip
from .queue import WaitingRoom
from .registry import ClientSession, Registry, WorkerSession
from .requests import RequestRecord

#: Models that nobody serves any more are remembered up to this number: workers choose their names.
_MAX_SEEN_MODELS = 16_384
#: A worker takes about an engine step to let a cancelled request go.
_CANCELLING_S = 0.1


class Exchange:
    """All requests that have no answer yet."""

    def __init__(
        self,
        registry: Registry,
        outbox: Outbox,
        counters: Counters,
        policy: Policy[Candidate],
        random: Random,
        max_waiting: int,
    ) -> None:
        """Make an exchange without requests."""
        self.records: dict[bytes, RequestRecord] = {}
        self.draining = False
        self._registry = registry
        self._outbox = outbox
        self._counters = counters
        self._policy = policy
        self._random = random
        self._max_waiting = max_waiting
        self._rooms: dict[str, WaitingRoom] = {}
        #: Deadlines of the requests that somebody waits for, by id.
        self._deadlines = Timers()
        self._dispatches = 0
        #: Models that were served once: asking for one is no mistake of the client's. The latest come last.
        self._seen_models: OrderedDict[str, None] = OrderedDict()

    # What clients do.

    def submit(self, client: ClientSession, request: Request, now: float) -> None:
        """Take a request: dispatch it, let it wait, or refuse it."""
        known = self.records.get(request.id)
        if known is not None and known.client is client and known.attempt == request.envelope.attempt:
            self._counters.refused += 1  # a repeat; the first one is on its way
            return
        record = RequestRecord.of(request, client, now)
        refusal = self._refusal(record, known)
        if refusal is not None:
            self._counters.refused += 1
            self._outbox.to_client(client, refusal)
            self._outbox.log("request_refused", record.id, model=record.model, code=refusal.code, client=client.name)
            return
        self._counters.requests += 1
        self.records[record.id] = record
        client.requests[record.id] = record
        if record.deadline_at is not None:
            self._deadlines.set(record.id, record.deadline_at)
        self._room(record.model).append(record)
        self._dispatch(record.model, now)

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
        record = worker.in_flight.get(answer.id)
        if record is None or record.attempt != answer.attempt:
            self._counters.late_answers += 1
            return
        worker.release(record)
        self._forget(record)
        if record.client is not None:
            if isinstance(answer, Finish):
                timings = replace(answer.timings, broker_queue_s=record.dispatched_at - record.arrived_at)
                answer = replace(answer, timings=timings, worker=worker.name)
            self._answer(record, answer)
        self.dispatch_for(worker, now)

    def parked(self, worker: WorkerSession, message: Parked, now: float) -> None:
        """Free the slot of a request whose worker has only to wait for the reader."""
        record = worker.in_flight.get(message.id)
        if record is not None and record.attempt == message.attempt:
            worker.park(record)
            self.dispatch_for(worker, now)

    def worker_lost(self, worker: WorkerSession, why: str) -> None:
        """Fail what the worker held; the worker must be out of the registry."""
        message = f"worker {worker.name} was lost: {why}"
        for record in list(worker.in_flight.values()):
            worker.release(record)
            self._forget(record)
            if record.client is not None:
                self._answer(record, self._error(record, ErrorCode.WORKER_LOST, message, retryable=True))
        self.models_lost(info.name for info in worker.ready.models)

    def models_served(self, models: Iterable[str]) -> None:
        """Note that a worker has registered for these models."""
        for model in models:
            self._seen_models[model] = None
            self._seen_models.move_to_end(model)
        while len(self._seen_models) > _MAX_SEEN_MODELS:
            self._seen_models.popitem(last=False)

    def models_lost(self, models: Iterable[str]) -> None:
        """Fail what waits for those of the models that nobody serves any more."""
        for model in models:
            room = self._rooms.get(model)
            if room is None or self._registry.serves(model):
                continue
            for record in list(room):
                message = f"the last worker for {model!r} has left"
                self._end_waiting(record, self._error(record, ErrorCode.NO_WORKER, message, retryable=True))
            del self._rooms[model]

    def dispatch_for(self, worker: WorkerSession, now: float) -> None:
        """Fill the free slots of a worker from the rooms of its models, longest wait first."""
        while worker.free:
            waiting = [room for info in worker.ready.models if (room := self._rooms.get(info.name))]
            if not waiting:
                return
            self._dispatch_first(min(waiting, key=lambda room: room.first().arrived_at), now)

    # What time does.

    def expire(self, now: float) -> None:
        """End the requests whose deadline has passed."""
        for record in [self.records[id] for id in self._deadlines.due(now)]:
            waited = now - record.arrived_at
            where = f"worker {record.worker.name}" if record.worker else "the waiting room"
            error = self._error(
                record, ErrorCode.DEADLINE, f"the deadline passed after {waited:.3f} s, at {where}", retryable=False
            )
            if record.worker is None:
                self._end_waiting(record, error)
            else:
                self._answer(record, error)
                self._orphan(record)

    def next_deadline(self) -> float | None:
        """Return the time of the earliest deadline."""
        return self._deadlines.next()

    def give_up(self, why: str) -> None:
        """Fail everything that is left, because the broker stops."""
        for record in list(self.records.values()):
            if record.client is None:
                continue
            error = self._error(record, ErrorCode.DRAINING, why, retryable=True)
            if record.worker is None:
                self._end_waiting(record, error)
            else:
                self._answer(record, error)
                self._orphan(record)

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
        waiting = {record.id: record for room in self._rooms.values() for record in room}
        timed = [id for id, record in self.records.items() if record.client and record.deadline_at is not None]
        assert all(id in self._deadlines for id in timed), "a deadline is not watched"
        assert len(self._deadlines) == len(timed), "a deadline of a request that has ended"
        running = {id: record for worker in self._registry for id, record in worker.in_flight.items()}
        assert not waiting.keys() & running.keys(), "a request waits and runs"
        assert {**waiting, **running} == self.records, "a request is lost or left over"
        for model, room in self._rooms.items():
            assert len(room) <= self._max_waiting
            assert room.bytes == sum(record.size_bytes for record in room)
            assert not room or not any(worker.free for worker in self._registry.serving(model)), "idle slot"
        for record in waiting.values():
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

    def _refusal(self, record: RequestRecord, known: RequestRecord | None) -> Error | None:
        model = record.model
        if known is not None and known.client in (None, record.client):
            message = f"attempt {known.attempt} of this request has not ended yet"
            return replace(self._error(record, ErrorCode.BUSY, message, retryable=True), retry_after_s=_CANCELLING_S)
        if known is not None:
            return self._error(record, ErrorCode.BAD_REQUEST, "this request id is in use", retryable=False)
        if self.draining:
            return self._error(record, ErrorCode.DRAINING, "the broker is shutting down", retryable=True)
        if not self._registry.serves(model):
            here = ", ".join(self._registry.models()) or "none"
            if model in self._seen_models:
                message = f"no worker serves {model!r} at the moment; models here: {here}"
                return self._error(record, ErrorCode.NO_WORKER, message, retryable=True)
            message = f"no worker serves {model!r}; models here: {here}"
            return self._error(record, ErrorCode.MODEL_NOT_FOUND, message, retryable=False)
        if record.deadline_at is not None and record.deadline_at <= record.arrived_at:
            return self._error(record, ErrorCode.DEADLINE, "the deadline had passed on arrival", retryable=False)
        room = self._room(model)
        if not room.has_place_for(record) and (room or not self._candidates(model)):
            message = f"{len(room)} requests wait for {model!r} already"
            refusal = self._error(record, ErrorCode.BUSY, message, retryable=True)
            return replace(refusal, retry_after_s=room.retry_after_s())
        return None

    def _room(self, model: str) -> WaitingRoom:
        room = self._rooms.get(model)
        if room is None:
            room = self._rooms[model] = WaitingRoom(self._max_waiting)
        return room

    def _candidates(self, model: str) -> list[WorkerSession]:
        return [worker for worker in self._registry.serving(model) if worker.free]

    def _dispatch(self, model: str, now: float) -> None:
        room = self._room(model)
        while room and self._dispatch_first(room, now):
            pass

    def _dispatch_first(self, room: WaitingRoom, now: float) -> bool:
        candidates = self._candidates(room.first().model)
        if not candidates:
            return False
        record = room.pop(now)
        worker = self._policy(candidates, self._random)
        assert isinstance(worker, WorkerSession)
        self._assign(record, worker, now)
        return True

    def _assign(self, record: RequestRecord, worker: WorkerSession, now: float) -> None:
        message, record.message = record.message, None
        assert message is not None
        left = None if record.deadline_at is None else max(0.0, record.deadline_at - now)
        envelope = replace(message.envelope, route=record.route, deadline_s=left)
        record.worker, record.dispatched_at = worker, now
        self._dispatches += 1
        worker.last_used = self._dispatches
        worker.charge(record)
        self._outbox.to_worker(worker, replace(message, envelope=envelope))
        self._outbox.log(
            "request_dispatched", record.id, level=logging.DEBUG, model=record.model, worker=worker.name,
            waited_s=now - record.arrived_at,
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
        self._outbox.log("request_cancelled", record.id, model=record.model, worker=worker, s=waited_s)

    def _orphan(self, record: RequestRecord) -> None:
        """Let nobody wait for a running request any more; its slot stays charged."""
        record.client = None
        self._deadlines.drop(record.id)
        self._cancel_at_worker(record)

    def _forget(self, record: RequestRecord) -> None:
        del self.records[record.id]
        self._deadlines.drop(record.id)

    def _forget_waiting(self, record: RequestRecord) -> None:
        self._rooms[record.model].remove(record)
        self._forget(record)
        record.message = None  # it goes to no worker any more

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
                "request_finished", record.id, model=record.model, worker=worker, reason=answer.reason.value,
                tokens=answer.usage.completion_tokens, s=self._outbox.now - record.arrived_at,
            )  # fmt: skip
        else:
            self._counters.failed += 1
            self._outbox.log(
                "request_failed", record.id, model=record.model, worker=worker, code=answer.code,
                message=answer.message, s=self._outbox.now - record.arrived_at,
            )  # fmt: skip

    def _waited(self, record: RequestRecord) -> Timings:
        return Timings(broker_queue_s=self._outbox.now - record.arrived_at)

    @staticmethod
    def _error(record: RequestRecord, code: ErrorCode, message: str, *, retryable: bool) -> Error:
        # Names in it are a peer's choice; a longer message would be malformed, and end the client's session.
        return Error(record.id, record.attempt, code.value, clip(message), retryable)
