"""What a request gives as its prompt, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....protocol.errors import BadRequestError
from ....protocol.payload import Generation
from .devices import first_line


class PromptReader:
    """Turns prompts into token ids that the model can take."""

    def __init__(self, tokenizer: Any, name: str, vocabulary: int, context: int) -> None:
        """Read prompts for one model.

        Args:
            tokenizer: a transformers tokenizer.
            name: the served name, for messages.
            vocabulary: token ids are below it.
            context: tokens that prompt and completion may have together.
        """
        self._tokenizer = tokenizer
        self._name = name
        self._vocabulary = vocabulary
        self._context = context

    def read(self, generation: Generation) -> tuple[int, ...]:
        """Return the prompt's token ids, one or more, with room for at least one token after them.

        Raises:
            BadRequestError: ids out of the vocabulary, no chat template, a template that rejects the messages, an
                empty prompt, or one too long.
        """
        if generation.token_ids is not None:
            ids = self._known(generation.token_ids)
        elif generation.messages is not None:
            ids = self._chat(generation.messages)
        else:
            # `verbose` off: the tokenizer would log a warning for what is answered here with an error.
            ids = tuple(self._tokenizer(generation.prompt or "", verbose=False).input_ids)
        if not ids:
            raise BadRequestError(f"the prompt has no tokens for model {self._name!r}")
        if len(ids) >= self._context:
            raise BadRequestError(
                f"the prompt has {len(ids)} tokens; model {self._name!r} has a context of {self._context}, "
                "and at least one token of it is needed for the answer"
            )
        return ids

    def _known(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        highest = max(token_ids, default=0)
        if highest >= self._vocabulary or min(token_ids, default=0) < 0:
            unknown = next(token for token in token_ids if not 0 <= token < self._vocabulary)
            raise BadRequestError(
                f"token id {unknown} is unknown to model {self._name!r}: its ids end at {self._vocabulary - 1}"
            )
        return token_ids

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise BadRequestError(f"model {self._name!r} has no chat template: send a prompt instead of messages")
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # templates are programs, and fail in their own ways
            raise BadRequestError(
                f"the chat template of model {self._name!r} rejects the messages: {first_line(error)}"
            ) from error
        return tuple(ids)
