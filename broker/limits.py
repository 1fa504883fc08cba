"""What one peer may ask of a broker: every limit with its default, the reason for it, and the option that sets it.

The limits of the wire itself, which nobody can widen, are in `protocol/limits.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from ..protocol.limits import MAX_ATTACHMENTS, MAX_MESSAGE_BYTES, MAX_SECONDS

_MIB = 1024 * 1024
#: Descriptors that connections leave to the broker: listeners, its own links upward, log files, and what libzmq
#: accepts before the broker has heard of it.
_SPARE_DESCRIPTORS = 128
#: A larger count or rate is a mistake: it would be no limit for anybody, and 0 says that better.
_MOST = 2**53


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one broker. 0 stands for no limit, but for `message_bytes`, `attachments` and `penalty_s`.

    What is counted "per client" is counted by key where the broker has keys, else by connection. A rate may be used
    up in a burst; how much of it is said where it is not one second's worth.

    Attributes:
        message_bytes: payload and attachments of one request, 1 to limits.MAX_MESSAGE_BYTES.
        attachments: attachments of one request, 0 to limits.MAX_ATTACHMENTS; 0 allows none.
        open_requests: requests of one client that wait or run.
        queued_bytes: payloads and attachments of those that wait; a single request always fits.
        requests_per_s: requests of one client.
        bytes_per_s: payloads and attachments of one client's requests; one whole request always fits.
        queries_per_s: management questions of one client; a burst of five seconds' worth.
        messages_per_s: messages of one client that no ERROR can answer: CREDIT, CANCEL, HEARTBEAT.
        refusals_per_s: refusals of one peer, before it loses its connection; a burst of ten seconds' worth.
        worker_messages_per_s: messages of one worker that are not CHUNKS.
        stray_chunks_per_s: CHUNKS of one worker for requests that it does not hold; a burst of ten seconds' worth.
        connections: connections of one side, frontend or backend.
        connections_per_peer: connections of one key, and of one address of another machine.
        connections_per_s: new connections from one address of another machine; a burst of ten seconds' worth.
        handshakes: connections of one side that have not introduced themselves by HELLO or READY.
        greeting_s: seconds that a connection has for that.
        penalty_s: seconds for which a key that was cut off is not let in again; 0 lets it in at once.
    """

    #: What the wire allows: a prompt with a few large images. Smaller where models read text only.
    message_bytes: int = MAX_MESSAGE_BYTES
    attachments: int = MAX_ATTACHMENTS
    #: More than the slots of a large pool and its waiting room; each costs the broker about two kilobytes.
    open_requests: int = 4_096
    #: The broker keeps what waits: a quarter of what may wait for one model.
    queued_bytes: int = 256 * _MIB
    #: Half of what one core of a broker carries, so that one client alone cannot take it.
    requests_per_s: int = 5_000
    #: Two gigabits: more than most brokers' networks, less than what one core copies.
    bytes_per_s: int = 256 * _MIB
    #: People and dashboards ask once a second; an answer about many workers costs a millisecond.
    queries_per_s: int = 100
    #: A reader grants credit a few times a second for each stream: this is thousands of streams.
    messages_per_s: int = 50_000
    #: An honest peer waits for as long as a refusal says, so it is hardly refused twice.
    refusals_per_s: int = 200
    #: Ends of requests and reports of load: twenty times what one core of a broker dispatches.
    worker_messages_per_s: int = 100_000
    #: After a cancel, or when a client is lost, some are on their way and honest.
    stray_chunks_per_s: int = 1_000
    #: About half a gigabyte in libzmq.
    connections: int = 16_384
    #: Many processes on one machine, or behind one address translator; 16 of them cannot fill a broker.
    connections_per_peer: int = 1_024
    #: A thousand programs start again together, and then stay.
    connections_per_s: int = 200
    #: An honest peer introduces itself in its first milliseconds; when thousands come back at once with keys, their
    #: handshakes keep a core busy for seconds, and to close them would only make them come again.
    handshakes: int = 4_096
    greeting_s: float = 10.0
    #: As long as a person needs to see it in a log, and a program that does it by mistake not to storm.
    penalty_s: float = 10.0

    def __post_init__(self) -> None:
        """Check what the types cannot.

        Raises:
            ValueError: a value makes no sense; the message names it.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            most = MAX_SECONDS if field.name.endswith("_s") and not field.name.endswith("_per_s") else _MOST
            # Written so that NaN fails too.
            if not 0 <= value <= most:
                raise ValueError(f"{field.name} must be from 0 to {most:g}, got {value}")
        if not 1 <= self.message_bytes <= MAX_MESSAGE_BYTES:
            raise ValueError(f"message_bytes must be from 1 to {MAX_MESSAGE_BYTES}, got {self.message_bytes}")
        if self.attachments > MAX_ATTACHMENTS:
            raise ValueError(f"attachments must be from 0 to {MAX_ATTACHMENTS}, got {self.attachments}")

    def within(self, descriptors: int) -> Limits:
        """Return these limits with no more connections than a process with so many file descriptors can hold.

        A broker without a free descriptor takes no more connections, and libzmq tries to without a pause (4.3.5).
        Both sides share the descriptors, and each gets half.
        """
        room = max(1, (descriptors - _SPARE_DESCRIPTORS) // 2)
        return replace(self, connections=min(self.connections or room, room))

    def too_large(self, size_bytes: int, attachments: int) -> str:
        """Return what is wrong with a request of this size, for an ERROR that no retry can help; "" if nothing is."""
        if size_bytes > self.message_bytes:
            return f"the request has {size_bytes} bytes; this broker takes at most {self.message_bytes}"
        if attachments > self.attachments:
            return f"the request has {attachments} attachments; this broker takes at most {self.attachments}"
        return ""


#: No limit but those of the wire: for tests, and for brokers whose peers are all one's own.
UNLIMITED = Limits(
    **{field.name: 0 for field in fields(Limits) if field.name not in ("message_bytes", "attachments")}
)


@dataclass(frozen=True, slots=True)
class LimitOption:
    """A command line option that sets a limit.

    Attributes:
        name: the option, as typed.
        field: the field of Limits.
        metavar: what its value counts.
        help: what it does and why one would change it.
    """

    name: str
    field: str
    metavar: str
    help: str

    @property
    def default(self) -> int | float:
        """The default of the field; its type is the option's."""
        value: int | float = getattr(DEFAULTS, self.field)
        return value

    @property
    def least(self) -> int:
        """The smallest value."""
        return 1 if self.field == "message_bytes" else 0

    @property
    def most(self) -> int | None:
        """The largest value, None where any is fine."""
        return {"message_bytes": MAX_MESSAGE_BYTES, "attachments": MAX_ATTACHMENTS}.get(self.field)


DEFAULTS = Limits()

OPTIONS = (
    LimitOption(
        "--max-message-bytes", "message_bytes", "BYTES",
        "Bytes of one request, payload and attachments; larger ones are refused as `bad_request`.",
    ),
    LimitOption(
        "--max-attachments", "attachments", "N",
        "Attachments (images) of one request; 0 allows none.",
    ),
    LimitOption(
        "--max-open-requests", "open_requests", "N",
        "Requests of one client that may wait or run at a time; more are refused as `rate_limited`. 0: no limit.",
    ),
    LimitOption(
        "--max-queued-bytes", "queued_bytes", "BYTES",
        "Bytes of one client's requests that wait, which the broker keeps for it; more are refused as "
        "`rate_limited`. 0: no limit.",
    ),
    LimitOption(
        "--requests-per-s", "requests_per_s", "N",
        "Requests a second of one client, so that one alone cannot take the broker; more are refused as "
        "`rate_limited`. 0: no limit.",
    ),
    LimitOption(
        "--bytes-per-s", "bytes_per_s", "BYTES",
        "Bytes a second of one client's requests, so that one alone cannot take the network; more are refused as "
        "`rate_limited`. 0: no limit.",
    ),
    LimitOption(
        "--queries-per-s", "queries_per_s", "N",
        "Management questions a second of one client, five seconds' worth at once; answers about many workers cost "
        "time. 0: no limit.",
    ),
    LimitOption(
        "--messages-per-s", "messages_per_s", "N",
        "Messages a second of one client that cannot be refused (credit, cancels, heartbeats); with more it is cut "
        "off. 0: no limit.",
    ),
    LimitOption(
        "--refusals-per-s", "refusals_per_s", "N",
        "Refusals a second after which a peer is cut off, ten seconds' worth at once: who waits as it is told gets "
        "few. 0: no limit.",
    ),
    LimitOption(
        "--worker-messages-per-s", "worker_messages_per_s", "N",
        "Messages a second of one worker, tokens left out; with more it is cut off. 0: no limit.",
    ),
    LimitOption(
        "--stray-chunks-per-s", "stray_chunks_per_s", "N",
        "Messages a second with tokens of requests that a worker does not hold, ten seconds' worth at once: some are "
        "honest, after a cancel; with more it is cut off. 0: no limit.",
    ),
    LimitOption(
        "--max-connections", "connections", "N",
        "Connections of clients, and as many of workers, each about 30 KB; never more than the open files that the "
        "system allows. 0: only that.",
    ),
    LimitOption(
        "--max-connections-per-peer", "connections_per_peer", "N",
        "Connections of one key, and of one address of another machine, so that one peer cannot keep others out. "
        "0: no limit.",
    ),
    LimitOption(
        "--connections-per-s", "connections_per_s", "N",
        "New connections a second from one address of another machine, ten seconds' worth at once: handshakes cost "
        "time. 0: no limit.",
    ),
    LimitOption(
        "--max-handshakes", "handshakes", "N",
        "Connections of clients, and as many of workers, that have not introduced themselves after a second; the "
        "oldest of more is closed. 0: no limit.",
    ),
    LimitOption(
        "--greeting-timeout", "greeting_s", "S",
        "Seconds in which a connection must have introduced itself, else it is closed. 0: no limit.",
    ),
    LimitOption(
        "--penalty", "penalty_s", "S",
        "Seconds for which a key that was cut off for its flood is not let in again; doubled each time, up to five "
        "minutes. 0: it is let in at once.",
    ),
)  # fmt: skip
"""All limits as options of zmq-broker, in the order of its help."""
