"""Counters and gauges: plain integers that management answers show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What has happened since the broker started.

    Attributes:
        requests: requests accepted for waiting or running.
        finished: FINISH messages passed to clients, whatever their reason.
        failed: ERROR messages that ended a request.
        refused: requests that were never accepted (bad, unknown model, busy, draining).
        cancelled: requests that a client cancelled, or left behind when it went.
        hedges: requests that were given to a second worker.
        superseded: submissions whose place a later attempt of the same request took.
        chunk_messages: CHUNKS messages forwarded.
        chunk_messages_dropped: CHUNKS messages for a client that the worker has no request of.
        late_answers: FINISH and ERROR messages for requests that the worker does not hold.
        malformed: messages that could not be decoded.
        rate_limited: requests and queries that were beyond a limit of their client.
        cut_off: sessions that ended because the peer went on beyond its limits.
        disconnected: sessions that the broker ended with DISCONNECT.
        workers_lost: workers that died, fell silent or were cut off.
        workers_suspended: how often a worker got no requests for a while because its engine had failed.
        clients_lost: clients that died, fell silent or were cut off.
        peers_stalled: those of both that were cut off because they had stopped reading.
    """

    requests: int = 0
    finished: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    hedges: int = 0
    superseded: int = 0
    chunk_messages: int = 0
    chunk_messages_dropped: int = 0
    late_answers: int = 0
    malformed: int = 0
    rate_limited: int = 0
    cut_off: int = 0
    disconnected: int = 0
    workers_lost: int = 0
    workers_suspended: int = 0
    clients_lost: int = 0
    peers_stalled: int = 0


@dataclass(slots=True)
class Pending:
    """What peers have not taken at present; whoever keeps it writes it here.

    Attributes:
        peers: how many there are that have not taken everything.
        bytes: what is kept for them.
    """

    peers: int = 0
    bytes: int = 0
