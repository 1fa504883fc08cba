"""What one worker is told: its settings with their defaults, once, for the library and the command alike."""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass, field

from ..protocol.limits import (
    FASTEST_TOKENS_PER_S,
    MAX_MODELS,
    MAX_NAME_CHARS,
    MAX_NEW_TOKENS,
    MAX_SLOTS,
    SLOWEST_TOKENS_PER_S,
)
from ..transport.endpoints import EndpointError, check_offer, is_local
from ..transport.keys import Curve, KeyPair

#: Requests that the engine runs at a time: a batch that a small GPU decodes at nearly the price of one.
SLOTS = 16
#: Time for held requests to end after a drain began; supervisors commonly kill after 30 s.
GRACE_S = 10.0
#: A step of a healthy engine takes well under a second, a first step that compiles some ten seconds.
STALL_AFTER_S = 30.0
#: A step this long does not end any more: ten times what makes a worker stalled, longer than a first step that
#: compiles a large model (minutes).
RESTART_AFTER_S = 300.0
#: A worker holds at most `slots * HOLD_FACTOR + HOLD_SPARE` requests: two brokers that fill all slots and a few
#: that are on their way while a slot becomes free. What is beyond would only wait here, where no broker can move it.
HOLD_FACTOR = 2
HOLD_SPARE = 8
#: A reader that grants nothing for so long is not slow but gone, and so are its tokens then. Long enough for somebody
#: who reads, thinks and reads on.
READER_TIMEOUT_S = 600.0
#: Requests of which only the tokens are left, waiting for slow readers. Each takes memory and no slot; with more than
#: these the worker holds on to their slots, so that what it keeps for readers stays bounded.
MOST_PARKED = 1024
#: Tokens that are kept for parked requests, all together; one with its text takes some 200 bytes. It is the length of
#: the longest completion, so that each one alone can be parked.
MOST_PARKED_TOKENS = MAX_NEW_TOKENS


def default_name(suffix: str = "") -> str:
    """Return `<hostname>-<pid>` and the suffix: one name a process, told apart across machines."""
    pid = f"-{os.getpid()}{suffix}"
    return (socket.gethostname() or "worker")[: MAX_NAME_CHARS - len(pid)] + pid


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker presents itself and behaves.

    Attributes:
        brokers: endpoints of the brokers' backends, each once.
        models: names to register under while the model loads; READY after that carries what the engine serves.
            Without any, the worker registers only when the model is loaded.
        name: the worker's name, one process's own.
        slots: requests that the engine runs at a time.
        speed: tokens a second of one stream. Only relations between workers count, so either all workers of a broker
            have one, or none: None has the broker measure it.
        heartbeat_s: a wish for a longer heartbeat interval in seconds; None for the broker's own.
        grace_s: seconds that a drain gives to held requests.
        stall_after_s: seconds after which an engine step that has not ended makes the worker `stalled`.
        restart_after_s: seconds after which it makes the worker end with an exit code that a supervisor restarts; 0
            for never.
        reader_timeout_s: seconds that a stream's tokens wait for its reader's credit before it is given up.
        direct: an endpoint of the worker's own, where clients that can reach it take their chunks past the broker;
            "" for none. A port `*` is a free one.
        insecure: that endpoint may be one that other machines can reach, without keys.
        curves: the worker's key pair and the broker's public key, for each broker in their order; empty where no
            keys are used. The worker's own endpoint has the pair, too.
        log_prompts: the begin of each prompt is logged with its request's id; else no prompt is logged anywhere.

    Raises:
        ValueError: a value cannot be used; the message says which and why.
    """

    brokers: tuple[str, ...]
    models: tuple[str, ...] = ()
    name: str = field(default_factory=default_name)
    slots: int = SLOTS
    speed: float | None = None
    heartbeat_s: float | None = None
    grace_s: float = GRACE_S
    stall_after_s: float = STALL_AFTER_S
    restart_after_s: float = RESTART_AFTER_S
    reader_timeout_s: float = READER_TIMEOUT_S
    direct: str = ""
    insecure: bool = False
    curves: tuple[Curve, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        """Refuse what a broker would refuse, before anything is dialled."""
        if not self.brokers or len(set(self.brokers)) != len(self.brokers):
            raise ValueError(f"brokers: expected one endpoint or more, each once; got {list(self.brokers)}")
        if len(self.curves) not in (0, len(self.brokers)):
            raise ValueError(f"curves: expected none, or one for each of {len(self.brokers)} brokers")
        if len(self.models) > MAX_MODELS or not all(0 < len(name) <= MAX_NAME_CHARS for name in self.models):
            raise ValueError(f"models: expected at most {MAX_MODELS} names of 1 to {MAX_NAME_CHARS} characters")
        if not 0 < len(self.name) <= MAX_NAME_CHARS:
            raise ValueError(f"name: expected 1 to {MAX_NAME_CHARS} characters, got {len(self.name)}")
        if not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"slots: expected 1 to {MAX_SLOTS}, got {self.slots}")
        if self.speed is not None and not SLOWEST_TOKENS_PER_S <= self.speed <= FASTEST_TOKENS_PER_S:
            bounds = f"{SLOWEST_TOKENS_PER_S:g} to {FASTEST_TOKENS_PER_S:g}"
            raise ValueError(f"speed: expected a number from {bounds}, got {self.speed}")
        if self.heartbeat_s is not None and not 0.001 <= self.heartbeat_s < math.inf:
            raise ValueError(f"heartbeat_s: expected 0.001 or more, got {self.heartbeat_s}")
        if not self.grace_s >= 0:
            raise ValueError(f"grace_s: expected 0 or more, got {self.grace_s}")
        if not self.stall_after_s > 0:
            raise ValueError(f"stall_after_s: expected more than 0, got {self.stall_after_s}")
        if not self.restart_after_s >= 0:
            raise ValueError(f"restart_after_s: expected 0 or more, got {self.restart_after_s}")
        if not self.reader_timeout_s > 0:
            raise ValueError(f"reader_timeout_s: expected more than 0, got {self.reader_timeout_s}")
        if self.direct:
            check_offer(self.direct)
            if not is_local(self.direct) and not self.curves and not self.insecure:
                raise EndpointError(
                    f"{self.direct} can be reached from other machines by anyone: use keys (--server-key and --key), "
                    "bind 127.0.0.1 or ipc://, or allow it with --insecure"
                )
            if len(self.direct) > MAX_NAME_CHARS:
                raise ValueError(f"direct: expected at most {MAX_NAME_CHARS} characters, got {len(self.direct)}")

    @property
    def pair(self) -> KeyPair | None:
        """The worker's own keys; None where no keys are used."""
        return self.curves[0].pair if self.curves else None

    @property
    def most_held(self) -> int:
        """Requests that the worker holds at most, of all brokers, besides parked ones."""
        return self.slots * HOLD_FACTOR + HOLD_SPARE
