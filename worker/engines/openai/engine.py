"""The openai engine: any server that speaks the OpenAI API, such as vLLM, SGLang or llama.cpp's, does the work.

Each job is one streamed HTTP request. The requests run in the thread of `link.py`; what they bring waits in an inbox
until the engine thread, woken by `wake`, takes it in its next step. To cancel is to close the HTTP stream, upon which
these servers stop. The server schedules: the engine passes on whatever the worker's slots let through.

What a token is, and how it is counted, tells `row.py`. The engine does not resume: no such server can continue what
another one has begun token for token, noise included.

While the server is gone the engine serves no model: brokers send what comes to other workers. What reaches it
nevertheless fails at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ....protocol.errors import BadRequestError, ErrorCode
from ....protocol.log import Log, write
from ....protocol.messages import ModelInfo
from ..base import Engine, EngineLoadError, EngineStats, Failed, Job, Output
from .body import as_json, request_for
from .dialects import DIALECTS, OPENAI, OWNERS, TRANSFORMERS, Dialect
from .faults import KeyRefusedError, ServerError, lives
from .link import SILENCE_S, WATCH_S, Ended, Event, Link
from .row import Row
from .settings import AUTO, SERVER_WAIT_S

LOGGER = logging.getLogger("tokenmq.worker")
#: While it is waited for, it is asked, and people are told, so often.
_ASK_EVERY_S = 1.0
_TELL_EVERY_S = 10.0
#: What servers call prompt and completion together, at most.
_CONTEXT = ("max_model_len", "context_length", "context_window")


class OpenAIEngine(Engine):
    """Has a server run the jobs; see the module."""

    name = "openai"

    def __init__(
        self,
        name: str,
        model: str,
        base_url: str,
        slots: int = 1,
        api_key: str | None = None,
        dialect: str = AUTO,
        server_wait_s: float = SERVER_WAIT_S,
        silence_s: float = SILENCE_S,
        watch_s: float = WATCH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an engine.

        Args:
            name: the model's name here.
            model: its name at the server.
            base_url: of the API, as a rule with /v1 at its end.
            slots: not needed: the worker's slots bound what comes.
            api_key: for the server, where it wants one.
            dialect: what kind of server it is, one of DIALECTS; `auto` finds out.
            server_wait_s: how long `load` waits for the server to answer.
            silence_s: a stream without a byte for so long is given up.
            watch_s: a server that sends nothing is looked after so often.
            clock: seconds, for tests.

        Raises:
            ValueError: the URL, the key or the dialect cannot be used.
        """
        if dialect != AUTO and dialect not in DIALECTS:
            raise ValueError(f"dialect: expected {AUTO}, {', '.join(DIALECTS)}; got {dialect!r}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
            raise ValueError("the API key must be printable ASCII, in one line; is there a newline at its end?")
        self._name = name
        self._model = model
        self._dialect = DIALECTS.get(dialect, OPENAI)
        self._finds_dialect = dialect == AUTO
        self._server_wait_s = server_wait_s
        self._clock = clock
        self._link = Link(
            _checked(base_url), api_key, self._arrived, self._health, silence_s=silence_s, watch_s=watch_s
        )
        self._models: tuple[ModelInfo, ...] = ()
        self._rows: dict[int, Row] = {}
        #: From the link's thread; appending is atomic.
        self._inbox: deque[tuple[int, Event]] = deque()
        #: `wake` was called, and no step has begun since.
        self._woken = False
        #: Why the server cannot be used at the moment; "" when it can.
        self._gone = ""
        self._prompt_tokens = 0
        self._cached_tokens = 0

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def load(self) -> Sequence[ModelInfo]:
        """Wait for the server; find out what it is and what it says of the model."""
        self._link.start()
        listed = self._listed()
        mine = next((one for one in listed if one.get("id") == self._model), None)
        if self._finds_dialect:
            self._dialect = self._found_dialect(mine or next(iter(listed), {}))
        if mine is None and listed and self._dialect.lists_model:
            names = ", ".join(str(one.get("id")) for one in listed)
            raise EngineLoadError(f"{self._link.server} does not serve {self._model!r}; models there: {names}")
        context = next((mine[key] for key in _CONTEXT if type((mine or {}).get(key)) is int), 0) if mine else 0
        self._models = (ModelInfo(self._name, context_tokens=max(0, context), chat=True, images=True),)
        write(LOGGER, Log("server_found", {"server": self._link.server, "dialect": self._dialect.name}))
        self._link.watch()
        return self._models

    def submit(self, job: Job) -> Sequence[Output]:
        """Send a job to the server."""
        generation = job.generation
        if self._gone:
            return _refused(job, ErrorCode.ENGINE_FAILED, self._gone, retryable=True)
        if generation.texts is not None:
            return _refused(job, ErrorCode.BAD_REQUEST, f"{self._name!r} makes no embeddings")
        if generation.prior is not None:
            return _refused(job, ErrorCode.CANNOT_RESUME, f"{self._name!r} cannot go on with another worker's tokens")
        try:
            path, body = request_for(job, self._model, self._dialect)
            packed = as_json(body).encode()
        except BadRequestError as error:
            return _refused(job, ErrorCode.BAD_REQUEST, error.message)
        sampling = generation.sampling
        self._rows[job.ticket] = Row(
            job.ticket,
            sampling,
            self._clock(),
            echo=generation.prompt or "" if generation.echo else "",
            watch_stops=len(sampling.stop) > self._dialect.stops,
        )
        self._link.open(job.ticket, path, packed, sampling.logprobs or 0)
        return []

    def cancel(self, ticket: int) -> Sequence[Output]:
        """Close a job's stream."""
        row = self._rows.pop(ticket, None)
        if row is None:
            return []
        self._link.cancel(ticket)
        return row.cancel()

    def step(self) -> Sequence[Output]:
        """Take what has come."""
        self._woken = False  # first: what comes from now on wakes again
        now = self._clock()
        outputs: list[Output] = []
        for _ in range(len(self._inbox)):
            ticket, event = self._inbox.popleft()
            row = self._rows.get(ticket)
            if row is None:
                continue
            outputs += self._taken(row, event, now)
            if row.ended:
                self._remove(row)
                if not isinstance(event, (Ended, ServerError)):
                    self._link.cancel(ticket)
        return outputs

    def next_step_in(self) -> float | None:
        """Return 0 when something has come."""
        return 0.0 if self._inbox else None

    def reset(self) -> None:
        """Drop all jobs."""
        for ticket in self._rows:
            self._link.cancel(ticket)
        self._rows.clear()

    def stats(self) -> EngineStats:
        """Return the present figures: jobs without a token yet wait at the server, or are in its prefill."""
        running = sum(row.begun for row in self._rows.values())
        waiting = len(self._rows) - running
        return EngineStats(running, waiting, prompt_tokens=self._prompt_tokens, cached_tokens=self._cached_tokens)

    def close(self) -> None:
        """End the link."""
        self._link.close()

    def _taken(self, row: Row, event: Event, now: float) -> list[Output]:
        if isinstance(event, Ended):
            return row.end(self._link.server)
        if isinstance(event, ServerError):
            return row.fail(event.code, event.message, retryable=event.retryable)
        return row.take(event, now)

    def _remove(self, row: Row) -> None:
        del self._rows[row.ticket]
        self._prompt_tokens += row.prompt_tokens
        self._cached_tokens += min(row.cached_tokens, row.prompt_tokens)

    # --- the link's thread ------------------------------------------------------------------------------------------

    def _arrived(self, ticket: int, event: Event) -> None:
        self._inbox.append((ticket, event))
        if not self._woken:
            self._woken = True
            self.wake()

    def _health(self, why: str) -> None:
        self._gone = why
        if why:
            write(LOGGER, Log("server_lost", {"error": why}, level=logging.WARNING))
        else:
            write(LOGGER, Log("server_back", {"server": self._link.server}))
        self.announce(() if why else self._models)

    # --- load -------------------------------------------------------------------------------------------------------

    def _listed(self) -> list[Mapping[str, Any]]:
        """Return the server's list of models; wait for a server that is not there yet."""
        began = self._clock()
        told = began
        while True:
            try:
                answer = self._link.get("/models")
                data = answer.get("data") if isinstance(answer, Mapping) else None
                return [one for one in data or () if isinstance(one, Mapping)]
            except ServerError as error:
                if isinstance(error, KeyRefusedError):
                    raise EngineLoadError(error.message) from None
                if lives(error):
                    # Such as `transformers serve` without a hub cache, which it wants to list.
                    write(LOGGER, Log("server_lists_nothing", {"error": error.message}, level=logging.WARNING))
                    return []
                waited = self._clock() - began
                if waited >= self._server_wait_s:
                    raise EngineLoadError(f"{error.message} (waited {waited:.0f} s)") from None
                if self._clock() >= told:
                    told += _TELL_EVERY_S
                    write(LOGGER, Log("waiting_for_server", {"seconds": waited, "error": error.message}))
            time.sleep(_ASK_EVERY_S)

    def _found_dialect(self, model: Mapping[str, Any]) -> Dialect:
        known = OWNERS.get(str(model.get("owned_by")))
        if known is not None:
            return known
        # `transformers serve` writes the models' authors there; but who else has such an endpoint?
        root = self._link.base_url.removesuffix("/v1")
        try:
            paths = self._link.get(f"{root}/openapi.json").get("paths", {})
        except (ServerError, AttributeError):
            return OPENAI
        return TRANSFORMERS if "/load_model" in paths and "/v1/systemone" in paths else OPENAI


def _checked(base_url: str) -> str:
    """Return a base URL without a slash at its end; raises ValueError where it is none."""
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("base URL: expected one like http://host:8000/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("base URL: it must not have a password in it; give a key in the environment")
    return base_url.rstrip("/")


def _refused(job: Job, code: ErrorCode, message: str, *, retryable: bool = False) -> list[Output]:
    return [Failed(job.ticket, code.value, message, retryable)]
