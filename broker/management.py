"""Queries: what a broker is asked and told by clients, operators and the broker above it, and what it answers.

Here stand the methods with their arguments, and who may use them. What they show is made in `views.py`, what they
change in `changes.py`; what concerns the brokers below this one is in `tree.py`. Answers that take time are errands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from ..protocol.errors import BadRequestError, ForbiddenError, ModelNotFoundError, ProtocolError, TokenmqError
from ..protocol.identity import Role
from ..protocol.limits import FASTEST_TOKENS_PER_S, MAX_BODY_BYTES, SLOWEST_TOKENS_PER_S
from ..protocol.messages import Error, Query, Reply
from ..protocol.packing import pack
from ..protocol.schema import Check, boolean, fail, number, seconds, text
from ..transport.endpoints import is_local
from . import changes, views
from .errands import MAX_OF_CLIENT, Answer, Asker, Errand, Errands
from .hops import name_there
from .ordering import MODEL_ORDERS
from .outbox import Outbox, clip
from .registry import ClientSession, WorkerSession
from .settings import BrokerSettings
from .tree import LEAST_S, MOST_S, ORDER_S, TREE_S, relayed, route_below, status_below, workers_below

if TYPE_CHECKING:
    from .core import BrokerCore

#: What a REPLY's body has besides the result.
_REPLY_MARGIN_BYTES = 1024


def clients_may_change(settings: BrokerSettings) -> bool:
    """Tell whether all clients may change things, and not only look, at a broker that has no keys.

    Nothing tells an administrator from others there. Whoever reaches a socket of this machine alone is
    taken for one, since that needs an account here. Where other machines reach any of the frontends, nobody is: the
    one ROUTER behind them all does not tell by which a client has come.
    """
    return settings.insecure_admin or all(map(is_local, settings.frontend))


class Management:
    """All queries."""

    def __init__(self, core: BrokerCore, outbox: Outbox, random: Random) -> None:
        """Have been asked nothing. `random` makes the ids of queries to other brokers."""
        self._core = core
        self._outbox = outbox
        self._errands = Errands(outbox, random, self._settle)

    def client(self, client: ClientSession) -> Asker:
        """Return a client as one who asks."""
        return Asker(
            session=client,
            name=client.name,
            say=lambda answer: self._outbox.to_client(client, answer),
            admin=self._is_admin(client),
            at_a_time=MAX_OF_CLIENT,
        )

    def _is_admin(self, client: ClientSession) -> bool:
        if client.identity is not None:
            return client.identity.role is Role.ADMIN
        return clients_may_change(self._core.settings)

    def ask(self, asker: Asker, query: Query, now: float) -> None:
        """Answer a query, now or later: exactly once, unless the asker's session ends before."""
        self._settle(asker, query.id, lambda: self._answer(asker, query, now))

    def answered(self, worker: WorkerSession, answer: Answer) -> bool:
        """Take what a broker below says; tell whether it was asked. What comes too late was asked once."""
        return self._errands.answered(worker, answer)

    def worker_lost(self, worker: WorkerSession, why: str) -> None:
        """Wait no longer for what this one was asked."""
        self._errands.worker_lost(worker, why)

    def asker_lost(self, session: Hashable) -> None:
        """Answer nothing more in this session."""
        self._errands.asker_lost(session)

    def expire(self, now: float) -> None:
        """Answer what has taken its time."""
        self._errands.expire(now)

    def next_deadline(self) -> float | None:
        """Return when `expire` is next needed, None for never."""
        return self._errands.next_deadline()

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        self._errands.validate()

    def _settle(self, asker: Asker, id: bytes, make: Callable[[], Any]) -> None:
        try:
            result = make()
            if isinstance(result, Errand):
                self._errands.begin(asker, id, result, self._outbox.now)
                return
            size_bytes = len(pack(result))
            if size_bytes > MAX_BODY_BYTES - _REPLY_MARGIN_BYTES:
                # Workers choose what they are called and serve; a client would end its session over it.
                raise BadRequestError(f"the answer is too large for one message: {size_bytes} bytes")
        except TokenmqError as error:
            message = clip(error.message)
            asker.say(Error(id, 0, error.code, message, error.retryable, error.retry_after_s))
        else:
            asker.say(Reply(id, result))

    def _answer(self, asker: Asker, query: Query, now: float) -> Any:
        method = _METHODS.get(query.method)
        if method is None:
            raise BadRequestError(f"unknown query {query.method!r}; known are {', '.join(sorted(_METHODS))}")
        if method.changes and not asker.admin:
            raise ForbiddenError(f"{query.method!r} is for administrators, {_who_is_one(self._core.settings)}")
        arguments = _checked(query.method, method, query.arguments)
        if method.changes:
            self._outbox.log("ordered", what=query.method, by=asker.name, **arguments)
        if "worker" in method.required:
            within_s = arguments.pop("within_s", ORDER_S)
            child, name = self._behind(arguments["worker"])
            if child is not None:
                return relayed(child, query.method, {**arguments, "worker": name}, within_s)
        return method.answer(self._core, now, **arguments)

    def _behind(self, name: str) -> tuple[WorkerSession | None, str]:
        """Return the broker below that a worker is behind, None if it is here; and what the worker is called there.

        Names may have slashes of their own: whoever is called just so here comes first, then the broker with the
        longest name.
        """
        if changes.knows(self._core, name):
            return None, name
        brokers = [worker for worker in self._core.registry if worker.is_broker and name_there(worker.name, name)]
        child = max(brokers, key=lambda worker: len(worker.name), default=None)
        return child, name_there(child.name, name) if child else name


def _who_is_one(settings: BrokerSettings) -> str:
    if settings.curve:
        return "and this is the key of a client: use one that was made with --role admin"
    return (
        "and this broker cannot tell who is one, since other machines reach it: start it with --curve and keys, or "
        "with local frontends only, or let everybody with --insecure-admin"
    )


def _checked(method: str, found: _Method, arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = {**found.required, **found.optional}
    if unknown := sorted(arguments.keys() - known.keys()):
        takes = f"only {', '.join(known)}" if known else "no arguments"
        raise BadRequestError(f"query {method!r} takes {takes}, got {', '.join(unknown)[:256]}")
    if missing := [name for name in found.required if arguments.get(name) is None]:
        raise BadRequestError(f"query {method!r} needs {', '.join(missing)}")
    try:
        # As everywhere on the wire, nil means that an optional one was left out.
        return {name: known[name](value, name) for name, value in arguments.items() if value is not None}
    except ProtocolError as error:
        raise BadRequestError(f"query {method!r}: {error.message}") from error


def _models(core: BrokerCore, _now: float, order: str | None = None) -> Any:
    return views.models(core, order or core.settings.model_order)


def _workers(core: BrokerCore, now: float, tree: bool = False, within_s: float = TREE_S) -> Any:
    return workers_below(core, now, within_s) if tree else views.workers(core, now)


def _status(core: BrokerCore, now: float, tree: bool = False, within_s: float = TREE_S) -> Any:
    return status_below(core, now, within_s) if tree else views.status(core, now)


def _route(core: BrokerCore, _now: float, model: str, affinity: str = "", within_s: float = TREE_S) -> Any:
    if not core.registry.serves(model):
        here = ", ".join(core.registry.models()) or "none"
        raise ModelNotFoundError(f"no worker serves {model!r}; models here: {here}")
    return route_below(core, model, affinity, within_s)


def _one_of(known: Iterable[str]) -> Check:
    names = tuple(known)

    def check(value: Any, path: str) -> str:
        if not isinstance(value, str) or value not in names:
            raise fail(path, f"one of {', '.join(names)}", value)
        return value

    return check


@dataclass(frozen=True, slots=True)
class _Method:
    """How to answer a query, the checks of the arguments that it takes, and whether it changes anything.

    One that needs the name of a worker, `worker`, goes to the broker that this worker is behind.
    """

    answer: Callable[..., Any]
    required: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    changes: bool = False


_WORKER = {"worker": text(empty=False)}
_WITHIN = {"within_s": number(LEAST_S, MOST_S)}
_SPEED = number(SLOWEST_TOKENS_PER_S, FASTEST_TOKENS_PER_S)
_METHODS = {
    "models": _Method(_models, {}, {"order": _one_of(MODEL_ORDERS)}),
    "workers": _Method(_workers, {}, {"tree": boolean, **_WITHIN}),
    "status": _Method(_status, {}, {"tree": boolean, **_WITHIN}),
    "route": _Method(_route, {"model": text(empty=False)}, {"affinity": text(), **_WITHIN}),
    "refresh": _Method(changes.refresh, changes=True),
    "remove": _Method(changes.remove, _WORKER, _WITHIN, changes=True),
    "drain": _Method(changes.drain, _WORKER, {"grace_s": seconds, "stay": boolean, **_WITHIN}, changes=True),
    "undrain": _Method(changes.undrain, _WORKER, _WITHIN, changes=True),
    "set_policy": _Method(changes.set_policy, {"policy": text(empty=False)}, changes=True),
    "set_speed": _Method(changes.set_speed, _WORKER, {"speed": _SPEED, **_WITHIN}, changes=True),
}
