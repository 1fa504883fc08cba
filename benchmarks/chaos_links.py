"""Network links of the chaos run: each listens on a port, forwards to one endpoint, and can be cut or fall silent."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

ResultT = TypeVar("ResultT")

_READ_BYTES = 65536
_CALL_TIMEOUT_S = 10.0


class Link:
    """One way through the network, to one endpoint. Only its network's thread touches the connections.

    Attributes:
        name: what it is called here.
        endpoint: where to connect instead of the target.
    """

    def __init__(self, name: str, target: str) -> None:
        """Make a link that does not listen yet."""
        self.name = name
        self.endpoint = ""
        place = urlsplit(target)
        self._target = (place.hostname, place.port)
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Take connections from now on."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Break all connections; new ones pass."""
        for writer in self._writers:
            writer.transport.abort()
        self._open.set()

    def hold(self) -> None:
        """Let nothing pass, in both directions, not even the end of a connection: what is sent waits."""
        self._open.clear()

    def release(self) -> None:
        """Let everything pass that has waited: late, but complete and in order, as TCP does it."""
        self._open.set()

    def close(self) -> None:
        """Take no connection any more, and break those that are there."""
        if self._server is not None:
            self._server.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = {writer}
        self._writers |= ends
        try:
            ahead, behind = await asyncio.open_connection(*self._target)
            ends.add(behind)
            self._writers |= ends
            passing = (self._pass(reader, behind), self._pass(ahead, writer))
            ways = [asyncio.ensure_future(way) for way in passing]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # nobody listens there at the moment
        finally:
            for end in ends:
                end.transport.abort()
            self._writers -= ends

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_READ_BYTES):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        await self._open.wait()  # a silent network does not tell that the other side has gone


class Network:
    """The thread that runs the links. A context manager."""

    def __init__(self) -> None:
        """Start the thread."""
        self.links: list[Link] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()

    def link(self, name: str, target: str) -> Link:
        """Add a link to an endpoint and return it; it listens."""

        async def make() -> Link:
            made = Link(name, target)
            await made.listen()
            return made

        self.links.append(self._call(make()))
        return self.links[-1]

    def tell(self, order: Callable[[], None]) -> None:
        """Do one of a link's methods, such as `link.cut`."""

        async def act() -> None:
            order()

        self._call(act())

    def _call(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_TIMEOUT_S)

    def close(self) -> None:
        """Close all links and end the thread."""

        async def stop() -> None:
            for link in self.links:
                link.close()
            # They end by themselves now. To cancel them would make asyncio print each (Python 3.11).
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            if rest:
                await asyncio.wait(rest, timeout=_CALL_TIMEOUT_S / 2)

        self._call(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_TIMEOUT_S)
        self._loop.close()
