"""Images on their way into a request: read, checked, and in the order of the places that they are for.

They leave as the request's attachments, as their files hold them, and only the worker decodes them. What can be known
without that (how many there are, how large they are, what kind of file each is) is said here, before anything leaves.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ..protocol import limits
from ..protocol.errors import BadRequestError

#: An image: the bytes of its file, or where that is.
ImageSource: TypeAlias = "bytes | bytearray | memoryview | str | os.PathLike[str]"

_BYTES = (bytes, bytearray, memoryview)
_SHOWN_CHARS = 200


def collect(
    messages: Sequence[Mapping[str, Any]] | None, images: Iterable[ImageSource]
) -> tuple[Sequence[Mapping[str, Any]] | None, tuple[bytes, ...]]:
    """Take the images out of a chat's messages, and put them in line with the others.

    Args:
        messages: the chat, None for a prompt. A part {"type": "image", "image": ...} brings its image along, a part
            {"type": "image"} takes the next one of `images`.
        images: the others. What no part takes comes last: it is for marks in the text.

    Returns:
        The messages without images, and all images in the order of their places.

    Raises:
        BadRequestError: an image is missing, cannot be read, is no PNG, JPEG or WebP, or is too large, or there are
            too many; the message names it.
    """
    if isinstance(images, (*_BYTES, str, os.PathLike)):
        raise BadRequestError("request.images: expected a list of images; for a single one give [image]")
    others = ((f"request.images[{number}]", image) for number, image in enumerate(images))
    line = _Line()
    if isinstance(messages, (list, tuple)):  # what is none the payload's checks tell
        messages = [_emptied(message, f"request.messages[{n}]", others, line) for n, message in enumerate(messages)]
    for path, image in others:
        line.add(path, image)
    return messages, tuple(line.files)


def _emptied(message: Any, path: str, others: Iterator[tuple[str, Any]], line: _Line) -> Any:
    """Return a message without its images, which are put in line."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), (list, tuple)):
        return message
    parts = []
    for number, part in enumerate(message["content"]):
        if isinstance(part, Mapping) and part.get("type") == "image":
            where = f"{path}.content[{number}]"
            own = (f"{where}.image", part["image"]) if "image" in part else next(others, None)
            if own is None:
                raise BadRequestError(f'{where}: no image for it: put one in as "image", or give more in images')
            line.add(*own)
            part = {name: value for name, value in part.items() if name != "image"}
        parts.append(part)
    return {**message, "content": parts}


class _Line:
    """Images that have been read, in order; it takes no more than a request may have.

    Attributes:
        files: their bytes.
    """

    def __init__(self) -> None:
        self.files: list[bytes] = []
        self._bytes = 0

    def add(self, path: str, source: Any) -> None:
        """Read and check one; `path` names it in errors."""
        if len(self.files) == limits.MAX_ATTACHMENTS:
            raise BadRequestError(f"{path}: at most {limits.MAX_ATTACHMENTS} images are allowed")
        data = _read(source, path)
        self._bytes += len(data)
        if self._bytes > limits.MAX_MESSAGE_BYTES:
            raise BadRequestError(f"{path}: all images have at most {limits.MAX_MESSAGE_BYTES} bytes together")
        if not _is_image(data):
            raise BadRequestError(
                f"{path}: it is no PNG, JPEG or WebP file; it begins with {data[:12].hex() or 'nothing'}"
            )
        self.files.append(data)


def _read(source: Any, path: str) -> bytes:
    most = limits.MAX_FRAME_BYTES
    if isinstance(source, _BYTES):
        data, size = source, memoryview(source).nbytes
    elif isinstance(source, (str, os.PathLike)):
        try:
            with open(source, "rb") as file:
                data = file.read(most + 1)
                size = max(len(data), os.fstat(file.fileno()).st_size)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise BadRequestError(f"{path}: cannot read {str(source)[:_SHOWN_CHARS]!r}: {why}") from error
    else:
        raise BadRequestError(f"{path}: expected bytes or a path, got {type(source).__name__}")
    if size > most:
        raise BadRequestError(f"{path}: {size} bytes, at most {most} are allowed")
    return bytes(data)


def _is_image(data: bytes) -> bool:
    """Tell by its first bytes whether a file is what workers decode."""
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")
