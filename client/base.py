"""What both kinds of client are: arguments to requests, and the connection's life."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic

from ..protocol.credit import WINDOW_TOKENS
from ..protocol.limits import NORMAL_PRIORITY
from .connection import Connection
from .defaults import (
    CONNECT_TIMEOUT_S,
    FIRST_TOKEN_TIMEOUT_S,
    INTER_TOKEN_TIMEOUT_S,
    MAX_ATTEMPTS,
    QUERY_TIMEOUT_S,
    RECOVERY_TIMEOUT_S,
)
from .embedwork import EmbedWork
from .events import Close
from .images import ImageSource
from .mailbox import Bell, Mailbox
from .request import DEFAULTS, SAMPLING, SOURCE, build_ask, build_submit, seeds
from .settings import settings_from
from .stream import StreamT_co


class BaseClient(ABC, Generic[StreamT_co]):
    """A client of one or several brokers. Any number of threads may use it at once."""

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        query_timeout_s: float = QUERY_TIMEOUT_S,
        window_tokens: int = WINDOW_TOKENS,
        name: str | None = None,
        heartbeat_s: float | None = None,
        resume: bool = True,
        max_attempts: int = MAX_ATTEMPTS,
        recovery_timeout_s: float = RECOVERY_TIMEOUT_S,
        queue_timeout_s: float | None = None,
        first_token_timeout_s: float | None = FIRST_TOKEN_TIMEOUT_S,
        inter_token_timeout_s: float | None = INTER_TOKEN_TIMEOUT_S,
        hedge_after_s: float | None = None,
        direct: str | Sequence[str] | None = None,
        server_key: str | Path | Sequence[str | Path] | None = None,
        key: str | Path | None = None,
    ) -> None:
        """Begin to connect, and do not wait for it.

        Args:
            endpoints: the broker's frontend, or those of several brokers, the preferred one first; None for
                tcp://127.0.0.1:5555. Requests go to the first that is there, and over to another when it dies.
            connect_timeout_s: how long a new request waits for a broker before it fails with NoBrokerError.
            query_timeout_s: how long a broker may take to answer models(), workers() and the like.
            window_tokens: tokens of one stream that may be under way or unread; a reader that stops gets no more.
            name: how brokers name this client to people; None for host and process id.
            heartbeat_s: a longer heartbeat interval than the broker's own, for machines that sleep.
            resume: repair what goes wrong: a request whose worker or broker has failed is submitted again with the
                tokens so far, and its stream goes on where it stopped. False: every failure is an exception at once.
            max_attempts: how many attempts of a request may fail at workers; the last failure is the exception.
            recovery_timeout_s: how long a request whose attempt has failed may be without a worker: with no broker,
                or refused by it (no worker, busy, draining) again and again.
            queue_timeout_s: how long an attempt may wait at the broker for a worker before it fails with
                QueueTimeoutError; None for no bound but the deadline.
            first_token_timeout_s: how long a worker that has the request may take for the first token before
                another attempt is made; after the last one it is FirstTokenTimeoutError. None for ever.
            inter_token_timeout_s: the same for every further token while the reader wants more, with
                InterTokenTimeoutError.
            hedge_after_s: how long a worker that has the request may take for the first token before a second
                worker is asked, too, if one is free; the first to answer goes on, the other one is cancelled. It
                costs what the slower one has computed, and cuts off the longest waits. None for no hedging.
            direct: take tokens from workers themselves, past the broker, where they offer it (`zmq-worker --direct`)
                and are in these networks: `"10.0.0.0/8"`, an address, a host's name, `"ipc"`, or several of them. No
                other worker is dialled, and what cannot be reached comes through the broker. None for never.
            server_key: the broker's public key, as 40 characters of Z85 or as the path of its file; several, one for
                each endpoint, where the brokers have different ones. None for the environment's
                TOKENMQ_CLIENT_SERVER_KEY, "" for no CURVE.
            key: the path of this client's secret key, made by `zmq-broker keys new`. None for the environment's
                TOKENMQ_CLIENT_KEY, "" for no CURVE.

        Raises:
            BadRequestError: an argument is not valid; the message names it.
            EndpointError: an endpoint is not valid.
        """
        self._settings = settings_from(
            endpoints,
            connect_timeout_s=connect_timeout_s,
            query_timeout_s=query_timeout_s,
            window_tokens=window_tokens,
            name=name,
            heartbeat_s=heartbeat_s,
            resume=resume,
            max_attempts=max_attempts,
            recovery_timeout_s=recovery_timeout_s,
            queue_timeout_s=queue_timeout_s,
            first_token_timeout_s=first_token_timeout_s,
            inter_token_timeout_s=inter_token_timeout_s,
            hedge_after_s=hedge_after_s,
            direct=direct,
            server_key=server_key,
            key=key,
        )
        self._connection = Connection(self._settings)
        # The thread holds the connection, not the client: a client that is forgotten without close() ends it, too.
        self._finalizer = weakref.finalize(self, self._connection.post, Close())

    def __repr__(self) -> str:
        """Return the endpoints."""
        return f"<{type(self).__name__} {', '.join(self._settings.endpoints)}>"

    def generate(
        self,
        model: str,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        images: Sequence[ImageSource] = (),
        echo: bool = False,
        max_tokens: int = DEFAULTS.max_tokens,
        min_tokens: int = DEFAULTS.min_tokens,
        temperature: float = DEFAULTS.temperature,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        min_p: float = DEFAULTS.min_p,
        repetition_penalty: float = DEFAULTS.repetition_penalty,
        presence_penalty: float = DEFAULTS.presence_penalty,
        frequency_penalty: float = DEFAULTS.frequency_penalty,
        logit_bias: Mapping[int, float] | None = None,
        bad_words: str | Sequence[str] = DEFAULTS.bad_words,
        seed: int | None = None,
        stop: str | Sequence[str] = DEFAULTS.stop,
        stop_token_ids: Sequence[int] = DEFAULTS.stop_token_ids,
        ignore_eos: bool = DEFAULTS.ignore_eos,
        logprobs: int | None = DEFAULTS.logprobs,
        json_schema: Mapping[str, Any] | str | None = DEFAULTS.json_schema,
        regex: str | None = DEFAULTS.regex,
        choice: Sequence[str] = DEFAULTS.choice,
        deadline_s: float | None = None,
        resume: bool | None = None,
        priority: int = NORMAL_PRIORITY,
        session: str | None = None,
        hedge_after_s: float | None = None,
        explain: bool = False,
    ) -> StreamT_co:
        """Continue a prompt. The request leaves at once; the stream is where its tokens arrive.

        Args:
            model: the model's name, one of `models()`.
            prompt: text to continue; or `token_ids`.
            token_ids: the same, already tokenised.
            images: what the prompt's image marks (`<image>`) stand for, in order: PNG, JPEG or WebP files, as bytes
                or paths.
            echo: the text begins with the prompt's; with `logprobs`, the first chunk has `prompt_logprobs`, too.
            max_tokens: most tokens to generate.
            min_tokens: only `max_tokens`, or a structure that is complete, ends the stream before it has so many
                tokens.
            temperature: 0 takes the likeliest token; higher is more random.
            top_k: only the k likeliest tokens; 0 for all.
            top_p: only the likeliest tokens that together have this probability; 1 for all.
            min_p: only tokens with at least this part of the likeliest one's probability; 0 for all.
            repetition_penalty: above 1, tokens that prompt or completion have are less likely to come again; 1 for
                none.
            presence_penalty: taken off the logits of tokens that the completion has; 0 for none.
            frequency_penalty: the same, times how often it has them.
            logit_bias: what is added to the logits of these tokens, by token id.
            bad_words: a string, or several, that must not come.
            seed: the same seed gives the same stream; None draws one.
            stop: a string, or several, that end the stream; they are not part of its text.
            stop_token_ids: tokens that end the stream, besides the model's own.
            ignore_eos: go on to `max_tokens` whatever the model's end tokens say.
            logprobs: tell the logprob of each token and of so many likeliest ones in its place, in `chunk.logprobs`;
                0 for the token's alone, None for none.
            json_schema: the text is JSON that this schema allows; a map, or its JSON text. At most one of it, `regex`
                and `choice` may be given.
            regex: the whole text matches this regular expression.
            choice: the text is one of these.
            deadline_s: seconds from now after which the answer is worth nothing; None for never.
            resume: whether what goes wrong is repaired; None for what the client was made with.
            priority: 0 to 9: while workers are busy, requests of a greater one are served before others.
            session: a name that requests have in common which one worker serves best, because it has what they begin
                with in its cache; None for the beginning of the prompt. Brokers with the policy `prefix-affinity`
                go by it.
            hedge_after_s: seconds that a worker may take for the first token before a second one is asked, too;
                None for what the client was made with, `math.inf` for never.
            explain: tell why the worker was chosen, in `timings.routing` at the end.

        Raises:
            BadRequestError: an argument is not valid; the message names it.
            ClientClosedError: the client is closed.
        """
        return self._submit(**_arguments(locals()))

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        template: Mapping[str, Any] | None = None,
        images: Sequence[ImageSource] = (),
        echo: bool = False,
        max_tokens: int = DEFAULTS.max_tokens,
        min_tokens: int = DEFAULTS.min_tokens,
        temperature: float = DEFAULTS.temperature,
        top_k: int = DEFAULTS.top_k,
        top_p: float = DEFAULTS.top_p,
        min_p: float = DEFAULTS.min_p,
        repetition_penalty: float = DEFAULTS.repetition_penalty,
        presence_penalty: float = DEFAULTS.presence_penalty,
        frequency_penalty: float = DEFAULTS.frequency_penalty,
        logit_bias: Mapping[int, float] | None = None,
        bad_words: str | Sequence[str] = DEFAULTS.bad_words,
        seed: int | None = None,
        stop: str | Sequence[str] = DEFAULTS.stop,
        stop_token_ids: Sequence[int] = DEFAULTS.stop_token_ids,
        ignore_eos: bool = DEFAULTS.ignore_eos,
        logprobs: int | None = DEFAULTS.logprobs,
        json_schema: Mapping[str, Any] | str | None = DEFAULTS.json_schema,
        regex: str | None = DEFAULTS.regex,
        choice: Sequence[str] = DEFAULTS.choice,
        deadline_s: float | None = None,
        resume: bool | None = None,
        priority: int = NORMAL_PRIORITY,
        session: str | None = None,
        hedge_after_s: float | None = None,
        explain: bool = False,
    ) -> StreamT_co:
        """Answer a chat: the model's own template makes the prompt of the messages.

        Args:
            model: the model's name, one of `models()`.
            messages: maps with `role` and `content`, the oldest first. A content is a string, or a list of parts
                {"type": "text", "text": ...} and {"type": "image", "image": bytes_or_path}; it may be None beside
                `tool_calls`.
            tools: what the model may call: a JSON schema of each function, as its template takes them.
            template: further arguments of the chat template, by name, such as {"enable_thinking": False}.
            images: for image parts without an `image`, in order, and for image marks in the texts.
            echo: this and all that follow as for `generate`; the text begins with what the template made.
            max_tokens: see `generate`.
            min_tokens: see `generate`.
            temperature: see `generate`.
            top_k: see `generate`.
            top_p: see `generate`.
            min_p: see `generate`.
            repetition_penalty: see `generate`.
            presence_penalty: see `generate`.
            frequency_penalty: see `generate`.
            logit_bias: see `generate`.
            bad_words: see `generate`.
            seed: see `generate`.
            stop: see `generate`.
            stop_token_ids: see `generate`.
            ignore_eos: see `generate`.
            logprobs: see `generate`.
            json_schema: see `generate`.
            regex: see `generate`.
            choice: see `generate`.
            deadline_s: see `generate`.
            resume: see `generate`.
            priority: see `generate`.
            session: see `generate`. Without it, the turns of a conversation have their first user message, and
                what stands before it, in common.
            hedge_after_s: see `generate`.
            explain: see `generate`.

        Raises:
            BadRequestError: an argument is not valid; the message names it.
            ClientClosedError: the client is closed.
        """
        return self._submit(**_arguments(locals()))

    def generate_n(self, n: int, model: str, prompt: str | None = None, **options: Any) -> list[StreamT_co]:
        """Continue a prompt `n` times. Each stream is a request of its own, and recovers by itself.

        Args:
            n: how many completions.
            model: as for `generate`, and so are all others.
            prompt: see `generate`.
            options: what `generate` takes by name. `seed` is that of the first stream; those that follow have the
                next greater ones.

        Returns:
            The streams. They may be read one after the other: each has credit for all its tokens.

        Raises:
            BadRequestError: an argument is not valid; the message names it.
            ClientClosedError: the client is closed.
        """
        return self._submit_n(n, model, prompt=prompt, **options)

    def chat_n(self, n: int, model: str, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[StreamT_co]:
        """Answer a chat `n` times.

        Args:
            n: how many answers.
            model: as for `chat`.
            messages: see `chat`.
            options: what `chat` takes by name; `seed` as for `generate_n`.

        Returns:
            The streams; see `generate_n`.

        Raises:
            BadRequestError: an argument is not valid; the message names it.
            ClientClosedError: the client is closed.
        """
        return self._submit_n(n, model, messages=messages, **options)

    def _embedding(
        self,
        model: str,
        texts: Sequence[str],
        *,
        deadline_s: float | None,
        resume: bool | None,
        priority: int,
        hedge_after_s: float | None,
    ) -> EmbedWork[StreamT_co]:
        """Return the work that `embed` is."""
        options = {"resume": resume, "priority": priority, "hedge_after_s": hedge_after_s}

        def begin(some: Sequence[str], left_s: float | None) -> StreamT_co:
            return self._begin(model, {"texts": some}, {}, deadline_s=left_s, **options)

        return EmbedWork(texts, begin, deadline_s)

    def _submit_n(self, n: int, model: str, *, seed: int | None = None, **arguments: Any) -> list[StreamT_co]:
        numbers = seeds(n, seed)
        return [self._submit(model, seed=number, ahead=True, **arguments) for number in numbers]

    def _submit(self, model: str, **arguments: Any) -> StreamT_co:
        """Begin a stream; the arguments are those of `generate` or `chat`, or some of them."""
        sampling = {name: arguments.pop(name) for name in SAMPLING if name in arguments}
        source = {name: arguments.pop(name) for name in SOURCE if name in arguments}
        return self._begin(model, source, sampling, **arguments)

    def _begin(
        self, model: str, source: Mapping[str, Any], sampling: Mapping[str, Any], **options: Any
    ) -> StreamT_co:
        bell, settings = self._bell(), self._settings
        for name in ("resume", "hedge_after_s"):
            if options.get(name) is None:
                options[name] = getattr(settings, name)
        order = build_submit(model, source, sampling, window_tokens=settings.window_tokens, **options)
        mailbox = Mailbox(order.id, order.window, bell)
        self._connection.submit(order, mailbox)
        return self._stream(mailbox, order.model)

    def _ask(self, method: str, arguments: Mapping[str, Any]) -> Future[Any]:
        return self._connection.ask(build_ask(method, arguments))

    @abstractmethod
    def _bell(self) -> Bell:
        """Return what wakes the reader that calls now."""

    @abstractmethod
    def _stream(self, mailbox: Mailbox, model: str) -> StreamT_co:
        """Return the stream over a mailbox."""


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a method from its `locals()`: each goes on under its own name."""
    return {name: value for name, value in given.items() if name != "self"}
