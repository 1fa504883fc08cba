"""What clients say to the broker, and when their sessions begin and end.

What becomes of their requests is in `exchange.py`, of their queries in `management.py`. Workers are none of its
business.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ..protocol.errors import ErrorCode
from ..protocol.identity import Allowed, Identity, Role
from ..protocol.liveness import Liveness, negotiate
from ..protocol.messages import (
    Cancel,
    Credit,
    DisconnectCode,
    Draining,
    Error,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Query,
    Request,
    Welcome,
)
from .accounts import Accounts, ClientAccount
from .disconnects import REVOKED, Disconnects, foreign, lost, outside, silent, unknown
from .events import BadClient, ClientGone, FromClient
from .exchange import Exchange
from .management import Management
from .meters import Refusal, Refusals
from .metrics import Counters
from .outbox import Outbox, clip
from .probe import CLIENT_DELAYS_S, Probe
from .registry import ClientSession
from .rota import Rota
from .settings import BrokerSettings

#: Whose keys open a session at a frontend.
ROLES = (Role.CLIENT, Role.ADMIN)


class Clients:
    """The sessions with all clients of the frontend.

    Attributes:
        by_peer: the sessions by the client's routing id.
        probe: when to look for the one whose connection broke.
    """

    def __init__(
        self,
        software: str,
        settings: BrokerSettings,
        exchange: Exchange,
        management: Management,
        disconnects: Disconnects,
        outbox: Outbox,
        counters: Counters,
    ) -> None:
        """Have no session yet.

        Args:
            software: the broker's name and version.
            settings: what it is called, its intervals.
            exchange: takes their requests.
            management: takes their queries.
            disconnects: sends them away.
            outbox: takes what is to be done.
            counters: what has happened so far.
        """
        self.by_peer: dict[bytes, ClientSession] = {}
        self._accounts = Accounts(ClientAccount, settings.limits)
        self._rota = Rota(self.by_peer)
        self.probe = Probe(CLIENT_DELAYS_S)
        self._software = software
        self._settings = settings
        self._exchange = exchange
        self._management = management
        self._disconnects = disconnects
        self._outbox = outbox
        self._counters = counters
        self._routes = 0

    # What happens at the frontend.

    def received(self, event: FromClient, now: float) -> None:
        """Take a message."""
        message = event.message
        client = self.by_peer.get(event.peer)
        if client is None:
            self._from_new(event.peer, message, event.identity, now)
            return
        client.received += 1
        client.liveness.heard(now)
        if isinstance(message, Request):
            self._request(client, message, event.frames, now)
        elif isinstance(message, Query):
            refusal = client.account.query(now)
            if refusal is None:
                self._management.ask(self._management.client(client), message, now)
            else:
                self._over(client, message.id, 0, refusal, 0, now)
        elif not client.account.control(now):
            self._cut(client, f"more than {self._settings.limits.messages_per_s} messages a second", now)
        elif isinstance(message, Credit):
            self._exchange.credit(client, message)
        elif isinstance(message, Cancel):
            self._exchange.cancel(client, message)
        elif isinstance(message, Heartbeat):
            if message.sent != client.received - 1:
                self._disconnect(client, DisconnectCode.LOST_MESSAGES, lost(message, client))
        elif isinstance(message, Goodbye):
            self._drop(client, "goodbye", level=logging.DEBUG)
        else:
            why = f"{message.command.name} is not allowed from a client in a session"
            self._disconnect(client, DisconnectCode.PROTOCOL, why)

    def malformed(self, event: BadClient, now: float) -> None:
        """Take what is no message: one request's mistake, where it can be named, is no reason to end the session."""
        error = event.error
        self._disconnects.malformed("client", error, now)
        client = self.by_peer.get(event.peer)
        if client is None:
            self._disconnects.client(event.peer, DisconnectCode.PROTOCOL, error.message)
        elif error.subject is not None:
            client.received += 1
            client.liveness.heard(now)
            answer = Error(error.subject, 0, ErrorCode.BAD_REQUEST.value, clip(error.message))
            self._refuse(client, answer, event.size_bytes, now)
        elif self._accounts.garbage(client.identity, event.size_bytes, now):
            self._disconnect(client, DisconnectCode.PROTOCOL, error.message)
        else:
            self._cut(client, error.message, now)

    def gone(self, event: ClientGone, _now: float) -> None:
        """Take the news that nothing can be sent to a client."""
        client = self.by_peer.get(event.peer)
        if client is not None:
            self._counters.clients_lost += 1
            if event.stalled:
                self._counters.peers_stalled += 1
                self._disconnects.client(client.peer, DisconnectCode.EXPIRED, event.why)
            self._drop(client, event.why, level=logging.WARNING if event.stalled else logging.INFO)

    # Limits.

    def _request(self, client: ClientSession, request: Request, frames: Sequence[bytes] | None, now: float) -> None:
        """Let a request in that is within the limits."""
        size_bytes = len(request.payload)
        attachments = request.attachments
        if attachments:
            size_bytes += sum(map(len, attachments))
        limits = self._settings.limits
        if size_bytes > limits.message_bytes or len(attachments) > limits.attachments:
            why = limits.too_large(size_bytes, len(attachments))
            answer = Error(request.id, request.envelope.attempt, ErrorCode.BAD_REQUEST.value, why)
            self._refuse(client, answer, size_bytes, now)
            return
        refusal = client.account.admit(size_bytes, now)
        if refusal is None:
            self._exchange.submit(client, request, now, frames)
        else:
            self._over(client, request.id, request.envelope.attempt, refusal, size_bytes, now)

    def _over(
        self, client: ClientSession, id: bytes, attempt: int, refusal: Refusal, size_bytes: int, now: float
    ) -> None:
        """Refuse what is beyond a limit for now."""
        self._counters.rate_limited += 1
        why = f"this broker takes no more of {client.name or 'this client'} now: {refusal.why}"
        code = ErrorCode.RATE_LIMITED.value
        answer = Error(id, attempt, code, clip(why), retryable=True, retry_after_s=refusal.retry_after_s)
        self._refuse(client, answer, size_bytes, now)

    def _refuse(self, client: ClientSession, answer: Error, size_bytes: int, now: float) -> None:
        """Refuse something; who has it done again and again is cut off."""
        if client.refusals.take(now, size_bytes):
            self._outbox.to_client(client, answer)
        else:
            self._cut(client, f"it goes on after many refusals; the last: {answer.message}", now)

    def _cut(self, client: ClientSession, why: str, now: float) -> None:
        """End the session of a client that keeps on, and let its key not in for a while."""
        self._counters.cut_off += 1
        self._accounts.punish(client.identity, now)
        self._disconnect(client, DisconnectCode.RATE_LIMITED, why)

    # What the core calls.

    def watch(self, now: float, parts: int) -> None:
        """Give up who has been silent for too long, and say something to whom the broker was silent.

        Once in `parts` calls for each.
        """
        expired, due = self._rota.look(now, parts)
        for client in due:
            self._outbox.heartbeat_client(client)
        for client in expired:
            self._disconnect(client, DisconnectCode.EXPIRED, silent(client, now))

    def cut_off(self, allowed: Allowed) -> None:
        """End the sessions of those whose keys are not as they were any more."""
        self._accounts.keep(allowed)
        for client in [client for client in self.by_peer.values() if not allowed.has(client.identity)]:
            self._disconnect(client, DisconnectCode.FORBIDDEN, REVOKED)

    def greet(self) -> None:
        """Say something to every client: the one that is gone shows itself."""
        for client in self.by_peer.values():
            self._outbox.heartbeat_client(client)

    def new_route(self) -> bytes:
        """Make what workers know a client by, one of the frontend's or of a broker above."""
        self._routes += 1
        return self._routes.to_bytes(16, "big")

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        for peer, client in self.by_peer.items():
            assert client.peer == peer
            assert all(record.client is client for record in client.requests.values())
            attempts = {record.key: record for alive in client.attempts.values() for record in alive}
            assert attempts == client.requests, "attempts are filed wrong"
            assert all(record.id == id for id, alive in client.attempts.items() for record in alive)

    # How sessions begin and end.

    def _from_new(self, peer: bytes, message: Message, identity: Identity | None, now: float) -> None:
        if isinstance(message, Hello):
            if self._settings.curve and (identity is None or identity.role not in ROLES):
                self._disconnects.client(peer, DisconnectCode.FORBIDDEN, foreign(identity, "a client or an admin"))
                return
            if outside_s := self._accounts.outside_s(identity, now):
                self._disconnects.client(peer, DisconnectCode.RATE_LIMITED, outside(outside_s))
                return
            if too_many := self._accounts.begin(identity, now):
                self._disconnects.client(peer, DisconnectCode.RATE_LIMITED, too_many)
                return
            self._connect(peer, message, identity, now)
        elif not isinstance(message, Goodbye):
            self._disconnects.client(peer, DisconnectCode.UNKNOWN_PEER, unknown(message, "HELLO"))

    def _connect(self, peer: bytes, hello: Hello, identity: Identity | None, now: float) -> None:
        settings = self._settings
        heartbeat_s, expiry_s = negotiate(settings.heartbeat_s, settings.expiry_s, hello.heartbeat_s)
        client = ClientSession(
            peer=peer,
            liveness=Liveness(heartbeat_s, expiry_s, now, now),
            identity=identity,
            name=identity.name if identity else hello.client,
            route=self.new_route(),
            refusals=Refusals(settings.limits),
            account=self._accounts.of(identity),
            direct=hello.direct,
        )
        client.account.sessions += 1
        self.by_peer[peer] = client
        welcome = Welcome(settings.name, self._software, heartbeat_s, expiry_s, settings.group)
        self._outbox.to_client(client, welcome)
        if self._exchange.draining:
            self._outbox.to_client(client, Draining())
        calls_itself: dict[str, Any] = {"calls_itself": hello.client} if identity else {}
        self._outbox.log("client_connected", level=logging.DEBUG, client=client.name, **calls_itself)

    def _disconnect(self, client: ClientSession, code: DisconnectCode, why: str) -> None:
        self._disconnects.client(client.peer, code, why)
        self._counters.clients_lost += 1
        self._drop(client, f"{code.value}: {why}", level=logging.WARNING)

    def _drop(self, client: ClientSession, why: str, *, level: int = logging.INFO) -> None:
        del self.by_peer[client.peer]
        client.account.sessions -= 1
        self._outbox.log("client_left", level=level, client=client.name, why=why, requests=len(client.requests))
        self._exchange.client_lost(client)
        self._management.asker_lost(client)
