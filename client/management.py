"""What a client can ask a broker and have it do, once for both kinds of client.

The two differ in how an answer comes, not in what is asked: `Client` returns it, `AsyncClient` something to await.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from ..protocol.errors import BadRequestError, ProtocolError
from .affinity import session_affinity

#: What a method that returns a map of figures returns, and one that returns a list of them.
AnswerT_co = TypeVar("AnswerT_co", covariant=True)
RowsT_co = TypeVar("RowsT_co", covariant=True)


class Management(ABC, Generic[AnswerT_co, RowsT_co]):
    """The management methods.

    Each of them raises

    - NoBrokerError: no broker answered within the connect timeout;
    - DeadlineError: the broker did not answer within the query timeout;
    - BrokerLostError: the connection broke before the answer;
    - BadRequestError: an argument is not valid, or names a worker or policy that there is not; the message says more.

    Those that change something raise ForbiddenError where the broker cannot tell administrators from others. `worker`
    is a name that `workers()` lists; one behind other brokers is named by its path (`west/gpu-3`), and for it they
    raise WorkerLostError when a broker on the way does not answer.
    """

    def models(self, *, order: str | None = None) -> RowsT_co:
        """Return the models that are served.

        Args:
            order: `name`, or `internvl` for the rule of InternVL's controller; None for what the broker was started
                with.
        """
        return self._rows("models", order=order)

    def workers(self, *, tree: bool = False) -> RowsT_co:
        """Return the workers with their load.

        Args:
            tree: after each broker that is registered as a worker, also those behind it, named by their path, with
                `depth`. Where such a broker does not answer within a second, its row has `answered` false.
        """
        return self._rows("workers", tree=tree or None)

    def status(self, *, tree: bool = False) -> AnswerT_co:
        """Return the broker's own figures.

        Args:
            tree: also, as `tree`, the sums over it and all brokers below it.
        """
        return self._get("status", tree=tree or None)

    def route(self, model: str, *, session: str | None = None) -> AnswerT_co:
        """Return whom the broker would give a request for this model now.

        Args:
            model: the model's name, one of `models()`.
            session: as for `generate`: requests of one session go to one worker where the policy cares for that.

        Returns:
            `worker` (None where nobody takes requests), `policy`, `candidates`: how many have a free slot,
            `considered`: the best of them with what the policy looks at, `waiting`: requests that wait for the model.

        Raises:
            ModelNotFoundError: no worker serves the model.
            TokenmqError: as all of these methods.
        """
        return self._get("route", model=model, affinity=_affinity(session))

    def refresh(self) -> AnswerT_co:
        """Have the broker look for every worker at once, and drop those that are gone.

        Returns:
            `workers`: how many there are; `dropped`: the names of those that were gone.
        """
        return self._get("refresh")

    def remove(self, worker: str) -> AnswerT_co:
        """End a worker's session and tell it not to come back; its requests go on at others.

        Returns:
            `worker`, and `in_flight`: requests that it had from this broker.
        """
        return self._get("remove", worker=worker)

    def drain(self, worker: str, *, grace_s: float | None = None, stay: bool = False) -> AnswerT_co:
        """Have a worker finish what it holds and stop; what is left after the grace time goes on at other workers.

        Args:
            worker: its name.
            grace_s: seconds; None for the worker's own.
            stay: it does not stop, and only gets no new requests from this broker: until `undrain`, also when it
                registers again.

        Returns:
            `worker`, and `in_flight`: requests that this broker has there.
        """
        return self._get("drain", worker=worker, grace_s=grace_s, stay=stay or None)

    def undrain(self, worker: str) -> AnswerT_co:
        """Take a drain back, of either kind; a worker that has been told to stop goes on if it is still there.

        Returns:
            `worker`; `held`: it was to stay without requests; `told`: it was asked not to stop.
        """
        return self._get("undrain", worker=worker)

    def set_policy(self, policy: str) -> AnswerT_co:
        """Have the broker choose workers by another policy from now on, until it is started again.

        Returns:
            `policy`, and the one `before`.
        """
        return self._get("set_policy", policy=policy)

    def set_speed(self, worker: str, speed: float | None) -> AnswerT_co:
        """Have the broker reckon with this speed of a worker, also when that registers again.

        Args:
            worker: its name.
            speed: tokens a second of one stream; only relations between workers count. None for what the worker
                tells, or the broker measures.

        Returns:
            `worker`, `speed`: what is reckoned with now, None of one that is gone, `speed_set`.
        """
        return self._get("set_speed", worker=worker, speed=speed)

    @abstractmethod
    def query(self, method: str, **arguments: Any) -> Any:
        """Ask any management question; return plain data. Raises as all of these methods."""

    def _get(self, method: str, **arguments: Any) -> AnswerT_co:
        return self.query(method, **_given(arguments))  # type: ignore[no-any-return]

    def _rows(self, method: str, **arguments: Any) -> RowsT_co:
        return self.query(method, **_given(arguments))  # type: ignore[no-any-return]


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    # What is left out is the broker's to decide, and older brokers know fewer arguments.
    return {name: value for name, value in arguments.items() if value is not None}


def _affinity(session: str | None) -> str | None:
    if session is None:
        return None
    try:
        return session_affinity(session)
    except ProtocolError as error:
        raise BadRequestError(f"session: {error.message}") from error
