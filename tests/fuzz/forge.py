"""Messages that are well-formed and not true: ids, routes and keys of others, figures that cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tokenmq.protocol import limits
from tokenmq.protocol.codec import HEADER_BYTES, encode
from tokenmq.protocol.errors import ProtocolError
from tokenmq.protocol.messages import (
    Chunk,
    Command,
    Details,
    DisconnectCode,
    FinishReason,
    Load,
    Message,
    ModelInfo,
    Request,
    TokenLogprobs,
    Usage,
    WorkerState,
)
from tokenmq.protocol.payload import Generation, Prior, Sampling, pack_generation

from . import corpus
from .mutate import mutated

_COUNTS = (0, 1, 2, 3, 16, 2**31, limits.MAX_COUNT)
_SECONDS = (0.0, -0.0, 5e-324, 1e-9, 0.05, 1.0, 60.0, limits.MAX_SECONDS)


@dataclasses.dataclass
class Known:
    """What a hostile peer has found out.

    Attributes:
        ids: of requests and queries, its own and others'.
        routes: what workers call clients.
        keys: of chunks past the broker.
        names: of workers.
        models: that anybody serves.
        endpoints: of workers' doors, and of others.
        pasts: messages that were sent before, to be said again.
    """

    ids: list[bytes] = dataclasses.field(default_factory=lambda: [bytes(16)])
    routes: list[bytes] = dataclasses.field(default_factory=lambda: [bytes(16)])
    keys: list[bytes] = dataclasses.field(default_factory=lambda: [bytes(16)])
    names: tuple[str, ...] = ("w",)
    models: tuple[str, ...] = ("m",)
    endpoints: tuple[str, ...] = ("",)
    pasts: list[list[bytes]] = dataclasses.field(default_factory=list)

    def learn(self, what: list[Any], value: Any) -> None:
        """Remember the latest of a kind."""
        what.append(value)
        del what[:-40]


class Forger:
    """Makes messages out of what is known."""

    def __init__(self, random: Random, known: Known) -> None:
        self._random = random
        self.known = known
        self._others = [frames for each in corpus.golden().values() for frames in each] + corpus.odd()
        one = self._one
        #: What may stand in a field, by its name.
        self._fields: dict[str, Callable[[], Any]] = {
            "id": self._id,
            "request_id": self._id,
            "route": lambda: one((*known.routes, *known.keys, None)),
            "key": lambda: one((*known.keys, *known.routes, None)),
            "attempt": lambda: one((1, 1, 1, 1, 2, 3, 17, limits.MAX_COUNT)),
            "credit": lambda: one((0, 1, 16, 4096, limits.MAX_CREDIT_TOKENS)),
            "limit": lambda: one((0, 1, 16, 4096, limits.MAX_CREDIT_TOKENS)),
            "offset": lambda: one((0, 0, 1, 5, 2**40, limits.MAX_COUNT)),
            "index": lambda: one((0, 0, 0, 1, limits.MAX_COMPLETIONS - 1)),
            "model": lambda: one((*known.models, *known.models, "unknown", "\0" * 256)),
            "worker": lambda: one((*known.names, *(f"{name}/x" for name in known.names), "z" * 256)),
            "broker": lambda: one((*known.names, "b/b")),
            "client": lambda: one(("", "honest", "c" * 256)),
            "group": lambda: one(("", "", "group")),
            "direct": lambda: one((*known.endpoints, "")),
            "message": lambda: one(("", "why", "\U0001f600" * limits.MAX_TEXT_CHARS)),
            "code": lambda: one(("bad_request", "worker_lost", "engine_failed", "cannot_resume", "x" * 256)),
            "retry_after_s": lambda: one((None, *_SECONDS)),
            "deadline_s": lambda: one((*[None] * 16, *_SECONDS)),
            "queue_s": lambda: one((*[None] * 16, *_SECONDS)),
            "grace_s": lambda: one((None, *_SECONDS)),
            "heartbeat_s": lambda: one((0.001, 1.0, 60.0, limits.MAX_SECONDS)),
            "expiry_s": lambda: one((0.001, 5.0, limits.MAX_SECONDS)),
            "prior_tokens": lambda: one((0, 0, 0, 0, 0, 3, limits.MAX_NEW_TOKENS)),
            "expected_tokens": lambda: one((0, 0, 7, 8, limits.MAX_NEW_TOKENS)),
            "priority": lambda: self._random.randrange(limits.MAX_PRIORITY + 1),
            "affinity": lambda: one(("", "", "a", "a" * 256)),
            "avoid": lambda: self._some((*known.names, "w/x"), limits.MAX_AVOIDED),
            "path": lambda: one((*[()] * 8, ("x",) * limits.MAX_HOPS, known.names[:1])),
            "brokers": lambda: one(((), (), ("b1",), tuple(f"b{n}" for n in range(limits.MAX_BROKERS)))),
            "incarnation": lambda: one((0, 1, 2, limits.MAX_COUNT)),
            "slots": lambda: one((1, 4, limits.MAX_SLOTS)),
            "speed": lambda: one((None, None, limits.SLOWEST_TOKENS_PER_S, limits.FASTEST_TOKENS_PER_S)),
            "models": self._models,
            "load": self._load,
            "usage": lambda: Usage(one(_COUNTS), one((0, 7, 8, *_COUNTS))),
            "reason": lambda: one(tuple(FinishReason)),
            "state": lambda: one(tuple(WorkerState)),
            "chunks": lambda: one(_COUNTS),
            "payload": self._payload,
            "attachments": lambda: one(((), (), (b"",), (b"x" * 100,) * 3)),
            "method": lambda: one(
                ("status", "workers", "models", "route", "drain", "undrain", "remove", "set_speed", "set_policy", "?")
            ),
            "arguments": self._arguments,
            "result": self._result,
            "sent": lambda: one((0, 1, 2, 5, limits.MAX_COUNT)),
            "hedge": lambda: self._random.random() < 0.1,
            "explain": lambda: self._random.random() < 0.3,
        }

    def message(self, command: Command) -> Message:
        """Return a message of a command, with some of its fields forged."""
        message = self._random.choice(corpus.messages()[command])
        return self._forged(message)

    def chunks_for(self, route: bytes) -> Message:
        """Return CHUNKS that go to a client by its route."""
        return dataclasses.replace(self.message(Command.CHUNKS), route=route)  # type: ignore[type-var,call-arg]

    def frames(self, commands: Sequence[Command], bent: float = 0.35) -> list[bytes]:
        """Return the frames of a forged message of one of these commands: now and then old or broken ones."""
        random = self._random
        if self.known.pasts and random.random() < 0.1:
            frames = random.choice(self.known.pasts)
        else:
            try:
                frames = encode(self.message(random.choice(commands)))
            except ProtocolError:
                frames = random.choice(self._others)
        if random.random() < bent:
            return mutated(random, frames, self._others, HEADER_BYTES)
        return frames

    def _forged(self, value: Any) -> Any:
        names = [item.name for item in dataclasses.fields(value)]
        changes: dict[str, Any] = {}
        for name in names:
            maker = self._fields.get(name)
            if name == "chunks" and not isinstance(getattr(value, name), int):
                changes[name] = tuple(self._chunk() for _ in range(self._random.choice((1, 1, 2, 5))))
            elif name == "code" and isinstance(getattr(value, name), DisconnectCode):
                changes[name] = self._one(tuple(DisconnectCode))
            elif name == "envelope" or name == "timings":
                changes[name] = self._forged(getattr(value, name))
            elif isinstance(getattr(value, name), bool) and name == "direct":
                changes[name] = self._random.random() < 0.5
            elif name.endswith("_s") and maker is None:
                changes[name] = self._one(_SECONDS)
            elif maker is not None and (self._random.random() < 0.6 or name in ("id", "models", "model", "route")):
                changes[name] = maker()
        if isinstance(value, Request):
            changes["id"] = self._id()
        if "route" in changes and changes["route"] is None and "model" not in names:
            changes["route"] = bytes(16)
        return dataclasses.replace(value, **changes)

    def _one(self, values: Sequence[Any]) -> Any:
        return self._random.choice(values)

    def _some(self, values: Sequence[str], most: int) -> tuple[str, ...]:
        return tuple(self._random.choice(values) for _ in range(self._random.choice((0, 0, 1, 3, most))))

    def _id(self) -> bytes:
        known = self.known
        made = self._random.randbytes(16)
        return self._one((made, made, *known.ids[-6:], *known.ids[-6:], self._one(known.routes)))

    def _chunk(self) -> Chunk:
        tokens = self._one((0, 1, 1, 2, 40, 3000))
        token_ids = tuple(self._one((0, 1, limits.MAX_TOKEN_ID)) for _ in range(tokens))
        logprobs = (TokenLogprobs(1, "t", -1.0),)
        details = self._one(
            (None, None, None, Details(logprobs), Details((), (None, *logprobs)), Details(vector=b"1234" * 9))
        )
        fields = self._fields
        text = self._one(("", "text", "t" * 5000))
        return Chunk(
            fields["id"](), fields["attempt"](), fields["index"](), fields["offset"](), token_ids, text, details
        )

    def _models(self) -> tuple[ModelInfo, ...]:
        random = self._random
        names = [f"m{number}" for number in range(1000)] if random.random() < 0.02 else self.known.models
        return tuple(
            ModelInfo(name, self._one((0, 1, limits.MAX_COUNT)), *[random.random() < 0.5 for _ in range(5)])
            for name in names
            if random.random() < 0.8
        )

    def _load(self) -> Load:
        one, part = self._one, self._random.choice((0.0, 0.5, 1.0))
        state = one((*[WorkerState.READY] * 8, *WorkerState))
        if self._random.random() < 0.7:
            return Load(state)
        held = one(_COUNTS)
        fields = [held, 0, held, one(_COUNTS)] if self._random.random() < 0.5 else [one(_COUNTS) for _ in range(4)]
        return Load(state, *fields, one(_SECONDS), one((0.0, 1e12)), part, 1e12, part, part, part, one(_COUNTS))

    def _payload(self) -> bytes:
        random = self._random
        if random.random() < 0.3:
            return random.choice(corpus.payloads())
        sampling = Sampling(max_tokens=self._one((1, 8, limits.MAX_NEW_TOKENS)), seed=random.getrandbits(30))
        prior = self._one((None, None, Prior((1, 2, 3), 3)))
        try:
            return pack_generation(Generation(prompt="p", sampling=sampling, prior=prior))
        except ProtocolError:
            return b""

    def _arguments(self) -> dict[str, Any]:
        one = self._one
        values = {
            "worker": (*self.known.names, "nobody", "w/x"),
            "model": self.known.models,
            "tree": (True, False),
            "within_s": (0.05, 10.0, 1e9),
            "speed": (None, 1e-6, 1e6, 0.0),
            "stay": (True, False),
            "policy": ("shortest-queue", "nonsense"),
            "grace_s": (0.0, 1e9),
            "unknown": (1,),
        }
        return {name: one(values[name]) for name in values if self._random.random() < 0.3}

    def _result(self) -> Any:
        deep: Any = None
        for _ in range(self._one((0, 1, 20, 31))):
            deep = self._one(([deep], {"x": deep}))
        rows = [{"name": self._one(("w", "n" * 5000, 7)), "depth": self._one((0, 1, 1023, 2**60)), "x": deep}]
        figures = dict.fromkeys(("clients", "workers", "slots", "waiting", "running", "orphaned"), limits.MAX_COUNT)
        branch = {"path": "p", "broker": "b", "id": self._one(("i", "b1")), **figures}
        branches = [branch] * self._one((1, 3, limits.MAX_BROKERS))
        return self._one(
            (
                deep,
                rows,
                rows * 50,
                {"tree": {"brokers": branches}},
                {"tree": 1},
                {"worker": deep},
                {"worker": "x" * 999},
            )
        )
