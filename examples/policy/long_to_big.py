"""A policy of one's own: long prompts go to the largest workers, and so the others stay quick for short ones."""

from random import Random

from tokenmq.broker.dispatch import Candidate, Candidates, Job, Policy

LONG_TOKENS = 2_000


def choose(job: Job, workers: Candidates, random: Random) -> Candidate:
    """Take the worker with the most slots for a long prompt, the shortest queue for others."""
    if job.prompt_tokens < LONG_TOKENS:
        return workers.least()
    return max(workers, key=lambda worker: (worker.slots, -worker.cost))


LONG_TO_BIG = Policy(choose)
