"""The I/O thread: it owns a DEALER and its monitor for each broker, feeds the core, and does what the core says.

The same for each worker whose chunks come past the broker, if there are any.

Applications talk to it through `submit`, `ask` and `post`, from any thread and without a lock, so that even a
finalizer may call them. It answers through mailboxes and futures, and rings each bell once for everything that one
turn of the loop brought.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import zmq

from ..protocol.codec import CHUNKS_PREFIX, HEADER_BYTES, decode, encode
from ..protocol.errors import ClientClosedError, ProtocolError, TokenmqError
from ..protocol.log import Log, write
from ..protocol.messages import Message
from ..protocol.refusal import Refusal
from ..transport.endpoints import EndpointError
from ..transport.keys import Curve
from ..transport.link import Link
from ..transport.monitor import REFUSALS, ConnectionEvent
from ..transport.pump import Pump
from ..transport.rounds import Rounds
from .core import ClientCore
from .events import (
    Action,
    Answered,
    Ask,
    Attempted,
    CancelStream,
    Close,
    CloseSocket,
    Connected,
    Deliver,
    Dial,
    Ended,
    Event,
    Garbled,
    HangUp,
    Heard,
    Lost,
    Malformed,
    Open,
    Parted,
    Reached,
    Received,
    Refused,
    Send,
    Submit,
    Tell,
)
from .mailbox import Bell, Mailbox
from .settings import Settings

_logger = logging.getLogger("tokenmq.client")

#: Messages taken from the socket in one turn: enough to share one wake-up of the application among many streams,
#: few enough that commands and heartbeats wait for milliseconds at most.
_BATCH_MESSAGES = 256
#: How long `close` waits for the thread: the linger of the socket (0.2 s) with a margin for a loaded machine. The
#: thread is a daemon, so a longer wait would gain nothing.
CLOSE_TIMEOUT_S = 2.0

_Answer: TypeAlias = "Future[Any]"
#: Where the outcome of a command goes.
_Receiver: TypeAlias = "Mailbox | _Answer | None"


@dataclass(frozen=True, slots=True)
class _Side:
    """The links of one kind, to brokers or to workers, and how the core is told what happens at them."""

    connected: Callable[[str], Event]
    refused: Callable[[str, Refusal], Event]
    lost: Callable[[str, str], Event]
    received: Callable[[str, Message], Event]
    malformed: Callable[[str, ProtocolError], Event]
    garbled: Callable[[str, ProtocolError], Event]
    links: dict[str, Link] = field(default_factory=dict)


def _nonsense(endpoint: str, error: ProtocolError) -> Parted:
    return Parted(endpoint, f"the worker sent what is no message: {error.message}")


def _shut_out(endpoint: str, refusal: Refusal) -> Parted:
    return Parted(endpoint, f"the handshake failed: {refusal.value}")


def _is_chunks(frames: list[bytes]) -> bool:
    """Tell whether a message has at least the header of CHUNKS."""
    return frames[0].startswith(CHUNKS_PREFIX) and len(frames[0]) >= HEADER_BYTES


class Connection:
    """One client's links to its brokers, and the thread that runs them."""

    def __init__(self, settings: Settings) -> None:
        """Start the thread; it begins to connect at once."""
        #: Resolves when the thread has given everything back.
        self.stopped: Future[None] = Future()
        self.stopped.set_running_or_notify_cancel()  # from now on nobody can cancel it
        self._pid = os.getpid()
        self._core = ClientCore(settings)
        # Here and not in the thread: where there are no file descriptors left, the caller must hear of it.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pump = Pump()
        self._rounds = Rounds(self._pump)
        self._commands: deque[tuple[Event, _Receiver]] = deque()
        self._finished = threading.Event()
        self._failure = "the client is closed"
        self._brokers = _Side(Connected, Refused, Lost, Received, Malformed, Garbled)
        self._workers = _Side(Reached, _shut_out, Parted, Heard, _nonsense, _nonsense)
        self._curves = dict(zip(settings.endpoints, settings.curves, strict=False))  # none, or one for each
        self._pair = settings.curves[0].pair if settings.curves else None
        self._mailboxes: dict[bytes, Mailbox] = {}
        self._answers: dict[bytes, _Answer] = {}
        #: Mailboxes that got something in this turn, in the order of arrival.
        self._touched: dict[Mailbox, None] = {}
        self._performers: dict[type[Any], Callable[[Any], None]] = {
            Open: self._open,
            CloseSocket: self._close_socket,
            Send: self._send,
            Dial: self._dial,
            HangUp: self._hang_up,
            Tell: self._tell_worker,
            Deliver: self._deliver,
            Attempted: self._attempted,
            Ended: self._ended,
            Answered: self._answered,
            Log: lambda log: write(_logger, log),
        }
        self._thread = threading.Thread(target=self._run, name=f"tokenmq-client-{settings.name}", daemon=True)
        self._thread.start()

    # Called by applications, from any thread

    def submit(self, request: Submit, mailbox: Mailbox) -> None:
        """Send a request; what comes for it goes into the mailbox.

        Raises:
            ClientClosedError: the client is closed.
        """
        self._command(request, mailbox)

    def ask(self, question: Ask) -> Future[Any]:
        """Send a query; the future gets its answer.

        Raises:
            ClientClosedError: the client is closed.
        """
        answer: Future[Any] = Future()
        self._command(question, answer)
        return answer

    def post(self, event: Event) -> None:
        """Tell the core something; no answer. Takes no lock: finalizers call it."""
        if not self._finished.is_set():
            self._commands.append((event, None))
            self._pump.waker.wake()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close and wait for the thread, but not longer than the timeout."""
        self.post(Close())
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _command(self, event: Event, receiver: _Receiver) -> None:
        if self._finished.is_set():
            raise ClientClosedError(self._failure)
        if os.getpid() != self._pid:
            raise ClientClosedError("the client was made before this process was forked; make one of its own")
        self._commands.append((event, receiver))
        self._pump.waker.wake()
        # The thread may have ended between the look and the post: then nobody would ever answer.
        if self._finished.is_set():
            self._refuse_commands()

    # The thread

    def _run(self) -> None:
        try:
            while not self._core.closed:
                self._turn()
        except Exception as error:
            _logger.exception("the client's I/O thread failed")
            self._failure = f"the client's I/O thread failed ({type(error).__name__}: {error}); make a new client"
        finally:
            self._stop()

    def _turn(self) -> None:
        ready = self._rounds.wait(self._core.next_deadline())
        if self._rounds.late_s:
            self._core.forgive(self._rounds.late_s)
        self._take_commands()
        for side in (self._brokers, self._workers) if ready else ():
            for endpoint, link in list(side.links.items()):
                if link.among(ready):
                    self._serve(side, endpoint, link, ready)
        self._perform(self._core.tick(self._rounds.now))
        self._ring()

    def _take_commands(self) -> None:
        # Not until it is empty: a thread that never stops posting must not keep the socket waiting.
        for _ in range(len(self._commands)):
            event, receiver = self._commands.popleft()
            if isinstance(receiver, Mailbox):
                self._mailboxes[receiver.id] = receiver
            elif receiver is not None and isinstance(event, Ask):
                self._answers[event.id] = receiver
            self._tell(event)

    def _serve(self, side: _Side, endpoint: str, link: Link, ready: Mapping[Any, int]) -> None:
        changed = link.events()
        if ConnectionEvent.CONNECTED in changed:
            self._tell(side.connected(endpoint))
        flags = ready.get(link.socket, 0)
        refusal = next((REFUSALS[change] for change in changed if change in REFUSALS), None)
        if refusal is not None:
            self._tell(side.refused(endpoint, refusal))
            return
        lost = ConnectionEvent.DISCONNECTED in changed
        if flags & zmq.POLLIN or lost:
            # What came before the connection broke is still there, and may hold the end of a stream.
            while self._receive(side, endpoint, link) == _BATCH_MESSAGES and lost:
                if side.links.get(endpoint) is not link:
                    break  # one of these has ended the session, and its socket is closed
        if side.links.get(endpoint) is not link:
            return  # the session has ended
        if lost:
            self._tell(side.lost(endpoint, "connection disconnected"))
        elif flags & zmq.POLLOUT:
            link.flush()

    def _receive(self, side: _Side, endpoint: str, link: Link) -> int:
        messages = link.receive(_BATCH_MESSAGES)
        for frames in messages:
            if side.links.get(endpoint) is not link:
                break  # an earlier message has ended the session
            try:
                event = side.received(endpoint, decode(frames))
            except ProtocolError as error:
                event = (side.garbled if _is_chunks(frames) else side.malformed)(endpoint, error)
            self._tell(event)
        return len(messages)

    def _tell(self, event: Event) -> None:
        self._perform(self._core.handle(event, self._rounds.now))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            self._performers[type(action)](action)

    def _ring(self) -> None:
        if not self._touched:
            return
        by_bell: dict[Bell, list[Mailbox]] = {}
        for mailbox in self._touched:
            by_bell.setdefault(mailbox.bell, []).append(mailbox)
        self._touched.clear()
        for bell, mailboxes in by_bell.items():
            if not bell.ring(mailboxes):
                # Its event loop is closed: nobody will ever read these.
                for mailbox in mailboxes:
                    self._commands.append((CancelStream(mailbox.id), None))
        if self._commands:
            self._pump.waker.wake()

    # Actions

    def _open(self, action: Open) -> None:
        try:
            curve = self._curves.get(action.endpoint)
            self._brokers.links[action.endpoint] = Link(self._context, action.endpoint, self._pump, curve=curve)
        except (EndpointError, zmq.ZMQError) as error:  # out of file descriptors is what may pass, too
            self._tell(Lost(action.endpoint, str(error)))

    def _close_socket(self, action: CloseSocket) -> None:
        link = self._brokers.links.pop(action.endpoint, None)
        if link is not None:
            link.close()

    def _send(self, action: Send) -> None:
        link = self._brokers.links.get(action.endpoint)
        if link is not None and not link.send(encode(action.message)):
            self._commands.append((Lost(action.endpoint, "the broker has stopped reading"), None))
            self._pump.waker.wake()

    def _dial(self, action: Dial) -> None:
        try:
            curve = Curve(self._pair, action.server_key) if self._pair and action.server_key else None
            link = Link(self._context, action.endpoint, self._pump, heartbeats=True, curve=curve)
        except (EndpointError, zmq.ZMQError) as error:
            self._tell(Parted(action.endpoint, str(error)))
        else:
            self._workers.links[action.endpoint] = link

    def _hang_up(self, action: HangUp) -> None:
        link = self._workers.links.pop(action.endpoint, None)
        if link is not None:
            link.close()

    def _tell_worker(self, action: Tell) -> None:
        link = self._workers.links.get(action.endpoint)
        if link is not None and not link.send(encode(action.message)):
            self._commands.append((Parted(action.endpoint, "the worker has stopped reading"), None))
            self._pump.waker.wake()

    def _deliver(self, action: Deliver) -> None:
        mailbox = self._mailboxes[action.id]
        mailbox.put(action.chunk)
        self._touched[mailbox] = None

    def _attempted(self, action: Attempted) -> None:
        self._mailboxes[action.id].attempts = action.attempts

    def _ended(self, action: Ended) -> None:
        mailbox = self._mailboxes.pop(action.id)
        mailbox.attempts = action.attempts
        mailbox.end(action.outcome)
        self._touched[mailbox] = None

    def _answered(self, action: Answered) -> None:
        _resolve(self._answers.pop(action.id), action.result, action.error)

    # The end

    def _stop(self) -> None:
        self._finished.set()
        self._refuse_commands()
        for mailbox in self._mailboxes.values():
            mailbox.end(ClientClosedError(self._failure, request_id=mailbox.id.hex()))
            self._touched[mailbox] = None
        for answer in self._answers.values():
            _resolve(answer, None, ClientClosedError(self._failure))
        self._ring()
        try:
            for link in (*self._brokers.links.values(), *self._workers.links.values()):
                link.close()
            self._pump.close()
            # Bounded by the sockets' linger.
            self._context.term()
        finally:
            self.stopped.set_result(None)

    def _refuse_commands(self) -> None:
        while self._commands:
            try:
                _, receiver = self._commands.popleft()
            except IndexError:
                return  # another thread was here, too
            if isinstance(receiver, Mailbox):
                receiver.end(ClientClosedError(self._failure, request_id=receiver.id.hex()))
                receiver.bell.ring([receiver])
            elif receiver is not None:
                _resolve(receiver, None, ClientClosedError(self._failure))


def _resolve(answer: _Answer, result: Any, error: TokenmqError | None) -> None:
    # The asker may have cancelled it (an asyncio task that was cancelled does), at any moment until here.
    if not answer.set_running_or_notify_cancel():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)
