"""The connections to one server: an asyncio loop in a thread of its own, on aiohttp.

aiohttp, since it streams an event for a third of the CPU that httpx takes (35 us against 80 to 110, measured), runs
under Python 3.10, which httpx's successor httpx2 does not, and is released all the time, which httpx is not any more.

What comes is handed to callbacks in that thread. Each stream that was opened comes to exactly one end, Ended or a
ServerError, unless it was cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

from ....protocol.errors import ErrorCode
from ....protocol.version import SOFTWARE
from .faults import GoneError, ServerError, engine_failed, lives, of_status, quoted
from .pieces import DONE, Piece, parse
from .sse import MAX_EVENT_BYTES, EventReader, EventTooLargeError

#: To find the host, connect, and agree on TLS.
CONNECT_TIMEOUT_S = 5.0
#: Without a byte for so long a stream is given up: a server under load may let a request wait for minutes.
SILENCE_S = 300.0
#: After the piece that ends a completion come its usage and the end of the stream, at once.
LINGER_S = 5.0
#: For a short answer: the list of models, the text of an error.
ANSWER_TIMEOUT_S = 5.0
#: An idle connection is not used again after so long: uvicorn closes it after 5 s, and a request that is on its way
#: then would be lost.
KEEP_ALIVE_S = 2.0
#: How often a server that sends nothing is asked whether it lives.
WATCH_S = 3.0
#: It has gone when it is asked so often in a row without an answer in time; at once where nobody listens there.
SILENT_POLLS = 3
#: The largest short answer.
MAX_ANSWER_BYTES = 4 * 1024 * 1024
_CLOSE_TIMEOUT_S = 2.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Ended:
    """The server has ended a stream, and said before that the completion is complete or not."""


Event = Piece | Ended | ServerError


class Link:
    """A server, reached over HTTP. Methods may be called in any thread, after `start`."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        deliver: Callable[[int, Event], None],
        on_health: Callable[[str], None],
        *,
        silence_s: float = SILENCE_S,
        watch_s: float = WATCH_S,
    ) -> None:
        """Make a link that is not connected.

        Args:
            base_url: without a slash at its end; paths are appended to it.
            api_key: sent as a bearer token; it is kept out of all that is told.
            deliver: called in the link's thread with a stream's ticket and what came.
            on_health: called there when the server has gone, with the reason, and with "" when it is back.
            silence_s: see SILENCE_S.
            watch_s: see WATCH_S.
        """
        self.server = f"the server at {base_url}"
        self.base_url = base_url
        self._api_key = api_key
        self._deliver = deliver
        self._on_health = on_health
        self._silence_s = silence_s
        self._watch_s = watch_s
        #: Made when the thread starts: a link that was only made holds nothing.
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="tokenmq-http", daemon=True)
        self._started = threading.Event()
        #: The rest is the loop's own.
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._session: aiohttp.ClientSession
        self._doubt: asyncio.Event
        self._heard = False

    # --- from other threads -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()
        self._started.wait()

    def get(self, url: str) -> Any:
        """Ask for a short answer in JSON, and wait for it.

        Args:
            url: a path below the base URL, or a whole URL.

        Raises:
            ServerError: there is none.
        """
        return self._wait(self._get(url))

    def watch(self) -> None:
        """Begin to watch the server; it lives at the moment."""
        self._loop.call_soon_threadsafe(self._keep, 0, self._watch())

    def open(self, ticket: int, path: str, body: bytes, top: int) -> None:
        """Open a stream; `top` is as for `pieces.parse`."""
        self._loop.call_soon_threadsafe(self._keep, ticket, self._stream(ticket, path, body, top))

    def cancel(self, ticket: int) -> None:
        """Close a stream, which tells the server to stop; nothing more is delivered of what it brings from now on."""
        self._loop.call_soon_threadsafe(self._cancel, ticket)

    def close(self) -> None:
        """Close all streams and end the thread."""
        if self._thread.ident is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_TIMEOUT_S)

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._loop.run_until_complete(self._open_session())
            self._started.set()
            self._loop.run_forever()
            self._loop.run_until_complete(self._end())
        finally:
            self._loop.close()

    async def _open_session(self) -> None:
        headers = {"User-Agent": SOFTWARE, "Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        self._session = aiohttp.ClientSession(
            headers=headers,
            # No bound on connections: the worker's slots are the bound.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=self._silence_s),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._doubt = asyncio.Event()

    async def _end(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def _keep(self, ticket: int, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[ticket] = task = self._loop.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(ticket, None))

    def _cancel(self, ticket: int) -> None:
        task = self._tasks.get(ticket)
        if task is not None:
            task.cancel()

    # --- a stream ---------------------------------------------------------------------------------------------------

    async def _stream(self, ticket: int, path: str, body: bytes, top: int) -> None:
        event: Event
        try:
            async with self._session.post(self.base_url + path, data=body, allow_redirects=False) as response:
                await self._check(response, "text/event-stream")
                await self._read(ticket, response.content, top)
            event = Ended()
        except ServerError as error:
            event = self._clean(error)
        except EventTooLargeError:
            event = engine_failed(f"{self.server} sent an event of more than {MAX_EVENT_BYTES} bytes")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            event = self._unreached(error)
        self._deliver(ticket, event)

    async def _read(self, ticket: int, content: aiohttp.StreamReader, top: int) -> None:
        """Deliver a stream's pieces until it ends."""
        reader = EventReader()
        complete = False
        while True:
            try:
                received = await (asyncio.wait_for(content.readany(), LINGER_S) if complete else content.readany())
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError):
                if complete:
                    return  # only its usage is missing
                raise
            self._heard = True
            for data in reader.feed(received) if received else reader.end():
                if data == DONE:
                    return
                piece = parse(data, self.server, top)
                complete = complete or bool(piece.reason)
                self._deliver(ticket, piece)
            if not received:
                if not complete:
                    self._doubt.set()
                return

    async def _check(self, response: aiohttp.ClientResponse, kind: str) -> None:
        """Raise ServerError unless the answer is what was asked for."""
        if response.status != 200:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, OSError):
                raise of_status(self.server, response.status, await self._all_of(response))
            raise of_status(self.server, response.status, b"")
        if response.content_type != kind:
            found = quoted(await self._all_of(response))
            raise engine_failed(f"{self.server} answered with {response.content_type}, not {kind}: {found}")

    @staticmethod
    async def _all_of(response: aiohttp.ClientResponse) -> bytes:
        async def read() -> bytes:
            try:
                return await response.content.readexactly(MAX_ANSWER_BYTES)
            except asyncio.IncompleteReadError as end:
                return end.partial

        return await asyncio.wait_for(read(), ANSWER_TIMEOUT_S)

    def _unreached(self, error: Exception) -> ServerError:
        self._doubt.set()
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            text = f"no connection within {CONNECT_TIMEOUT_S:g} s"
        elif isinstance(error, asyncio.TimeoutError):
            text = f"nothing came for {self._silence_s:g} s"
        else:
            text = _told(error)
        return self._clean(engine_failed(f"{self.server} cannot be reached, or broke off: {text}"))

    def _clean(self, error: ServerError) -> ServerError:
        """Return the error without the key, which a server may have quoted."""
        if not self._api_key:
            return error
        message = error.message.replace(self._api_key, "[key]")
        return type(error)(error.code, message, error.retryable, error.status)

    # --- short answers, and whether it lives ------------------------------------------------------------------------

    async def _get(self, url: str) -> Any:
        whole = url if "://" in url else self.base_url + url
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        try:
            async with self._session.get(whole, timeout=timeout, allow_redirects=False) as response:
                await self._check(response, "application/json")
                return json.loads(await self._all_of(response))
        except ServerError as error:
            raise self._clean(error) from None
        except (ValueError, RecursionError):
            raise engine_failed(f"{self.server} answered with what is no JSON") from None
        except aiohttp.ClientConnectorError as error:
            raise GoneError(ErrorCode.ENGINE_FAILED, f"{self.server} cannot be reached: {_told(error)}") from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            text = str(error) or f"no answer within {ANSWER_TIMEOUT_S:g} s"
            raise engine_failed(f"{self.server} does not answer: {text}") from None

    async def _watch(self) -> None:
        silent, gone = 0, False
        while True:
            doubted = await self._doubted()
            if self._heard and not doubted:
                self._heard, silent = False, 0
                continue
            why = await self._fault()
            silent = 0 if why is None else SILENT_POLLS if isinstance(why, GoneError) else silent + 1
            if why is None and gone:
                gone = False
                self._on_health("")
            elif why is not None and silent >= SILENT_POLLS and not gone:
                gone = True
                self._on_health(why.message)

    async def _doubted(self) -> bool:
        """Wait for the next look at the server; tell whether a stream broke off meanwhile, or found nobody."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._doubt.wait(), self._watch_s)
        doubted = self._doubt.is_set()
        self._doubt.clear()
        return doubted

    async def _fault(self) -> ServerError | None:
        """Return why the server cannot serve; None where it answers, whatever it thinks of the question."""
        try:
            await self._get("/models")
        except ServerError as error:
            return None if lives(error) else error
        return None


def _told(error: Exception) -> str:
    """Return what an error of the HTTP library says, without the library's own terms where the system has words."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.strerror:
        return error.os_error.strerror
    return str(error) or type(error).__name__
