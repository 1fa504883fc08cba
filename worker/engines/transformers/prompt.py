"""What a request gives as its prompt, to token ids."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ....protocol.errors import BadRequestError
from ....protocol.payload import Generation
from .chat import ContentForms
from .devices import first_line
from .sequence import Prompt
from .vision import Vision

#: Characters for each token of the context, above which only a prompt's head is tokenised at first. Text has about
#: four to a token.
HEAD_CHARS = 16
#: Characters for each token above which a text is not tokenised in whole: only long runs of one character have so
#: many, and 4 million spaces take four seconds.
MOST_CHARS = 64
#: What `apply_chat_template` takes for itself, besides what it hands to the template.
_OWN_ARGUMENTS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}


class PromptReader:
    """Turns prompts into token ids that the model can take."""

    def __init__(
        self, tokenizer: Any, name: str, vocabulary: int, context: int, vision: Vision | None = None
    ) -> None:
        """Read prompts for one model.

        Args:
            tokenizer: a transformers tokenizer.
            name: the served name, for messages.
            vocabulary: token ids are below it.
            context: tokens that prompt and completion may have together.
            vision: its eyes, if it has any.
        """
        self._forms = ContentForms() if vision is None else ContentForms.of(tokenizer)
        self._vision = vision
        self._tokenizer = tokenizer
        self._name = name
        self._vocabulary = vocabulary
        self._context = context
        # The first call takes truncation and padding off the tokenizer, which must not fall into another's call.
        self._tokenise("", special=False)

    def read(self, generation: Generation, images: Sequence[bytes] = ()) -> Prompt:
        """Return the prompt: token ids, one or more, with room for at least one token after them, and their text.

        Args:
            generation: what is asked for.
            images: PNG, JPEG or WebP files, in the order of their places in the prompt.

        Raises:
            BadRequestError: ids out of the vocabulary, no chat template, a template that rejects the messages, images
                for a model without eyes, images that cannot be read or have no place in the prompt, an empty prompt,
                or one too long.
        """
        if images:
            self._check_images(generation)
        if generation.token_ids is not None:
            self._check_length(generation.token_ids)  # first: to decode a million for an echo takes a second
            ids = self.known(generation.token_ids)
            prompt = Prompt(ids, self._tokenizer.decode(ids) if generation.echo else "")
        elif generation.messages is not None:
            prompt = self._prompt(self._chat(generation), images, special=False)  # the template writes its own
        else:
            prompt = self._prompt(generation.prompt or "", images, special=True)
        self._check_length(prompt.token_ids)
        return prompt

    def _check_images(self, generation: Generation) -> None:
        if self._vision is None:
            raise BadRequestError(f"model {self._name!r} takes text only, no images")
        if generation.token_ids is not None:
            raise BadRequestError(
                "images cannot come with token ids, since only the model's processor knows how many tokens an image "
                "is: send a prompt or messages"
            )
        if generation.echo and generation.sampling.logprobs is not None:
            raise BadRequestError("the logprobs of a prompt with images cannot be told: leave echo or logprobs out")

    def _prompt(self, text: str, images: Sequence[bytes], *, special: bool) -> Prompt:
        self._refuse_endless(text, special=special)
        if images and self._vision is not None:
            return self._vision.read(text, images, special=special)
        if self._vision is not None:
            self._vision.check_marks(text, 0)
        return Prompt(self.known(self._tokenise(text, special=special)), text)

    def _check_length(self, ids: tuple[int, ...]) -> None:
        if not ids:
            raise BadRequestError(f"the prompt has no tokens for model {self._name!r}")
        if len(ids) >= self._context:
            raise BadRequestError(
                f"the prompt has {len(ids)} tokens; model {self._name!r} has a context of {self._context}, "
                "and at least one token of it is needed for the answer"
            )

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

    def _refuse_endless(self, text: str, *, special: bool) -> None:
        # A head that has far too many tokens tells enough: megabytes take seconds to tokenise. What follows the head
        # can merge with its last tokens, never with half of them.
        head, most = self._context * HEAD_CHARS, 2 * self._context
        if len(text) > head and len(self._tokenise(text[:head], special=special)) > most:
            raise BadRequestError(
                f"the prompt has more than {most} tokens; model {self._name!r} has a context of {self._context}"
            )
        if len(text) > self._context * MOST_CHARS:
            raise BadRequestError(
                f"the prompt has {len(text)} characters; model {self._name!r} has a context of {self._context} "
                f"tokens, and reads at most {MOST_CHARS} characters for each"
            )

    def _tokenise(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            # `verbose` off: the tokenizer would log a warning for what is answered here with an error.
            return tuple(self._tokenizer(text, verbose=False, add_special_tokens=special).input_ids)
        except Exception as error:  # such as half a surrogate pair, which is in no encoding
            raise BadRequestError(
                f"the tokenizer of model {self._name!r} rejects the prompt: {first_line(error)}"
            ) from error

    def _chat(self, generation: Generation) -> str:
        if self._tokenizer.chat_template is None:
            raise BadRequestError(f"model {self._name!r} has no chat template: send a prompt instead of messages")
        try:
            text: str = self._tokenizer.apply_chat_template(
                [self._message(message) for message in generation.messages or ()],
                tools=[dict(tool) for tool in generation.tools] or None,
                add_generation_prompt=True,
                tokenize=False,
                **self._arguments(generation.template),
            )
        except BadRequestError:
            raise
        except Exception as error:  # templates are programs, and fail in their own ways
            raise BadRequestError(
                f"the chat template of model {self._name!r} rejects the messages: {first_line(error)}"
            ) from error
        return text

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return a message in a form that the template takes."""
        content = message["content"]
        if self._vision is None and isinstance(content, list) and any(part["type"] != "text" for part in content):
            raise BadRequestError(f"model {self._name!r} takes text only, no images")
        mark = "" if self._vision is None else self._vision.mark
        return {**message, "content": self._forms.convert(content, mark)}

    @staticmethod
    def _arguments(given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the user's arguments of the template, none of which is the tokenizer's own."""
        taken = sorted(_OWN_ARGUMENTS & given.keys())
        if taken:
            raise BadRequestError(
                f"request.template: {', '.join(taken)} cannot be set, only a template's own arguments"
            )
        return given
