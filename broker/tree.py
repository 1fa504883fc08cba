"""The brokers below this one, as management shows them: their workers in one list, their figures in sums.

Each broker asks those that are registered at it, and they ask further. Each hop passes on less time than it has, so
that a broker that does not answer is missed by the one above it, and not by all above that one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..protocol.errors import ProtocolError, WorkerLostError, exception_for
from ..protocol.limits import MAX_BROKERS, MAX_CONTAINERS, MAX_COUNT
from ..protocol.messages import Error, Reply
from ..protocol.schema import boolean, count, listing, record, text
from . import views
from .errands import Answer, Errand
from .hops import name_below
from .registry import WorkerSession

if TYPE_CHECKING:
    from .core import BrokerCore

#: How long an answer about the tree waits for the brokers in it: what they need is milliseconds.
TREE_S = 1.0
#: How long an order to a worker behind another broker waits for the answer.
ORDER_S = 2.0
#: The least and the most time that anybody may ask for.
LEAST_S = 0.05
MOST_S = 10.0
#: What a hop passes on of its time. A second is above LEAST_S for eight hops, the most that there are; where brokers
#: are registered in a circle for a moment, this ends the questions.
_PASSED_ON = 0.7

#: Arrays and maps in an answer, without the few around it.
_MOST_CONTAINERS = MAX_CONTAINERS - 16


@dataclass(frozen=True, slots=True)
class Branch:
    """One broker of the tree, with what is its own: not what is behind the brokers below it.

    Attributes:
        path: where it stands below the one that was asked: names with slashes, "" for that one itself.
        broker: what it calls itself.
        id: its id, which is its own in every tree.
        answered: it has answered in time; if not, its figures are missing, and so is all below it.
        clients: those that are connected.
        workers: those that are no brokers.
        slots: theirs.
        waiting: requests in its waiting rooms.
        running: requests at its workers.
        orphaned: those there that nobody waits for any more.
    """

    path: str
    broker: str
    id: str
    answered: bool = True
    clients: int = 0
    workers: int = 0
    slots: int = 0
    waiting: int = 0
    running: int = 0
    orphaned: int = 0


_FIGURES = ("clients", "workers", "slots", "waiting", "running", "orphaned")
_BRANCH = record(
    Branch, {"path": text(), "broker": text(), "id": text(), "answered": boolean, **dict.fromkeys(_FIGURES, count())}
)
_BRANCHES = listing(_BRANCH, MAX_BROKERS, least=1)


def workers_below(core: BrokerCore, now: float, within_s: float) -> Errand | list[dict[str, Any]]:
    """Return the workers, after each broker those behind it."""
    rows = [{**row, "depth": 0} for row in views.workers(core, now)]
    asks = _asks(core, "workers", within_s)

    def finish(answers: Mapping[str, Answer]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        # What each says is a message; all together must still be one, or the asker's session would end over it.
        left = _MOST_CONTAINERS - sum(map(_containers, rows))
        for row in rows:
            found.append(row)
            if row["broker"]:
                below = _rows(answers.get(row["name"]))
                taken = 0 if below is None else _containers(below)
                if taken > left:
                    below, taken = None, 0
                left -= taken
                row["answered"] = below is not None
                found += [_lowered(row["name"], inner) for inner in below or ()]
        return found

    return Errand(within_s, finish, asks) if asks else finish({})


def _rows(answer: Answer | None) -> list[dict[str, Any]] | None:
    """Return what a broker says of its workers; None where it says nothing that makes sense."""
    if answer is None or isinstance(answer, Error) or not isinstance(answer.result, list):
        return None
    sound = all(
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and type(row.get("depth")) is int
        and 0 <= row["depth"] < MAX_BROKERS
        for row in answer.result
    )
    return answer.result if sound else None


def _containers(value: Any) -> int:
    """Return how many arrays and maps a value has, itself included."""
    count, left = 0, [value]
    while left:
        each = left.pop()
        if isinstance(each, (dict, list, tuple)):
            count += 1
            left.extend(each.values() if isinstance(each, dict) else each)
    return count


def _lowered(child: str, row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "name": name_below(child, row["name"]), "depth": row["depth"] + 1}


def status_below(core: BrokerCore, now: float, within_s: float) -> Errand | dict[str, Any]:
    """Return the broker's own figures, and the sums over all brokers of the tree."""
    own = views.status(core, now)
    asks = _asks(core, "status", within_s)

    def finish(answers: Mapping[str, Answer]) -> dict[str, Any]:
        branches = [_branch(core)]
        for worker, *_ in asks:
            branches += _branches(worker, answers.get(worker.name))
        return {**own, "tree": _sums(branches)}

    return Errand(within_s, finish, asks) if asks else finish({})


def _branch(core: BrokerCore) -> Branch:
    leaves = [worker for worker in core.registry if not worker.is_broker]
    records = [record for worker in leaves for record in worker.in_flight.values()]
    orphaned = sum(record.client is None for record in records)
    return Branch(
        path="",
        broker=core.settings.name,
        id=core.id,
        clients=len(core.clients),
        workers=len(leaves),
        slots=sum(worker.ready.slots for worker in leaves),
        waiting=core.exchange.tally()["waiting"],
        running=len(records) - orphaned,
        orphaned=orphaned,
    )


def _branches(child: WorkerSession, answer: Answer | None) -> list[Branch]:
    try:
        if answer is None or isinstance(answer, Error) or not isinstance(answer.result, Mapping):
            raise ProtocolError("no answer")
        below: tuple[Branch, ...] = _BRANCHES(answer.result.get("tree", {}).get("brokers"), "brokers")
    except (ProtocolError, AttributeError):
        return [Branch(child.name, child.name, child.ready.brokers[0], answered=False)]
    return [dataclasses.replace(branch, path=name_below(child.name, branch.path)) for branch in below]


def _sums(branches: list[Branch]) -> dict[str, Any]:
    """Return the figures of all brokers together; one that two ways lead to counts once."""
    once: dict[str, Branch] = {}
    for branch in branches:
        known = once.get(branch.id)
        if known is None or branch.answered > known.answered:
            once[branch.id] = branch
    found = list(once.values())[:MAX_BROKERS]
    # Brokers say what they like, and the sum must still be a message.
    sums = {name: min(MAX_COUNT, sum(getattr(branch, name) for branch in found)) for name in _FIGURES}
    return {
        **{name: sums[name] for name in ("clients", "workers", "slots")},
        "requests": {name: sums[name] for name in ("waiting", "running", "orphaned")},
        "brokers": [dataclasses.asdict(branch) for branch in found],
    }


def route_below(core: BrokerCore, model: str, affinity: str, within_s: float) -> Errand | dict[str, Any]:
    """Return whom the policy would take for a model, named by its path where it is behind another broker."""
    view = views.route(core, model, core.exchange.chooser.route(model, affinity))
    chosen = core.registry.by_name.get(view["worker"])
    left_s = _PASSED_ON * within_s
    if chosen is None or not chosen.is_broker or left_s < LEAST_S:
        return view

    def finish(answers: Mapping[str, Answer]) -> dict[str, Any]:
        answer = answers.get(chosen.name)
        there = answer.result.get("worker") if isinstance(answer, Reply) and isinstance(answer.result, dict) else None
        return {**view, "worker": name_below(chosen.name, there if isinstance(there, str) else "")}

    return Errand(within_s, finish, ((chosen, "route", {"model": model, "affinity": affinity, "within_s": left_s}),))


def relayed(child: WorkerSession, method: str, arguments: Mapping[str, Any], within_s: float) -> Errand:
    """Return the errand that has a broker below answer a query about one of its workers.

    Args:
        child: the broker's session.
        method: what it is asked.
        arguments: with what; `worker` as it is called there.
        within_s: how long its answer is waited for.
    """
    asked = {**arguments, "within_s": max(LEAST_S, _PASSED_ON * within_s)}

    def finish(answers: Mapping[str, Answer]) -> Any:
        answer = answers.get(child.name)
        if answer is None:
            message = f"broker {child.name} did not answer within {within_s:g} s; it may do what it was told yet"
            raise WorkerLostError(message, retryable=True)
        if isinstance(answer, Error):
            message = f"{child.name}: {answer.message}"
            raise exception_for(answer.code, message, retryable=answer.retryable, retry_after_s=answer.retry_after_s)
        result = answer.result
        if isinstance(result, Mapping) and isinstance(result.get("worker"), str):
            return {**result, "worker": name_below(child.name, result["worker"])}
        return result

    return Errand(within_s, finish, ((child, method, asked),))


def _asks(core: BrokerCore, method: str, within_s: float) -> tuple[tuple[WorkerSession, str, Mapping[str, Any]], ...]:
    left_s = _PASSED_ON * within_s
    if left_s < LEAST_S:
        return ()
    arguments = {"tree": True, "within_s": left_s}
    children = sorted((worker for worker in core.registry if worker.is_broker), key=lambda worker: worker.name)
    return tuple((child, method, arguments) for child in children)
