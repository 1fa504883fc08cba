"""What an echo may bring: the prompt's logprobs come in one chunk, which must fit one message."""

from __future__ import annotations

from ...protocol.errors import BadRequestError
from ...protocol.limits import MAX_CONTAINERS
from ...protocol.payload import Generation

#: Arrays of one echo: one for each alternative of each token and two around them. Others stand in the same message.
MAX_ECHO_ARRAYS = MAX_CONTAINERS // 2


def check_echo(generation: Generation, prompt_tokens: int) -> None:
    """Check that the logprobs of a prompt can be sent.

    Raises:
        BadRequestError: they are too many.
    """
    logprobs = generation.sampling.logprobs
    if not generation.echo or logprobs is None:
        return
    most = MAX_ECHO_ARRAYS // (logprobs + 2)
    if prompt_tokens > most:
        raise BadRequestError(
            f"an echo with {logprobs} logprobs has room for a prompt of {most} tokens, this one has {prompt_tokens}: "
            "ask for fewer logprobs"
        )
