"""The workers that may take a request, always at hand.

Workers that serve the same models in the same way are one group. A group keeps those with a free slot in a list, for
policies that draw or compare, and in a heap by the policy's rank, for those that want the least: a worker that
changes is put in once more, and what is out of date is passed over when it comes up. So a decision takes logarithmic
time, and a worker's change, too, however many models it serves. (It is linear in the number of a model's groups: as
many as there are different sets of models with it, and hundreds would be odd.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from .dispatch import Policy

if TYPE_CHECKING:
    from .registry import WorkerSession

#: What is out of date may outnumber the workers so often before a heap is made anew.
_STALE = 4
_STALE_SPARE = 64
_NOBODY: frozenset[WorkerSession] = frozenset()


@dataclass(slots=True, eq=False)
class Place:
    """Where a worker stands in its group.

    Attributes:
        group: the group; None before it is in one.
        index: its index in the list of free workers; -1 where it has no free slot.
        version: counts its changes: entries of the heap with another one are out of date.
        number: which worker of the pool it was when it came: of equal ones the one that came first is taken.
        counted: it counts to its group's `ready`.
        spare: its breaker suspends it, and it would be free.
    """

    group: Group | None = None
    index: int = -1
    version: int = 0
    number: int = 0
    counted: bool = False
    spare: bool = False


#: Rank, last use, the worker's number, version, worker: two entries differ before their workers would be compared.
_Entry = tuple[float, int, int, int, "WorkerSession"]


@dataclass(slots=True, eq=False)
class Group:
    """Workers that serve the same models in the same way.

    Attributes:
        serves: the models' names, each with whether the workers resume it.
        workers: all of them, in whatever state, by connection.
        free: those that may get a request now.
        spare: those that might, did their breakers not suspend them.
        ready: how many take requests, now or when a slot is free, and are not suspended.
    """

    serves: frozenset[tuple[str, bool]]
    workers: dict[bytes, WorkerSession] = field(default_factory=dict)
    free: list[WorkerSession] = field(default_factory=list)
    spare: dict[bytes, WorkerSession] = field(default_factory=dict)
    ready: int = 0
    _heap: list[_Entry] = field(default_factory=list)

    def put(self, worker: WorkerSession, policy: Policy) -> None:
        """File a worker of this group anew after a change: whether it is free, and its rank."""
        place = worker.place
        place.version += 1
        suspended, takes = worker.breaker.suspends, worker.takes_requests
        counted = takes and not suspended
        if counted is not place.counted:
            self.ready += counted - place.counted
            place.counted = counted
        free = takes and worker.load < worker.ready.slots
        spare = free and suspended
        if spare is not place.spare:
            place.spare = spare
            if spare:
                self.spare[worker.peer] = worker
            else:
                del self.spare[worker.peer]
        if free and counted:
            if place.index < 0:
                place.index = len(self.free)
                self.free.append(worker)
            self._push(worker, policy)
        elif place.index >= 0:
            self._take_off(worker)

    def drop(self, worker: WorkerSession) -> None:
        """Forget a worker of this group. Its entries in the heap are out of date by their version."""
        del self.workers[worker.peer]
        if worker.place.index >= 0:
            self._take_off(worker)
        if worker.place.spare:
            del self.spare[worker.peer]
        self.ready -= worker.place.counted
        worker.place = Place(version=worker.place.version + 1, number=worker.place.number)

    def least(self, excluded: frozenset[WorkerSession]) -> _Entry | None:
        """Return the entry of the worker of the least rank; None where none is free but the excluded ones."""
        passed = []
        found = None
        while self._heap:
            entry = self._heap[0]
            if entry[3] != entry[4].place.version or entry[4].place.index < 0:
                heappop(self._heap)
            elif entry[4] in excluded:
                passed.append(heappop(self._heap))
            else:
                found = entry
                break
        for entry in passed:
            heappush(self._heap, entry)
        return found

    def rank_anew(self, policy: Policy) -> None:
        """Rank the free workers by another policy, or after something that concerns them all."""
        self._heap = [_entry(worker, policy) for worker in self.free]
        heapify(self._heap)

    def _take_off(self, worker: WorkerSession) -> None:
        """Take a worker off the list of the free ones; the last one of them moves up to its place."""
        place, last = worker.place, self.free.pop()
        if last is not worker:
            self.free[place.index] = last
            last.place.index = place.index
        place.index = -1

    def _push(self, worker: WorkerSession, policy: Policy) -> None:
        if len(self._heap) > _STALE * len(self.free) + _STALE_SPARE:
            self.rank_anew(policy)
        else:
            heappush(self._heap, _entry(worker, policy))


def _entry(worker: WorkerSession, policy: Policy) -> _Entry:
    place = worker.place
    return policy.rank(worker), worker.last_used, place.number, place.version, worker


class Free:
    """The workers of some groups that may take a request now: what a policy chooses from."""

    def __init__(self, groups: Iterable[Group], excluded: frozenset[WorkerSession]) -> None:
        """Make the view; it holds until a worker changes."""
        self._groups = [group for group in groups if group.free]
        self._excluded = excluded

    def __bool__(self) -> bool:
        """Tell whether there is one."""
        if not self._excluded:
            return bool(self._groups)
        return any(group.least(self._excluded) is not None for group in self._groups)

    def __len__(self) -> int:
        """Return how many there are."""
        excluded = sum(worker.place.index >= 0 and worker.place.group in self._groups for worker in self._excluded)
        return sum(len(group.free) for group in self._groups) - excluded

    def __contains__(self, worker: WorkerSession) -> bool:
        """Tell whether a worker is one of them, without a look at the others."""
        place = worker.place
        return place.index >= 0 and place.group in self._groups and worker not in self._excluded

    def __iter__(self) -> Iterator[WorkerSession]:
        """Go through them."""
        return (worker for group in self._groups for worker in group.free if worker not in self._excluded)

    def __getitem__(self, index: int) -> WorkerSession:
        """Return one, by a number from 0."""
        if self._excluded or index < 0:
            return list(self)[index]
        for group in self._groups:
            if index < len(group.free):
                return group.free[index]
            index -= len(group.free)
        raise IndexError("no worker has this number")

    def least(self) -> WorkerSession:
        """Return the one of the least rank; of several the one that was used longest ago, or came first."""
        if len(self._groups) == 1 and (only := self._groups[0].least(self._excluded)) is not None:
            return only[4]
        return min(entry for group in self._groups if (entry := group.least(self._excluded)) is not None)[4]


class Spare:
    """The workers whose breakers are open, where a model has no others: the same view, in linear time."""

    def __init__(self, workers: list[WorkerSession], policy: Policy) -> None:
        """Make the view of these."""
        self._workers = workers
        self._policy = policy

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._workers)

    def __iter__(self) -> Iterator[WorkerSession]:
        """Go through them."""
        return iter(self._workers)

    def __getitem__(self, index: int) -> WorkerSession:
        """Return one, by a number from 0."""
        return self._workers[index]

    def least(self) -> WorkerSession:
        """Return the one of the least rank; of several the one that was used longest ago, or came first."""
        return min(self._workers, key=lambda worker: _entry(worker, self._policy))


class Pool:
    """All groups, by model."""

    def __init__(self, policy: Policy) -> None:
        """Have no workers yet."""
        self.policy = policy
        #: Workers that changed and were not filed anew: that is put off until somebody asks, since most workers that
        #: end a request get the next one.
        self._changed: dict[WorkerSession, None] = {}
        self._groups: dict[frozenset[tuple[str, bool]], Group] = {}
        self._by_model: dict[str, list[Group]] = {}
        self._joined = 0

    def join(self, worker: WorkerSession) -> None:
        """Take a worker in; it must be in no group."""
        serves = frozenset((info.name, info.resumes) for info in worker.ready.models)
        group = self._groups.get(serves)
        if group is None:
            group = self._groups[serves] = Group(serves)
            for model in {name for name, _ in serves}:
                self._by_model.setdefault(model, []).append(group)
        group.workers[worker.peer] = worker
        worker.place.group = group
        if not worker.place.number:  # one that changes what it serves keeps its number
            self._joined += 1
            worker.place.number = self._joined
        group.put(worker, self.policy)

    def leave(self, worker: WorkerSession) -> None:
        """Let a worker go."""
        group = worker.place.group
        assert group is not None
        self._changed.pop(worker, None)
        group.drop(worker)
        if not group.workers:
            del self._groups[group.serves]
            for model in {name for name, _ in group.serves}:
                self._by_model[model].remove(group)
                if not self._by_model[model]:
                    del self._by_model[model]

    def changed(self, worker: WorkerSession) -> None:
        """File a worker anew before the next question, since its load, state, speed or breaker has changed."""
        if worker.place.group is not None:
            self._changed[worker] = None

    def _settle(self) -> None:
        changed, self._changed = self._changed, {}
        for worker in changed:
            group = worker.place.group
            assert group is not None
            group.put(worker, self.policy)

    def rank_anew(self, policy: Policy | None = None) -> None:
        """Rank all workers, by another policy where one is given."""
        if self._changed:
            self._settle()
        self.policy = policy or self.policy
        for group in self._groups.values():
            group.rank_anew(self.policy)

    def models(self) -> Iterable[str]:
        """Return the names of all models that are served."""
        return self._by_model

    def groups(self, model: str, *, resuming: bool = False) -> list[Group]:
        """Return the groups whose workers serve a model, or those that can resume it."""
        groups = self._by_model.get(model, [])
        return [group for group in groups if (model, True) in group.serves] if resuming else groups

    def anyone_free(self, model: str) -> bool:
        """Tell whether a worker of the model has a free slot; it may still be none for a certain request."""
        if self._changed:
            self._settle()
        return any(group.free or group.spare for group in self._by_model.get(model, ()))

    def candidates(
        self, model: str, *, resuming: bool, avoided: Collection[WorkerSession], strictly: bool = False
    ) -> Free | Spare:
        """Return the workers that may take a request now: none, or what a policy may choose from.

        A worker whose breaker is open may, if the model has no other that is ready. So may one that is avoided,
        unless it is `strictly`: while there is another one, the request waits for that one's slot.
        """
        if self._changed:
            self._settle()
        groups = self.groups(model, resuming=resuming)
        shunned = frozenset(worker for worker in avoided if worker.place.group in groups) if avoided else _NOBODY
        ready = groups[0].ready if len(groups) == 1 else sum(group.ready for group in groups)
        if not ready:
            spare = [worker for group in groups for worker in group.spare.values()]
            others = [worker for worker in spare if worker not in shunned]
            able = sum(worker.takes_requests for group in groups for worker in group.workers.values())
            # All are suspended. Those that are not avoided and have no slot at the moment are waited for.
            waited_for = able > sum(worker.takes_requests for worker in shunned)
            return Spare(others if strictly or waited_for else spare, self.policy)
        if shunned and not strictly and ready <= sum(worker.place.counted for worker in shunned):
            shunned = _NOBODY
        return Free(groups, shunned)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one does not hold.
        """
        if self._changed:
            self._settle()
        for serves, group in self._groups.items():
            assert group.serves == serves
            assert group.workers, "a group without workers"
            suspended = {peer for peer, worker in group.workers.items() if worker.breaker.suspends}
            free = {peer for peer, worker in group.workers.items() if worker.free > 0}
            assert {worker.peer for worker in group.free} == free - suspended, "who is free"
            assert group.spare.keys() == free & suspended, "who is spare"
            assert all(group.free[worker.place.index] is worker for worker in group.free)
            counted = [worker for worker in group.workers.values() if worker.place.counted]
            assert group.ready == len(counted)
            assert all(worker.takes_requests and worker.peer not in suspended for worker in counted)
            assert all(worker.place.group is group for worker in group.workers.values())
            ranked = {entry[4].peer for entry in group._heap if entry[3] == entry[4].place.version}
            assert ranked >= free - suspended, "a free worker that the heap does not know"
            least = group.least(frozenset())
            assert (least is None) == (not group.free)
            assert least is None or least[0] == self.policy.rank(least[4]), "a rank that is out of date"
            for model, _ in serves:
                assert group in self._by_model[model]
