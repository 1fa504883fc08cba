"""What a request gives as its prompt, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....protocol.errors import BadRequestError
from ....protocol.payload import Generation
from .devices import first_line

#: Characters for each token of the context, above which only a prompt's head is tokenised at first. Text has about
#: four to a token.
HEAD_CHARS = 16


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
            ids = self.known(generation.token_ids)
        elif generation.messages is not None:
            ids = self.known(self._chat(generation.messages))
        else:
            ids = self.known(self._tokens(generation.prompt or ""))
        if not ids:
            raise BadRequestError(f"the prompt has no tokens for model {self._name!r}")
        if len(ids) >= self._context:
            raise BadRequestError(
                f"the prompt has {len(ids)} tokens; model {self._name!r} has a context of {self._context}, "
                "and at least one token of it is needed for the answer"
            )
        return ids

    def known(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids, all of which the model knows.

        Raises:
            BadRequestError: it does not know one.
        """
        highest = max(token_ids, default=0)
        if highest >= self._vocabulary or min(token_ids, default=0) < 0:
            unknown = next(token for token in token_ids if not 0 <= token < self._vocabulary)
            raise BadRequestError(
                f"token id {unknown} is unknown to model {self._name!r}: its ids end at {self._vocabulary - 1}"
            )
        return token_ids

    def _tokens(self, text: str, **how: Any) -> tuple[int, ...]:
        # A head that has far too many tokens tells enough: all running rows stand still while a text is tokenised,
        # and megabytes take seconds. What follows the head can merge with its last tokens, never with half of them.
        head, most = self._context * HEAD_CHARS, 2 * self._context
        if len(text) > head and len(self._tokenise(text[:head], **how)) > most:
            raise BadRequestError(
                f"the prompt has more than {most} tokens; model {self._name!r} has a context of {self._context}"
            )
        return self._tokenise(text, **how)

    def _tokenise(self, text: str, **how: Any) -> tuple[int, ...]:
        try:
            # `verbose` off: the tokenizer would log a warning for what is answered here with an error.
            return tuple(self._tokenizer(text, verbose=False, **how).input_ids)
        except Exception as error:  # such as half a surrogate pair, which is in no encoding
            raise BadRequestError(
                f"the tokenizer of model {self._name!r} rejects the prompt: {first_line(error)}"
            ) from error

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if self._tokenizer.chat_template is None:
            raise BadRequestError(f"model {self._name!r} has no chat template: send a prompt instead of messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates are programs, and fail in their own ways
            raise BadRequestError(
                f"the chat template of model {self._name!r} rejects the messages: {first_line(error)}"
            ) from error
        return self._tokens(text, add_special_tokens=False)  # the template writes its own
