"""Server-sent events, as far as streamed completions use them: the `data` of each event, bounded in size.

Source: the event stream format of the HTML standard. Names, ids and retry times of events are not looked at.
"""

from __future__ import annotations

#: The largest event that is no mistake: a whole long completion in one, or a hundred tokens with 20 logprobs each.
MAX_EVENT_BYTES = 4 * 1024 * 1024


class EventTooLargeError(Exception):
    """An event, or a line of one, is larger than MAX_EVENT_BYTES."""


class EventReader:
    """Takes the bytes of one stream as they come; gives the data of the events that they complete."""

    def __init__(self) -> None:
        """Begin a stream."""
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Take more of the stream.

        Returns:
            The data of each event that is complete now, in order; those without data are left out.

        Raises:
            EventTooLargeError: what has come of the next event is too large.
        """
        *lines, self._rest = (self._rest + received).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._add(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(self._take())
        if self._size + len(self._rest) > MAX_EVENT_BYTES:
            raise EventTooLargeError
        return events

    def end(self) -> list[bytes]:
        """End the stream; return an event that lacks nothing but the empty line behind it."""
        events = self.feed(b"\n")
        return [*events, self._take()] if self._data else events

    def _add(self, data: bytes) -> None:
        self._data.append(data)
        self._size += len(data)
        if self._size > MAX_EVENT_BYTES:
            raise EventTooLargeError

    def _take(self) -> bytes:
        data, self._data, self._size = b"\n".join(self._data), [], 0
        return data
