"""The requests' side of WorkerCore: who is taken, what leaves as credit allows, how each one ends.

The rules: a request held is answered with exactly one FINISH or ERROR, unless its session ends. FINISH waits until
all tokens have left; ERROR, and FINISH after a CANCEL, drop what is unsent. What one engine step brought for the
streams of one client leaves as one CHUNKS message: through the broker, or by the client's own connection, if it has
one when the first chunk leaves. A stream that has only its reader to wait for is PARKED: its slot
is free. A reader that grants nothing for too long is given up.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count

from ..protocol.errors import BadRequestError, ErrorCode
from ..protocol.messages import (
    Cancel,
    Chunk,
    Chunks,
    Credit,
    Error,
    Finish,
    FinishReason,
    Message,
    ModelInfo,
    Parked,
    Request,
)
from ..protocol.orders import Orders
from ..protocol.payload import Generation, unpack_generation
from .answers import error, finish
from .direct import Attachments
from .engines.base import Done, Failed, Job, Output, Tokens
from .events import Action, CancelJob, Hand, Submit
from .prompt_line import begin_of_prompt
from .settings import MOST_PARKED, MOST_PARKED_TOKENS, WorkerSettings
from .streams import Stream, Streams, Way, batches


class Desk:
    """Takes requests, and answers them.

    Attributes:
        streams: those that are held.
        attachments: whose chunks go past the broker.
    """

    def __init__(
        self, settings: WorkerSettings, orders: Orders[Action], send: Callable[[str, Message], None]
    ) -> None:
        """Hold nothing yet.

        Args:
            settings: those of the worker.
            orders: takes what is to be done.
            send: orders a message to a broker.
        """
        self.streams = Streams()
        self.attachments = Attachments()
        self._settings = settings
        self._orders = orders
        self._send = send
        self._tickets = count(1)

    def change(self, settings: WorkerSettings) -> None:
        """Go by other settings; what is held stays, even where it is more than may be held now."""
        self._settings = settings

    # --- from brokers -----------------------------------------------------------------------------------------------

    def request(
        self,
        broker: str,
        message: Request,
        models: Sequence[ModelInfo],
        closed: tuple[ErrorCode, str] | None,
        now: float,
    ) -> None:
        """Take a request, or answer it with ERROR.

        Args:
            broker: who sent it.
            message: the request.
            models: what the worker serves.
            closed: why the worker takes nothing at the moment; None when it does.
            now: the time.
        """
        attempt = message.envelope.attempt
        if self.streams.by_key(broker, message.id, attempt) is not None:
            self._orders.log("request_repeated", message.id, logging.WARNING, broker=broker, attempt=attempt)
            return
        refusal = self._refusal(message, models, closed)
        if refusal is None:
            try:
                self._admit(broker, message, _generation(message), now)
                return
            except BadRequestError as bad:
                refusal = error(message, ErrorCode.BAD_REQUEST, bad.message)
        self._send(broker, refusal)
        self._orders.log("request_refused", message.id, broker=broker, attempt=attempt, code=refusal.code)

    def _refusal(
        self, message: Request, models: Sequence[ModelInfo], closed: tuple[ErrorCode, str] | None
    ) -> Error | None:
        if message.envelope.route is None:
            return error(message, ErrorCode.BAD_REQUEST, "the request has no return route")
        if closed is not None:
            return error(message, *closed, retryable=True)
        wanted = message.envelope.model
        model = next((model for model in models if model.name == wanted), None)
        if model is None:
            names = ", ".join(model.name for model in models) or "none"
            text = f"this worker does not serve {wanted!r}; models here: {names}"
            # The broker did not know yet: it has the READY that says so before this answer, and chooses better then.
            return error(message, ErrorCode.MODEL_NOT_FOUND, text, retryable=True)
        if message.envelope.prior_tokens and not model.resumes:
            text = f"{wanted!r} cannot go on with another worker's {message.envelope.prior_tokens} tokens here"
            return error(message, ErrorCode.CANNOT_RESUME, text)
        if len(self.streams) - self.streams.parked >= self._settings.most_held:
            text = f"the worker holds {len(self.streams)} requests already"
            return error(message, ErrorCode.BUSY, text, retryable=True)
        return None

    def _admit(self, broker: str, message: Request, generation: Generation, now: float) -> None:
        envelope = message.envelope
        route = envelope.route or b""  # never empty here: `_refusal` has looked
        stream = Stream(
            next(self._tickets),
            broker,
            message.id,
            envelope.attempt,
            (broker, route, None),
            envelope.credit,
            envelope.prior_tokens,
            now,
            envelope.key if self._settings.direct else None,
        )
        self.streams.add(stream)
        if stream.key is not None:
            self.attachments.hold(stream.key, broker)
        job = Job(stream.ticket, envelope.model, generation, message.attachments, envelope.priority)
        self._orders.add(Submit(job))
        self._orders.log(
            "request_accepted",
            message.id,
            logging.DEBUG,
            broker=broker,
            model=envelope.model,
            attempt=envelope.attempt,
            max_tokens=generation.sampling.max_tokens,
            prior_tokens=envelope.prior_tokens,
        )
        if self._settings.log_prompts:
            self._orders.log("prompt", message.id, attempt=envelope.attempt, prompt=begin_of_prompt(generation))

    def credit(self, broker: str, message: Credit, now: float) -> None:
        """Raise a stream's credit and send what it covers; unknown streams have just ended."""
        stream = self.streams.by_key(broker, message.id, message.attempt)
        if stream is not None:
            stream.grant(message.limit)
            self._deliver([stream], now)

    def cancel(self, broker: str, message: Cancel, now: float) -> None:
        """Stop a stream; a second time, or for one that has ended, nothing happens."""
        stream = self.streams.by_key(broker, message.id, message.attempt)
        if stream is None or stream.cancelled:
            return
        self.streams.cancel(stream)
        if stream.end is None:
            # The engine's Done brings FINISH, and not we at once: only then is the place free.
            self._orders.add(CancelJob(stream.ticket))
        else:
            self._settle(stream, now)

    def leave(self, broker: str) -> int:
        """Forget all that this broker has here, since its session ended; return how many that were."""
        streams = self.streams.of_broker(broker)
        for stream in streams:
            self._remove(stream)
            self._drop_job(stream)
        self.attachments.end(broker)
        return len(streams)

    # --- from clients, at the worker's own door ---------------------------------------------------------------------

    def credit_from(self, peer: bytes, message: Credit, now: float) -> None:
        """Raise the credit of a stream whose chunks leave by this connection; others have just ended."""
        for broker in self._settings.brokers:
            stream = self.streams.by_key(broker, message.id, message.attempt)
            if stream is not None and stream.peer == peer:
                stream.grant(message.limit)
                self._deliver([stream], now)
                return

    def let_go(self, peer: bytes, why: str, now: float) -> int:
        """Give back what leaves by this connection, which takes nothing any more; return how many streams that were.

        Their clients do not have all that was sent by it, and resume.
        """
        self.attachments.leave(peer)
        lost = [stream for stream in self.streams if stream.peer == peer]
        for stream in lost:
            self._drop_job(stream)
            self._answer(stream, error(stream, ErrorCode.WORKER_LOST, why, retryable=True), now)
        return len(lost)

    # --- from the engine --------------------------------------------------------------------------------------------

    def outputs(self, outputs: Iterable[Output], now: float) -> None:
        """Take what a step brought and send what credit covers."""
        touched: dict[int, Stream] = {}
        for output in outputs:
            ticket = output.ticket
            stream = touched.get(ticket) or self.streams.by_ticket(ticket)
            if stream is None:
                continue  # its session has ended
            touched[ticket] = stream
            if isinstance(output, Tokens):
                stream.push(output)
            else:
                self.streams.end(stream, output)
        self._deliver(list(touched.values()), now)

    def fail(self, tickets: frozenset[int], message: str, now: float) -> int:
        """End the streams whose jobs the engine has lost; return how many that were."""
        lost = [stream for stream in self.streams if stream.ticket in tickets and stream.end is None]
        for stream in lost:
            failed = Failed(stream.ticket, ErrorCode.ENGINE_FAILED.value, message, retryable=True)
            self.streams.end(stream, failed)
        self._deliver(lost, now)
        return len(lost)

    # --- what leaves ------------------------------------------------------------------------------------------------

    def _deliver(self, streams: Sequence[Stream], now: float) -> None:
        """Send what these streams may send, one message a client, and then their ends."""
        pending = streams
        while pending:
            clients: dict[Way, list[Chunk]] = {}
            for stream in pending:
                first = not stream.chunks
                chunks = self.streams.take(stream)
                if chunks:
                    if first and stream.key is not None:
                        self._choose_way(stream, stream.key)
                    clients.setdefault(stream.way, []).extend(chunks)
            for (broker, subject, peer), found in clients.items():
                for batch in batches(found):
                    if peer is None:
                        self._send(broker, Chunks(subject, batch))
                    else:
                        self._orders.add(Hand(peer, Chunks(subject, batch)))
            pending = [stream for stream in pending if stream.ready]  # more than the largest chunk: another round
        for stream in streams:
            if stream.kept:
                self.streams.wait(stream, now)
            if stream.end is not None:
                self._settle(stream, now)

    def _choose_way(self, stream: Stream, key: bytes) -> None:
        peer = self.attachments.peer(key)
        if peer is not None:
            stream.way = ("", key, peer)

    def _settle(self, stream: Stream, now: float) -> None:
        """Answer a stream that has ended in the engine, unless tokens wait for credit."""
        end = stream.end
        if isinstance(end, Failed) and not stream.cancelled:
            self._answer(stream, error(stream, end.code, end.message, retryable=end.retryable), now)
        elif not stream.kept:
            done = end if isinstance(end, Done) else None
            reason = FinishReason.CANCELLED if stream.cancelled or done is None else done.reason
            self._answer(stream, finish(stream, reason, done, self._settings.name), now)
        elif not stream.parked and self._may_park(stream):
            self.streams.park(stream)
            self._send(stream.broker, Parked(stream.request_id, stream.attempt))

    def _may_park(self, stream: Stream) -> bool:
        streams = self.streams
        return streams.parked < MOST_PARKED and streams.parked_tokens + stream.kept <= MOST_PARKED_TOKENS

    # --- time -------------------------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return the next time at which `tick` has something to do; infinity for none."""
        since = self.streams.waiting_since()
        return math.inf if since is None else since + self._settings.reader_timeout_s

    def tick(self, now: float) -> None:
        """Give up the readers that have granted nothing for too long."""
        while self.next_deadline() <= now:
            stream = self.streams.waiting_longest()
            self._drop_job(stream)
            timeout_s = self._settings.reader_timeout_s
            text = f"{stream.kept} tokens have waited {timeout_s:g} s for the reader to grant credit"
            self._answer(stream, error(stream, ErrorCode.READER_TIMEOUT, text), now)

    # --- ends -------------------------------------------------------------------------------------------------------

    def give_back(self, code: ErrorCode, message: str, now: float) -> None:
        """End all streams, whatever the engine does with them; another worker may take them."""
        for stream in self.streams:
            self._drop_job(stream)
            if stream.cancelled:
                answer: Error | Finish = finish(stream, FinishReason.CANCELLED, None, self._settings.name)
            else:
                answer = error(stream, code, message, retryable=True)
            self._answer(stream, answer, now)

    def _drop_job(self, stream: Stream) -> None:
        """Have the engine end what nobody waits for any more; its place is free before the next job comes to it."""
        if stream.end is None:
            self._orders.add(CancelJob(stream.ticket))

    def _remove(self, stream: Stream) -> None:
        self.streams.remove(stream)
        if stream.key is not None:
            self.attachments.release(stream.key)

    def _answer(self, stream: Stream, answer: Error | Finish, now: float) -> None:
        self._remove(stream)
        self._send(stream.broker, answer)
        outcome = answer.code if isinstance(answer, Error) else answer.reason.value
        seconds = now - stream.accepted_at
        self._orders.log(
            "request_finished", stream.request_id, attempt=stream.attempt, outcome=outcome,
            prior_tokens=stream.prior, tokens=stream.tokens, seconds=seconds,
        )  # fmt: skip


def _generation(message: Request) -> Generation:
    """Return what a request asks for; raises BadRequestError where payload or envelope are wrong."""
    generation = unpack_generation(message.payload)
    told = message.envelope.prior_tokens
    found = 0 if generation.prior is None else len(generation.prior.token_ids)
    if told != found:
        raise BadRequestError(f"request.prior: {found} tokens, but prior_tokens in the envelope is {told}")
    expected, left = message.envelope.expected_tokens, generation.sampling.max_tokens - found
    if expected not in (0, left):  # brokers share their workers out by it: who tells less would get more than others
        text = f"{left} tokens are left to generate, but expected_tokens in the envelope is {expected}"
        raise BadRequestError(f"request.sampling.max_tokens: {text}")
    return generation
