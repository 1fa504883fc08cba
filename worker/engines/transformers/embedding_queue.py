"""Which texts go into a forward together. Pure: no tensors, no clock.

At most `slots` jobs run; those of the highest priority that came first. A step begins with a text of the job whose
turn it is, so that no job waits for the end of another one's many texts, and takes along, from all running jobs, the
texts nearest to it in length, as many as fit into the budget of padded tokens. Texts that would be padded to more
than twice their length stay for another step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

#: Tokens up to which padding costs nothing worth a step of its own.
SHORT_TOKENS = 16
#: Rows of a step: their vectors leave the worker in one message.
MAX_ROWS = 256


@dataclass(slots=True, eq=False)
class TextsJob:
    """A request's texts.

    Attributes:
        ticket: the engine's number for it.
        priority: those with a greater one go first.
        texts: the token ids of each text.
        submitted_at: when it came, in seconds.
        begun_at: when its first text went into a forward; None before that.
        pending: numbers of the texts that are still to be done, by their length.
        left: how many have no vector yet.
        turn: the step that last began with one of its texts, or that it came to run in.
    """

    ticket: int
    priority: int
    texts: tuple[tuple[int, ...], ...]
    submitted_at: float = 0.0
    begun_at: float | None = None
    pending: list[int] = field(init=False)
    left: int = field(init=False)
    turn: int = 0

    def __post_init__(self) -> None:
        """Sort the texts."""
        self.pending = sorted(range(len(self.texts)), key=self.tokens)
        self.left = len(self.texts)

    def tokens(self, number: int) -> int:
        """Return how many tokens a text has."""
        return len(self.texts[number])

    @property
    def prompt_tokens(self) -> int:
        """How many tokens all texts have."""
        return sum(map(len, self.texts))

    def near(self, tokens: int) -> list[int]:
        """Return the pending texts nearest to that length on either side, as many as a step could take."""
        middle = bisect_left(self.pending, tokens, key=self.tokens)
        return self.pending[max(0, middle - MAX_ROWS) : middle + MAX_ROWS]


@dataclass(frozen=True, slots=True)
class Text:
    """A text in a forward: number `number` of a job."""

    job: TextsJob
    number: int

    @property
    def ids(self) -> tuple[int, ...]:
        """Its token ids."""
        return self.job.texts[self.number]


class EmbeddingQueue:
    """The engine's jobs.

    Attributes:
        slots: most jobs that may run; those that ran when it was lowered go on.
        budget: most padded tokens of a step; one text alone may have more.
        running: jobs whose texts go into forwards.
        waiting: jobs that came when no more could run, the next one first.
    """

    def __init__(self, slots: int, budget: int) -> None:
        """Queue for so many jobs at a time, and so many padded tokens a step, both 1 or more."""
        self.slots = slots
        self.budget = budget
        self.running: list[TextsJob] = []
        self.waiting: list[TextsJob] = []
        self._steps = 0

    def add(self, job: TextsJob) -> None:
        """Take a new job, with one text or more."""
        self.waiting.append(job)
        self.waiting.sort(key=lambda other: -other.priority)  # stable: the order of arrival stays

    def find(self, ticket: int) -> TextsJob | None:
        """Return the job of a ticket, or None."""
        return next((job for job in chain(self.running, self.waiting) if job.ticket == ticket), None)

    def remove(self, job: TextsJob) -> None:
        """Forget a job that has ended."""
        (self.running if job in self.running else self.waiting).remove(job)

    def clear(self) -> None:
        """Forget all jobs."""
        self.running.clear()
        self.waiting.clear()

    def take(self) -> list[Text]:
        """Let waiting jobs run, and take the texts of a step; none where there are no jobs."""
        self._admit()
        with_texts = [job for job in self.running if job.pending]
        if not with_texts:
            return []
        first = min(with_texts, key=lambda job: (-job.priority, job.turn))
        self._steps += 1
        first.turn = self._steps
        # The longest, since what a long text leaves of the budget goes to its like.
        chosen = self._company(Text(first, first.pending[-1]), with_texts)
        for job in with_texts:
            gone = {text.number for text in chosen if text.job is job}
            if gone:
                job.pending = [number for number in job.pending if number not in gone]
        return chosen

    def _admit(self) -> None:
        free = max(0, self.slots - len(self.running))
        for job in self.waiting[:free]:
            job.turn = self._steps  # behind those that have waited for their turn: newcomers must not starve them
            self.running.append(job)
        del self.waiting[:free]

    def _company(self, first: Text, jobs: Sequence[TextsJob]) -> list[Text]:
        """Return the texts to go with the first one, and that itself."""
        aim = len(first.ids)
        near = [Text(job, number) for job in jobs for number in job.near(aim)]
        near.sort(key=lambda text: (-text.job.priority, abs(len(text.ids) - aim)))
        chosen, shortest, longest = [first], aim, aim
        for text in near:
            low, high = min(shortest, len(text.ids)), max(longest, len(text.ids))
            too_wide = high > max(SHORT_TOKENS, 2 * low)
            if text == first or too_wide or (len(chosen) + 1) * high > self.budget:
                continue
            chosen.append(text)
            shortest, longest = low, high
            if len(chosen) == MAX_ROWS:
                break
        return chosen

    def validate(self) -> None:
        """Check every invariant that holds between steps.

        Raises:
            AssertionError: one does not.
        """
        everyone = [*self.running, *self.waiting]
        _demand(len({job.ticket for job in everyone}) == len(everyone), "a ticket is there twice")
        for job in everyone:
            lengths = [job.tokens(number) for number in job.pending]
            _demand(lengths == sorted(lengths), "pending texts are not in the order of their lengths")
            _demand(len(set(job.pending)) == job.left > 0, "a job is done, or has lost a text")
        for job in self.waiting:
            _demand(job.begun_at is None and job.left == len(job.texts), "a waiting job was begun")
        _demand(
            all(one.priority >= other.priority for one, other in zip(self.waiting, self.waiting[1:], strict=False)),
            "a waiting job stands before one of a higher priority",
        )


def _demand(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
