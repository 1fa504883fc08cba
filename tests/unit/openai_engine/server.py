"""A small HTTP server for tests: real sockets, and whatever an honest server would never do."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Any

#: One request: method, path, headers (names in lower case), the JSON body.
Seen = tuple[str, str, dict[str, str], Any]
Handler = Callable[["Reply"], Awaitable[None]]


class Reply:
    """What a handler answers a request with."""

    def __init__(self, seen: Seen, writer: asyncio.StreamWriter, server: FakeServer) -> None:
        self.seen = seen
        self.server = server
        self._writer = writer

    async def raw(self, data: bytes) -> None:
        """Send it; a peer that has gone, at whatever byte, is noted as one that closed its stream."""
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError:
            self.server.closed.set()
            raise

    async def json(self, value: Any, status: int = 200) -> None:
        await self.whole(json.dumps(value).encode(), status=status)

    async def whole(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
        if self.seen[0] != "GET":
            head += "connection: close\r\n"  # as it does; a client that took it for kept open would ask into the end
        await self.raw(f"{head}\r\n".encode() + body)

    async def begin(self) -> None:
        """Begin a stream of events that ends when the connection does."""
        await self.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")

    async def event(self, value: Any) -> None:
        data = value if isinstance(value, str) else json.dumps(value)
        await self.raw(f"data: {data}\n\n".encode())

    async def text(self, *texts: str, **more: Any) -> None:
        for text in texts:
            await self.event({"choices": [{"index": 0, "text": text, **more}]})

    async def finish(self, reason: str = "stop", prompt: int = 3, completion: int | None = None) -> None:
        await self.event({"choices": [{"index": 0, "text": "", "finish_reason": reason}]})
        if completion is not None:
            await self.event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}})
        await self.event("[DONE]")

    async def until_closed(self) -> None:
        """Send on until the peer has gone."""
        while True:
            await self.raw(b": ping\n\n")
            await asyncio.sleep(0.01)

    def abort(self) -> None:
        """Break the connection off, with a reset."""
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport: Any = self._writer.transport
        transport.abort()


class FakeServer:
    """Serves a list of models and whatever `handle` does with a completion; in a thread of its own."""

    def __init__(self, port: int = 0) -> None:
        self.models: Any = {"data": [{"id": "big", "owned_by": "vllm", "max_model_len": 512}]}
        self.list_status = 200
        self.handle: Handler | None = None
        self.seen: list[Seen] = []
        #: A peer has closed its stream.
        self.closed = threading.Event()
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def bodies(self) -> list[Any]:
        """The bodies of the completions that were asked for."""
        return [body for method, _, _, body in self.seen if method == "POST"]

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def _run(self) -> None:
        self._loop.run_until_complete(self._open())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                seen = await self._request(reader)
                self.seen.append(seen)
                reply = Reply(seen, writer, self)
                if seen[0] == "GET":
                    await self._list(reply)
                else:
                    assert self.handle is not None
                    await self.handle(reply)
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _list(self, reply: Reply) -> None:
        if reply.seen[1] == "/v1/models":
            await reply.json(self.models, self.list_status)
        else:
            await reply.json({"detail": "Not Found"}, 404)

    async def _request(self, reader: asyncio.StreamReader) -> Seen:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return method, path, headers, json.loads(body) if body else None
