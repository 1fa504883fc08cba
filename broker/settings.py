"""What a broker can be told, with the defaults; the command line shows these same objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..protocol.limits import MAX_NAME_CHARS
from ..protocol.liveness import EXPIRY_S, HEARTBEAT_S
from ..transport.endpoints import DEFAULT_BACKEND, DEFAULT_FRONTEND, EndpointError, check_destination, is_local
from .dispatch import DEFAULT_POLICY, find_policy
from .limits import Limits
from .ordering import DEFAULT_MODEL_ORDER, MODEL_ORDERS

DEFAULT_NAME = "broker"
#: Requests that wait for one model: at 10 finished a second, the last of them waits for under two minutes.
MAX_WAITING = 1_000
#: Weights of clients: a millionth is nothing, and sums of larger ones lose the smaller.
MIN_WEIGHT = 1e-6
MAX_WEIGHT = 1e6
#: Seconds that a broker waits for running requests when it is told to stop.
GRACE_S = 10.0
#: What is kept for a peer that does not take it: two of the longest bodies; ordinary streams are a few kilobytes.
PENDING_BYTES = 16 * 1024 * 1024
#: A reader on a bad network pauses for less; one that is dead without a word is noticed by its silence in this time.
WRITE_TIMEOUT_S = 5.0
#: A request that ends within this time costs its client one message less. Whoever waits for a first token, or thinks
#: of a second attempt, reckons in longer times.
NOTICE_S = 0.02
#: Shorter intervals would only keep the loop busy: a broken connection is noticed without heartbeats.
MIN_HEARTBEAT_S = 0.01
#: Longer silences than a day are a mistake, and peers with a longer interval of their own would refuse theirs.
MAX_EXPIRY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class BrokerSettings:
    """Settings of one broker.

    Attributes:
        frontend: endpoints for clients.
        backend: endpoints for workers.
        name: the broker's name in answers and logs.
        policy: name of the dispatch policy, one of dispatch.policy_names().
        heartbeat_s: seconds between heartbeats.
        expiry_s: seconds of silence after which a peer is given up.
        max_waiting: requests that may wait for one model.
        client_weights: how much of the workers' time clients get in relation to others, by name; 1 for the rest.
        grace_s: seconds that running requests get when the broker stops.
        pending_bytes: bytes that are kept for a peer that does not take them; with more it is cut off.
        write_timeout_s: seconds after which a peer that takes nothing of what is kept for it is cut off.
        uplinks: backend endpoints of the brokers that this one registers at as a worker, by its name.
        notice_s: seconds after which a client is told that its request runs, if it has not ended; 0 for at once.
        group: what it has in common with the brokers that share its work; "" for one that stands alone.
        model_order: how models are listed, one of ordering.MODEL_ORDERS.
        limits: what one peer may ask of the broker.
        curve: the folder of the broker's keys and of those that it admits; "" for no keys, and no encryption.
        uplink_key: the file with the key that the uplinks know this broker by; "" for none.
        uplink_server_keys: the uplinks' public keys, as such or as files: one for all, or one for each.
        insecure: allow endpoints that other machines can reach, without encryption or keys.
        insecure_admin: let every client change things, also where other machines can reach the frontend.
    """

    frontend: tuple[str, ...] = (DEFAULT_FRONTEND,)
    backend: tuple[str, ...] = (DEFAULT_BACKEND,)
    name: str = DEFAULT_NAME
    policy: str = DEFAULT_POLICY
    heartbeat_s: float = HEARTBEAT_S
    expiry_s: float = EXPIRY_S
    max_waiting: int = MAX_WAITING
    client_weights: Mapping[str, float] = field(default_factory=dict)
    grace_s: float = GRACE_S
    pending_bytes: int = PENDING_BYTES
    write_timeout_s: float = WRITE_TIMEOUT_S
    uplinks: tuple[str, ...] = ()
    notice_s: float = NOTICE_S
    group: str = ""
    model_order: str = DEFAULT_MODEL_ORDER
    limits: Limits = field(default_factory=Limits)
    curve: str = ""
    uplink_key: str = ""
    uplink_server_keys: tuple[str, ...] = ()
    insecure: bool = False
    insecure_admin: bool = False

    def __post_init__(self) -> None:
        """Check what the types cannot.

        Raises:
            ValueError: a value makes no sense; the message names it. EndpointError is one.
        """
        if not 0 < len(self.name) <= MAX_NAME_CHARS or not self.name.isprintable():
            raise ValueError(f"the name must have 1 to {MAX_NAME_CHARS} printable characters, got {self.name!r:.80}")
        if len(self.group) > MAX_NAME_CHARS:
            raise ValueError(f"the group must have at most {MAX_NAME_CHARS} characters, got {len(self.group)}")
        find_policy(self.policy)
        if self.model_order not in MODEL_ORDERS:
            raise ValueError(f"unknown model order {self.model_order!r}; known are {', '.join(sorted(MODEL_ORDERS))}")
        for client, weight in self.client_weights.items():
            if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise ValueError(
                    f"the weight of {client!r} must be from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, got {weight}"
                )
        # Written so that NaN fails too.
        if not self.heartbeat_s >= MIN_HEARTBEAT_S:
            raise ValueError(f"the heartbeat interval must be at least {MIN_HEARTBEAT_S} s, got {self.heartbeat_s}")
        if not self.expiry_s <= MAX_EXPIRY_S:
            raise ValueError(f"the expiry must be at most {MAX_EXPIRY_S:g} s, got {self.expiry_s}")
        if not self.expiry_s >= 2 * self.heartbeat_s:
            raise ValueError(
                f"the expiry ({self.expiry_s} s) must be at least twice the heartbeat interval ({self.heartbeat_s} s)"
            )
        if not (self.max_waiting >= 0 and self.grace_s >= 0):
            raise ValueError("max_waiting and grace_s must not be negative")
        if not self.pending_bytes >= 0:
            raise ValueError(f"the pending bytes must not be negative, got {self.pending_bytes}")
        if not self.write_timeout_s > 0:
            raise ValueError(f"the write timeout must be more than 0 s, got {self.write_timeout_s}")
        if not self.frontend or not self.backend:
            raise ValueError("a broker needs at least one frontend and one backend endpoint")
        for uplink in self.uplinks:
            check_destination(uplink)
        if len(set(self.uplinks)) != len(self.uplinks):
            raise ValueError(f"an uplink is given twice: {', '.join(self.uplinks)}")
        if self.uplinks and self.name == DEFAULT_NAME:
            raise ValueError(
                f"a broker with an uplink is a worker there, and two that are called {DEFAULT_NAME!r} would take "
                "each other's place: give it a name of its own with --name"
            )
        if bool(self.uplink_key) != bool(self.uplink_server_keys):
            raise ValueError("--uplink-key and --uplink-server-key go together: give both, or none")
        if self.uplink_key and not self.uplinks:
            raise ValueError("--uplink-key is for uplinks, and there is none: give --uplink, too")
        if len(self.uplink_server_keys) not in (0, 1, len(self.uplinks)):
            raise ValueError(
                f"expected one --uplink-server-key for all {len(self.uplinks)} uplinks, or one for each; got "
                f"{len(self.uplink_server_keys)}"
            )
        if self.curve and (self.insecure or self.insecure_admin):
            raise ValueError("--curve lets in whoever has a key, and --insecure everybody: give one of them")
        for endpoint in (*self.frontend, *self.backend):
            if not is_local(endpoint) and not (self.insecure or self.curve):
                raise EndpointError(
                    f"{endpoint} can be reached from other machines by anyone: bind 127.0.0.1 or ipc://, give keys "
                    "with --curve, or allow it with --insecure"
                )
