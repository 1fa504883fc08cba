"""Brokers below brokers, seen from above: what a worker behind one is called, and where a request has been.

A worker's name grows by its broker's with each hop towards the client: `gpu-3`, then `west/gpu-3`. So whatever names
it, errors, decisions or the workers that a request avoids, finds its way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ..protocol.limits import MAX_AVOIDED, MAX_HOPS, MAX_NAME_CHARS
from ..protocol.messages import Decision, Error, Finish

_SEPARATOR = "/"


def name_below(child: str, worker: str) -> str:
    """Return what a worker behind a broker is called here; the broker's own name where it names none."""
    # Eight of the longest names are too long together, and a message that has them would be malformed.
    return f"{child}{_SEPARATOR}{worker}"[:MAX_NAME_CHARS] if worker else child


def name_there(child: str, worker: str) -> str:
    """Return what a worker is called at the broker that it is behind; "" where it is not behind that one."""
    prefix = child + _SEPARATOR
    return worker.removeprefix(prefix) if worker.startswith(prefix) else ""


def parents_of(worker: str) -> Iterator[str]:
    """Go through what a broker that a worker is behind may be called: names may have slashes of their own."""
    end = worker.find(_SEPARATOR)
    while end >= 0:
        yield worker[:end]
        end = worker.find(_SEPARATOR, end + 1)


def avoid_below(child: str, avoid: Iterable[str]) -> tuple[str, ...]:
    """Return, of the workers that a request avoids, those behind a broker, as they are called there."""
    prefix = child + _SEPARATOR
    found = sorted(name[len(prefix) :] for name in avoid if name.startswith(prefix) and name != prefix)
    return tuple(found[:MAX_AVOIDED])


def answer_from(child: str, answer: Finish | Error) -> Finish | Error:
    """Return the answer of a broker below as it is told here: all names in it have grown."""
    worker = name_below(child, answer.worker)
    if isinstance(answer, Error) or not answer.timings.routing:
        return replace(answer, worker=worker)
    routing = tuple(_decision_from(child, decision) for decision in answer.timings.routing)
    return replace(answer, worker=worker, timings=replace(answer.timings, routing=routing))


def _decision_from(child: str, decision: Decision) -> Decision:
    considered = tuple(replace(each, worker=name_below(child, each.worker)) for each in decision.considered)
    return replace(decision, worker=name_below(child, decision.worker), considered=considered)


def loop_in(path: tuple[str, ...], broker: str) -> str | None:
    """Tell a person what is wrong with a request that has come by these brokers to this one; None for nothing."""
    if broker in path:
        return "the request has passed this broker before: brokers are registered at one another in a circle"
    if len(path) >= MAX_HOPS:
        return f"the request has passed {len(path)} brokers, at most {MAX_HOPS} are allowed"
    return None
