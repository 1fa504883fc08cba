"""Tensor parallel: one model on several processes, by the plan that transformers has for it.

Each process holds its part of the weights and of the KV cache, and a forward needs all of them. Rank 0 is the worker;
what its batch does goes through a LeadingRunner, which first tells the followers. They repeat each call with their
own runner, and meet rank 0 inside the forward, where transformers' plan has them exchange sums.

A call that fails leaves the processes out of step: which of them had what done cannot be known. So there is no
second try; the worker ends, and its supervisor starts all of them anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from .cache import SlotCache
from .group import Group
from .runner import Runner

#: What a follower is told to do when the leader closes.
_STOP = "stop"
Arguments = ParamSpec("Arguments")
ResultT = TypeVar("ResultT")


class OutOfStepError(Exception):
    """A call failed on this process; what the others have done is not known.

    Whatever the cause was, no memory among them, it must not be taken for one after which another try helps.
    """


def _repeated(
    method: Callable[Concatenate[Any, Arguments], ResultT],
) -> Callable[Concatenate[LeadingRunner, Arguments], ResultT]:
    """Return a method that has the followers do the same."""

    @functools.wraps(method)
    def call(self: LeadingRunner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> ResultT:
        self.tell(method.__name__, *args, **kwargs)
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
            raise OutOfStepError(f"a call failed on rank 0 of {self.group.size}: {error}") from error

    return call


class LeadingRunner(Runner):
    """The runner of rank 0: what it is told to do, all processes do."""

    def __init__(self, model: Any, cache: SlotCache, group: Group, *, steady: bool = False) -> None:
        """Run `model` over `cache`, which the followers have in the same state."""
        super().__init__(model, cache, steady=steady)
        self.group = group
        self._problem: str | None = None

    def tell(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Have the followers make this call.

        Raises:
            OutOfStepError: a call has failed before, or a follower is gone.
        """
        if self._problem is not None:
            raise OutOfStepError(f"the processes of this worker are out of step: {self._problem}")
        try:
            self.group.tell([name, args, kwargs])
        except Exception as error:
            self.fail(error)
            raise OutOfStepError(f"a process of this worker is gone: {error}") from error

    def fail(self, error: Exception) -> None:
        """Make no further call."""
        self._problem = str(error)

    def close(self) -> None:
        """Let the followers end."""
        if self._problem is None:
            self.tell(_STOP)
        self.group.leave()

    extend = _repeated(Runner.extend)
    decode = _repeated(Runner.decode)
    replay = _repeated(Runner.replay)
    move = _repeated(Runner.move)
    restride = _repeated(Runner.restride)
    store = _repeated(Runner.store)
    recall = _repeated(Runner.recall)
    clear = _repeated(Runner.clear)


#: What a leader may tell: nothing else is looked up by name.
_CALLS: dict[str, Callable[..., Any]] = {
    name: getattr(Runner, name) for name, value in vars(LeadingRunner).items() if hasattr(value, "__wrapped__")
}


def follow(runner: Runner, group: Group) -> None:
    """Repeat the leader's calls until it closes.

    Raises:
        Exception: a call failed here, or the leader is gone: this process cannot go on.
    """
    while True:
        name, args, kwargs = group.hear()
        if name == _STOP:
            group.leave()
            return
        _CALLS[name](runner, *args, **kwargs)
