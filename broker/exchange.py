"""Requests on their way: from a client through the waiting room to a worker, and the answer back.

Everything that charges or frees a slot is here. Each request ends once: with the worker's FINISH or ERROR, with the
worker's death, or, while it waits, with an answer of the broker's own. A request that nobody waits for any more keeps
its slot charged until then, because the worker still computes.

What is called a request here is one submission of it, known by id and attempt: the next attempt may come while the
former still runs at a worker that nobody believes in any more.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from hashlib import blake2b
from random import Random
from secrets import token_bytes
from typing import Any

from ..protocol.codec import with_route
from ..protocol.errors import ErrorCode
from ..protocol.limits import MAX_HOPS, MAX_SECONDS
from ..protocol.messages import (
    ID_BYTES,
    Cancel,
    Credit,
    Envelope,
    Error,
    Finish,
    FinishReason,
    Parked,
    Request,
    Started,
    Timings,
    Usage,
)
from ..protocol.timers import Timers
from .accounts import ClientAccount
from .breaker import State
from .chooser import Chooser
from .guests import Guest
from .hops import answer_from, avoid_below, loop_in, name_below
from .metrics import Counters
from .outbox import Outbox
from .pool import Free, Spare
from .queue import WaitingRoom
from .refusals import Refusals, error
from .registry import ClientSession, Registry, WorkerSession
from .requests import RequestRecord, key_of
from .settings import BrokerSettings


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
        id: str = "",
    ) -> None:
        """Make an exchange without requests. `id` is the broker's own, among brokers below brokers."""
        self.chooser = Chooser(registry, outbox, counters, settings, random)
        #: By `RequestRecord.key`.
        self.records: dict[bytes, RequestRecord] = {}
        self.draining = False
        self._registry = registry
        self._outbox = outbox
        self._counters = counters
        self._id = id
        #: What the keys of chunks past the broker are made with.
        self._secret = token_bytes(32)
        self._max_waiting = settings.max_waiting
        self._weights = dict(settings.client_weights)
        #: Requests that run, by share.
        self._running: dict[str, int] = {}
        #: Whose client is to hear STARTED, when, and of which worker; in the order of time.
        self._notices: deque[tuple[float, RequestRecord, WorkerSession]] = deque()
        self._notice_s = settings.notice_s
        #: Requests that run, and nobody waits for them.
        self._orphaned = 0
        self._rooms: dict[str, WaitingRoom] = {}
        #: When the requests that somebody waits for must be ended, by key.
        self._deadlines = Timers()
        self.refusals = Refusals(registry, now, settings.expiry_s)

    # What clients do.

    def submit(
        self, client: ClientSession, request: Request, now: float, frames: Sequence[bytes] | None = None
    ) -> None:
        """Take a request: dispatch it, let it wait, or refuse it.

        Args:
            client: who sent it.
            request: the request.
            now: the time.
            frames: the same as it came; the worker gets as much of it as it can.
        """
        record = RequestRecord.of(request, client, now)
        # A broker above this one judges itself which attempts go on, and waits for the end of each.
        former = client.attempts.get(record.id)
        if former and not isinstance(client, Guest):
            if any(other.attempt >= record.attempt for other in former):
                self._counters.refused += 1  # a repeat, or too late: the client has gone on
                return
            record.avoid |= {other.holder for other in former if other.worker is not None}
            if not record.hedge:
                # Also where the new one is refused: the client waits for no other any more.
                for other in list(former):
                    self._supersede(other)
        refusal = self._refusal(record)
        if refusal is not None:
            self._refuse(record, refusal)
        elif record.hedge:
            self._submit_hedge(record, now)
        else:
            self._submit(record, now, frames)

    def _submit(self, record: RequestRecord, now: float, frames: Sequence[bytes] | None) -> None:
        room = self._room(record.model)
        if not room and (free := self.chooser.candidates(record)):
            # Nobody waits, and somebody is free: nothing of what a waiting room knows would change.
            self._accept(record)
            self._assign(record, free, now, frames)
            return
        pushed_out = room.admit(record)
        if pushed_out is None:
            # The room is full, and what is there may be waiting for something else than this one.
            free = self.chooser.candidates(record)
            if free:
                self._accept(record)
                self._assign(record, free, now)
            else:
                self._refuse(record, self._busy(record))
            return
        self._accept(record)
        _queued(record, record.size_bytes)
        for other in pushed_out:
            # It has left the room already.
            _queued(other, -other.size_bytes)
            self._forget(other)
            other.message = None
            self._answer(other, self._busy(other))
        self.dispatch((record.model,), now)

    def _submit_hedge(self, record: RequestRecord, now: float) -> None:
        """Give a request to a second worker at once, or refuse it: one that waits would help nobody."""
        free = self.chooser.candidates(record, strictly=True)
        if free:
            self._counters.hedges += 1
            self._accept(record)
            self._assign(record, free, now)
        else:
            message = f"no other worker of {record.model!r} has a free slot for a second attempt"
            self._refuse(record, error(record, ErrorCode.BUSY, message, retryable=True))

    def _accept(self, record: RequestRecord) -> None:
        assert record.client is not None
        self._counters.requests += 1
        self.records[record.key] = record
        record.client.add(record)
        if record.deadline_at is not None or record.queue_until is not None:
            self._watch(record)

    def _refuse(self, record: RequestRecord, refusal: Error) -> None:
        client = record.client
        assert client is not None
        self._counters.refused += 1
        self._outbox.to_client(client, refusal)
        self._outbox.log(
            "request_refused", record.id, model=record.model, attempt=record.attempt, code=refusal.code,
            client=client.name,
        )  # fmt: skip

    def credit(self, client: ClientSession, message: Credit) -> None:
        """Pass a grant on, or keep it with a request that waits."""
        record = client.find(message.id, message.attempt)
        if record is None:
            return
        if record.worker is not None:
            if (
                message.limit > record.granted
            ):  # else it says nothing new, and workers are not to hear it again and again
                record.granted = message.limit
                self._outbox.to_worker(record.worker, message)
        elif record.message is not None and message.limit > record.message.envelope.credit:
            envelope = replace(record.message.envelope, credit=message.limit)
            record.message = replace(record.message, envelope=envelope)

    def cancel(self, client: ClientSession, message: Cancel) -> None:
        """Cancel a request for its client; what has ended already is ignored."""
        record = client.find(message.id, message.attempt)
        if record is None:
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
            client.drop(record)  # its account may be that of other sessions, too
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

    def answered(
        self, worker: WorkerSession, answer: Finish | Error, now: float, frames: Sequence[bytes] | None = None
    ) -> None:
        """Pass the end of a request on and free its slot.

        Args:
            worker: who says it.
            answer: what it says.
            now: the time.
            frames: the same as it came: the client gets these where there is nothing to add.
        """
        record = worker.in_flight.get(key_of(answer.id, answer.attempt))
        if record is None:
            self._counters.late_answers += 1
            return
        self._release(worker, record)
        self._forget(record)
        self.chooser.judge(worker, record, answer, now)
        if record.client is not None:
            told = self._told(worker, record, answer)
            self._answer(record, told, frames if told is answer else None)
        self._slot_freed(worker, now)

    def _told(self, worker: WorkerSession, record: RequestRecord, answer: Finish | Error) -> Finish | Error:
        """Return an answer with what this broker knows of it: the same one where there is nothing to add."""
        if worker.is_broker:
            answer = answer_from(worker.name, answer)
        elif answer.worker != worker.name:
            answer = replace(answer, worker=worker.name)
        if isinstance(answer, Finish) and (record.decision is not None or record.dispatched_at > record.arrived_at):
            answer = replace(answer, timings=_timings(record, answer.timings))
        return answer

    def parked(self, worker: WorkerSession, message: Parked, now: float) -> None:
        """Free the slot of a request whose worker has only to wait for the reader."""
        record = worker.in_flight.get(key_of(message.id, message.attempt))
        if record is not None:
            worker.park(record)
            if isinstance(record.client, Guest):
                self._outbox.to_client(record.client, message)
            self._slot_freed(worker, now)

    def started(self, worker: WorkerSession, message: Started) -> None:
        """Note who runs a request behind a broker below, and pass it on."""
        record = worker.in_flight.get(key_of(message.id, message.attempt))
        if record is not None:
            record.holder = name_below(worker.name, message.worker)
            if record.client is not None:
                # No other field: a broker below may offer no endpoint and no key (SPEC.md, 14.2).
                self._outbox.to_client(record.client, Started(record.id, record.attempt, record.holder))

    def worker_lost(self, worker: WorkerSession, why: str, now: float) -> None:
        """Fail what the worker held; the worker must be out of the registry."""
        message = f"worker {worker.name} was lost: {why}"
        self.chooser.forget(worker)
        for record in list(worker.in_flight.values()):
            self._release(worker, record)
            self._forget(record)
            if record.client is not None:
                self._answer(record, error(record, ErrorCode.WORKER_LOST, message, retryable=True))
        self.workers_changed((info.name for info in worker.ready.models), now)

    def registered(self, worker: WorkerSession) -> None:
        """Note that a worker has come, or come back.

        It begins anew: nobody goes on waiting for another one's slot because of what it did before. When a full
        cluster is restarted worker by worker, that would be until somebody else's stream ends.
        """
        models = [info.name for info in worker.ready.models]
        self.refusals.models_served(models)
        for model in models:
            if model in self._rooms:
                self._rooms[model].forgive(worker.name)

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
        """Give out the free slots for these models, in the order of their waiting rooms; the most urgent first."""
        pool = self._registry.pool
        wanted = {model: room for model in models if (room := self._rooms.get(model))}
        # Whether anybody is free is asked each time: a room would have to look at all that waits to find it out.
        while rooms := [room for model, room in wanted.items() if room and pool.anyone_free(model)]:
            wishes: dict[tuple[str, bool, frozenset[str]], Free | Spare] = {}

            def servable(record: RequestRecord, known: dict[Any, Free | Spare] = wishes) -> bool:
                # Requests with the same wishes have the same candidates: many that must wait cost a look-up each.
                wish = (record.model, record.resumed, record.avoid)
                found = known.get(wish)
                if found is None:
                    found = known[wish] = self.chooser.candidates(record)
                return bool(found)

            found = [(first, room) for room in rooms if (first := room.first(servable))]
            if not found:
                return
            (_, record), room = min(found, key=lambda each: each[0][0])
            room.serve(record, now)
            _queued(record, -record.size_bytes)
            self._assign(record, wishes[record.model, record.resumed, record.avoid], now)

    # What time does.

    def expire(self, now: float) -> bool:
        """End the requests whose deadline has passed, or whose time in the waiting room; try suspended workers.

        Returns:
            Whether a worker is tried again.
        """
        for record in [self.records[key] for key in self._deadlines.due(now)]:
            waited = now - record.arrived_at
            if record.waits_too_long_first:
                message = f"no worker was free for it in the {waited:.3f} s that it waited for {record.model!r}"
                self._end_waiting(record, error(record, ErrorCode.QUEUE_TIMEOUT, message, retryable=False))
                continue
            where = f"at worker {record.worker.name}" if record.worker else "in the waiting room"
            message = f"the deadline passed after {waited:.3f} s, {where}"
            self._end(record, error(record, ErrorCode.DEADLINE, message, retryable=False))
        tried = self.chooser.tried_again(now)
        for worker in tried:
            self._slot_freed(worker, now)
        self._tell_late(now)
        return bool(tried)

    def next_deadline(self) -> float | None:
        """Return the time of the earliest deadline."""
        times = (self._deadlines.next(), self.chooser.next_deadline(), self._next_notice())
        return min((time for time in times if time is not None), default=None)

    def give_up(self, why: str, clients: Collection[ClientSession] | None = None) -> None:
        """Fail what these clients (None: all) still wait for, because the broker stops, or serves them no longer."""
        for record in list(self.records.values()):
            if record.client is not None and (clients is None or record.client in clients):
                self._end(record, error(record, ErrorCode.DRAINING, why, retryable=True))

    # What management asks.

    def waiting(self, model: str) -> int:
        """Return how many requests wait for a model."""
        return len(self._rooms.get(model, ()))

    def rooms(self, now: float) -> list[dict[str, Any]]:
        """Return what waits, a map for each model that something waits for."""
        return [{"model": model, **room.summary(now)} for model, room in sorted(self._rooms.items()) if room]

    # What operators order.

    def set_speed(self, worker: WorkerSession, speed: float | None, now: float) -> None:
        """Reckon with this speed, whatever the worker says or does; None for what it says or does again."""
        if speed is None:
            self._registry.speeds.pop(worker.name, None)
        else:
            self._registry.speeds[worker.name] = speed
        worker.speed_set = speed
        self._registry.changed(worker, now)
        self._outbox.log("speed_changed", worker=worker.name, speed=worker.speed, set=speed is not None)

    def hold(self, worker: WorkerSession, held: bool, now: float) -> None:
        """Give a worker, and whoever comes back under its name, no new requests; or do so again."""
        if held:
            self._registry.held.add(worker.name)
        else:
            self._registry.held.discard(worker.name)
        worker.held = held
        self._registry.changed(worker, now)
        self._outbox.log("worker_held" if held else "worker_released", worker=worker.name)
        self.workers_changed([info.name for info in worker.ready.models], now)

    def tally(self) -> dict[str, int]:
        """Return how many requests wait, run, and run without anybody waiting for them."""
        waiting = sum(map(len, self._rooms.values()))
        running = len(self.records) - waiting - self._orphaned
        return {"waiting": waiting, "running": running, "orphaned": self._orphaned}

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
        queued: Counter[ClientAccount] = Counter()
        for record in waiting.values():
            assert record.client is not None
            queued[record.client.account] += record.size_bytes
        accounts = {record.client.account for record in self.records.values() if record.client is not None}
        assert all(account.queued_bytes == queued[account] for account in accounts), "who has how much queued"
        assert {**waiting, **running} == self.records, "a request is lost or left over"
        assert self._orphaned == sum(record.client is None for record in self.records.values()), "who is orphaned"
        assert self._running == Counter(record.share for record in running.values()), "what runs, by share"
        for model, room in self._rooms.items():
            room.validate()
            assert all(record.model == model for record in room)
            assert not room.resumed() or self._registry.may_resume(model), "nobody can resume it"
        self.chooser.validate()
        for record in waiting.values():
            assert not self.chooser.candidates(record), "idle slot"
            assert not record.hedge, "a hedge waits"
            assert record.worker is None
            assert record.client is not None
            assert record.message is not None
        for worker in self._registry:
            active = [record for record in worker.in_flight.values() if not record.parked]
            assert worker.parked == len(worker.in_flight) - len(active)
            assert worker.outstanding_tokens == sum(record.cost_tokens for record in active)
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
            return error(record, ErrorCode.BAD_REQUEST, "this request id is in use", retryable=False)
        path = record.message.envelope.path if record.message else ()
        if path and (loop := loop_in(path, self._id)) is not None:
            return error(record, ErrorCode.ROUTING_LOOP, loop, retryable=False)
        if self.draining:
            return error(record, ErrorCode.DRAINING, "the broker is shutting down", retryable=True)
        if not self._registry.serves(model):
            return self.refusals.unserved(record)
        if record.prior_tokens and not self._registry.may_resume(model):
            return self.refusals.cannot_resume(record, self._outbox.now)
        if record.deadline_at is not None and record.deadline_at <= record.arrived_at:
            return error(record, ErrorCode.DEADLINE, "the deadline had passed on arrival", retryable=False)
        return None

    def _busy(self, record: RequestRecord) -> Error:
        room = self._rooms[record.model]
        message = f"{len(room)} requests wait for {record.model!r} already"
        busy = error(record, ErrorCode.BUSY, message, retryable=True)
        return replace(busy, retry_after_s=room.turn_away(record.share, self._outbox.now))

    def _fail_unservable(self, model: str, room: WaitingRoom) -> None:
        if not self._registry.serves(model):
            for record in list(room):
                message = f"the last worker for {model!r} has left"
                self._end_waiting(record, error(record, ErrorCode.NO_WORKER, message, retryable=True))
            del self._rooms[model]
        elif (resumed := room.resumed()) and not self._registry.may_resume(model):
            for record in resumed:
                self._end_waiting(record, self.refusals.cannot_resume(record, self._outbox.now))

    def _supersede(self, former: RequestRecord) -> None:
        """End a submission without a word, since its client has made another one."""
        self._counters.superseded += 1
        client = former.client
        assert client is not None
        client.drop(former)
        if former.worker is None:
            self._forget_waiting(former)
        else:
            self._orphan(former)

    def _room(self, model: str) -> WaitingRoom:
        room = self._rooms.get(model)
        if room is None:
            room = self._rooms[model] = WaitingRoom(
                self._max_waiting,
                lambda share: self._weights.get(share, 1.0),
                lambda share: self._running.get(share, 0),
            )
        return room

    def _release(self, worker: WorkerSession, record: RequestRecord) -> None:
        worker.release(record)
        self._orphaned -= record.client is None
        left = self._running[record.share] - 1
        if left:
            self._running[record.share] = left
        else:
            del self._running[record.share]

    def _slot_freed(self, worker: WorkerSession, now: float) -> None:
        self._registry.changed(worker, now)
        # One that was suspended just now may have been the last but those that were suspended before.
        models = worker.ready.models
        for info in models:
            if self._rooms.get(info.name) and (worker.free or worker.breaker.state is State.OPEN):
                self.dispatch((each.name for each in models), now)
                break

    def _watch(self, record: RequestRecord) -> None:
        """See to it that the request ends when it is due, now that it waits or runs."""
        if record.due_at is None:
            self._deadlines.drop(record.key)
        else:
            self._deadlines.set(record.key, record.due_at)

    def _assign(
        self, record: RequestRecord, free: Free | Spare, now: float, frames: Sequence[bytes] | None = None
    ) -> None:
        worker = self.chooser.choose(record, free)
        client, message, record.message = record.client, record.message, None
        assert client is not None
        assert message is not None
        record.worker, record.holder, record.dispatched_at = worker, worker.name, now
        record.granted = message.envelope.credit
        if record.queue_until is not None:
            self._watch(record)
        worker.charge(record)
        self._running[record.share] = self._running.get(record.share, 0) + 1
        self._registry.pool.changed(worker)
        # Clients of a broker above are never `direct`, and READY of a broker below offers nothing.
        key = self._key(client, worker) if client.direct and worker.ready.direct else None
        first = None if frames is None or key or worker.is_broker else with_route(frames[0], record.route)
        if first is not None and frames is not None:
            self._outbox.to_worker(worker, message, [first, *frames[1:]])
        else:
            envelope = self._envelope(record, message.envelope, worker, key, now)
            self._outbox.to_worker(worker, Request(record.id, envelope, message.payload, message.attachments))
        self._tell_started(record, worker, key, now)
        if self._outbox.log_level <= logging.DEBUG:
            self._outbox.log(
                "request_dispatched", record.id, level=logging.DEBUG, model=record.model, worker=worker.name,
                attempt=record.attempt, prior_tokens=record.prior_tokens, waited_s=now - record.arrived_at,
            )  # fmt: skip

    def _envelope(
        self, record: RequestRecord, of: Envelope, worker: WorkerSession, key: bytes | None, now: float
    ) -> Envelope:
        """Return what the worker is to know of the request."""
        avoid: tuple[str, ...] = ()
        queue_s, path = None, of.path
        if worker.is_broker:
            avoid = avoid_below(worker.name, record.avoid)
            queue_s = None if record.queue_until is None else max(0.0, record.queue_until - now)
            path = (*path, self._id)
        left = None if record.deadline_at is None else max(0.0, record.deadline_at - now)
        # By position: dataclasses.replace takes six times as long.
        return Envelope(
            of.model, of.attempt, of.credit, left, record.route, of.prior_tokens, avoid, queue_s, of.expected_tokens,
            of.priority, of.affinity, of.hedge, of.explain, path, key,
        )  # fmt: skip

    def _tell_started(self, record: RequestRecord, worker: WorkerSession, key: bytes | None, now: float) -> None:
        """Tell the client who has its request: at once where it is to fetch the chunks there, else a little later.

        Most of what one-token requests cost is messages; one that has ended by then needs no STARTED any more.
        """
        # Who runs it behind a broker below is told as it is learnt, and that is to come after this.
        if key is not None or worker.is_broker or not self._notice_s:
            self._started(record, worker, key)
        else:
            self._notices.append((now + self._notice_s, record, worker))

    def _started(self, record: RequestRecord, worker: WorkerSession, key: bytes | None) -> None:
        assert record.client is not None
        direct = server_key = ""
        if key:
            direct = worker.ready.direct
            # A worker that has a key here has it at its own endpoint, too.
            server_key = worker.identity.key if worker.identity else ""
        started = Started(record.id, record.attempt, worker.name, direct, key, server_key)
        self._outbox.to_client(record.client, started)

    def _tell_late(self, now: float) -> None:
        """Say STARTED for what has run for a while."""
        while (due := self._next_notice()) is not None and due <= now:
            _, record, worker = self._notices.popleft()
            self._started(record, worker, None)

    def _next_notice(self) -> float | None:
        """Return when somebody is to hear STARTED; what has ended is passed over."""
        notices = self._notices
        while notices:
            due, record, worker = notices[0]
            # A record that was answered, or that nobody waits for, is in no client's list.
            alive = record.client is not None and record.client.requests.get(record.key) is record
            if alive and record.worker is worker:
                return due
            notices.popleft()
        return None

    def _key(self, client: ClientSession, worker: WorkerSession) -> bytes | None:
        """Return what the client shows the worker to take its chunks there; None where they go through the broker."""
        if worker.is_broker:
            return None
        return blake2b(client.route + worker.peer, key=self._secret, digest_size=ID_BYTES).digest()

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
        self._orphaned += 1
        self._deadlines.drop(record.key)
        self._cancel_at_worker(record)

    def _forget(self, record: RequestRecord) -> None:
        del self.records[record.key]
        self._deadlines.drop(record.key)

    def _forget_waiting(self, record: RequestRecord) -> None:
        self._rooms[record.model].remove(record)
        _queued(record, -record.size_bytes)
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

    def _answer(self, record: RequestRecord, answer: Finish | Error, frames: Sequence[bytes] | None = None) -> None:
        """Send the client its one answer."""
        client = record.client
        assert client is not None
        client.drop(record)
        self._outbox.to_client(client, answer, frames)
        worker = record.worker.name if record.worker else ""
        if isinstance(answer, Finish):
            self._counters.finished += 1
            if self._outbox.log_level > logging.INFO:
                return
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


def _queued(record: RequestRecord, size_bytes: int) -> None:
    """Count what waits to the account of its client."""
    assert record.client is not None
    record.client.account.queued_bytes += size_bytes


def _timings(record: RequestRecord, timings: Timings) -> Timings:
    """Return the timings of a request with what this broker has to add; a broker behind it has added its own part."""
    waited_s = record.dispatched_at - record.arrived_at
    routing = timings.routing if record.decision is None else (record.decision, *timings.routing)
    # Workers say what they like, and the sum must still be a message: the client's session would end over it.
    queue_s = min(MAX_SECONDS, timings.broker_queue_s + waited_s)
    return replace(timings, broker_queue_s=queue_s, routing=routing[:MAX_HOPS])
