"""The Engine interface: what a worker needs from whatever generates tokens.

An engine lives in one thread, the engine thread, which calls all its methods; it needs no locks. The thread calls
`load` once, then `submit` and `cancel` as requests come and go, and `step` as long as there is work. A step may take
as long as it must: heartbeats are sent by another thread.

An engine never waits for a reader. It generates at its own pace, and whoever called keeps what the reader has no
credit for.

An engine may be able to resume: to continue a completion that another worker has begun, as if it had generated those
tokens itself. It says so by ModelInfo(resumes=True) in what `load` returns; to others no job with a `prior` is given.
For a job whose `generation.prior` is there,

- the outputs begin behind the prior: the first Tokens carries the token at position len(prior.token_ids);
- positions, `max_tokens` and Done.completion_tokens count from the begin of the completion, the prior included; what
  else depends on a position or on the tokens so far (noise, stop strings, a character's first bytes) goes on, too;
- the reader has `prior.text_chars` characters of the text: the first text that is output begins behind these. It may
  begin with what the tokens of the prior have completed, since text that was on its way was lost;
- where the last token of the prior ends the completion (a stop token, a stop string that is complete, max_tokens),
  `submit` returns what is left of the text, as a Tokens without ids if there is any, and Done;
- a prior that cannot be the begin of this completion is Failed with bad_request: one that goes on behind its own end,
  one with tokens that the model does not have, one whose text is shorter than `text_chars`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

from ...protocol.limits import NORMAL_PRIORITY
from ...protocol.messages import Details, FinishReason, ModelInfo
from ...protocol.payload import Generation
from ...protocol.values import value


@value
class Job:
    """A request as an engine sees it.

    Attributes:
        ticket: the worker's own number for the request; every output carries it.
        model: the served name that was asked for, one of the engine's models.
        generation: prompt and sampling, valid in form; what only the model can judge (prompt length, chat template)
            the engine checks. With a `prior` the completion has begun elsewhere, see the module.
        attachments: raw bytes, such as images.
        priority: 0 to 9: where not all can run, those with a greater one do.
    """

    ticket: int
    model: str
    generation: Generation
    attachments: tuple[bytes, ...] = ()
    priority: int = NORMAL_PRIORITY


@value
class Tokens:
    """Tokens that a step brought for one request.

    Attributes:
        ticket: the request's.
        token_ids: one or more tokens, in order; or none, when only held-back text is released, or a vector comes.
        text: the text that they complete; may be empty inside a character or a possible stop string.
        index: which completion of the request, or which of its texts.
        details: logprobs or a vector, where the request asks for them.
    """

    ticket: int
    token_ids: tuple[int, ...]
    text: str
    index: int = 0
    details: Details | None = None


@value
class Done:
    """The request has ended well; nothing follows for its ticket.

    Attributes:
        ticket: the request's.
        reason: why.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens of the completion; those of a prior are among them.
        queue_s: seconds from `submit` until its prefill began.
        prefill_s: seconds from there to the first token.
        decode_s: seconds from the first token to the last.
    """

    ticket: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@value
class Failed:
    """The request has ended badly; nothing follows for its ticket. `code` is one of protocol.errors.ErrorCode."""

    ticket: int
    code: str
    message: str
    retryable: bool = False


Output: TypeAlias = Tokens | Done | Failed


@value
class EngineStats:
    """What an engine tells of itself; cheap, taken after every step.

    Attributes:
        running: requests in the batch.
        waiting: requests submitted and not in the batch yet.
        kv_use: part of the KV cache in use, 0 to 1.
        prefill_s: seconds spent on prompts since it was loaded.
        decode_s: seconds spent on further tokens since then.
        prompt_tokens: tokens of prompts that it has taken since then.
        cached_tokens: those of them that were found in a prefix cache.
        memory_used_bytes: the device's memory that is taken, by anybody; 0 where that is not known.
        memory_bytes: the device's memory.
    """

    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    memory_used_bytes: int = 0
    memory_bytes: int = 0


def _to_nobody(models: Sequence[ModelInfo]) -> None:
    """Stand in for `Engine.announce` where there is no worker."""


def _nobody_sleeps() -> None:
    """Stand in for `Engine.wake` there."""


class Engine(ABC):
    """What turns jobs into tokens; see the module for who calls what and when.

    Attributes:
        announce: put here by the worker before `load`. An engine that comes to serve other models than it loaded
            calls it with all that it serves then; any thread may do so. A job for a model that is gone may be on its
            way still: that is Failed with model_not_found, retryable. Jobs that it has end as they would have.
        wake: put here like `announce`. An engine to which tokens come while nobody steps it calls it, in any thread,
            when `step` has something to do; the engine thread then asks `next_step_in` anew.
    """

    #: The engine's name, shown to people.
    name: str
    announce: Callable[[Sequence[ModelInfo]], None] = staticmethod(_to_nobody)
    wake: Callable[[], None] = staticmethod(_nobody_sleeps)

    @abstractmethod
    def load(self) -> Sequence[ModelInfo]:
        """Load the model; may take minutes. Return the models that the engine serves.

        Raises:
            EngineLoadError: it cannot be loaded; the message tells a person why.
        """

    @abstractmethod
    def submit(self, job: Job) -> Sequence[Output]:
        """Take a job; it runs in coming steps.

        Returns:
            Nothing as a rule; one Failed when the job cannot run (prompt too long, no chat template); the rest of the
            text and Done where the prior is complete. Never raises for what a user sent.
        """

    @abstractmethod
    def cancel(self, ticket: int) -> Sequence[Output]:
        """End a job at once and free its place, in the batch or in the queue.

        Returns:
            Done with reason `cancelled`; nothing for a ticket that is not there (it may just have ended).
        """

    @abstractmethod
    def step(self) -> Sequence[Output]:
        """Advance all running jobs by one step; let waiting ones join first.

        Returns:
            What it brought, in order for each ticket.

        Raises:
            Exception: the engine failed as a whole; the worker fails all its jobs and reports it.
        """

    @abstractmethod
    def next_step_in(self) -> float | None:
        """Return seconds until `step` has something to do: 0 for now, None while there are no jobs."""

    @abstractmethod
    def reset(self) -> None:
        """Drop all jobs, after a step raised; the engine must be able to take new ones."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Return the engine's present figures."""

    def resize(self, slots: int) -> int:
        """Run at most `slots` jobs at a time from now on; those that run go on.

        Returns:
            How many it will run: fewer where it has no room for so many. As it stands here, for an engine without a
            bound of its own, it runs what comes.
        """
        return slots

    def close(self) -> None:  # noqa: B027 (most engines hold nothing that must be freed)
        """Free what the engine holds; called last."""


class EngineLoadError(Exception):
    """The engine or its model cannot be loaded; the message tells a person why."""
