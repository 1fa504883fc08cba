"""What the bytes of an image file are made of, looked at before a library sees them. It decodes nothing.

Files are built of parts: segments (JPEG), chunks (PNG, WebP). The library that decodes looks at each part in Python,
and decodes a progressive JPEG as often as it has scans: 30 MB may hold three million parts, or scans for hours, of an
image of any size. So the parts are counted here first, and the counting stops at the first that is too many.
"""

from __future__ import annotations

from collections.abc import Iterator

#: First bytes of the formats, and Pillow's names of them.
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"))
#: Parts that a file of any size may have, and the bytes that each further part must bring on the average: encoders
#: write pieces of 8 KB. A message of 64 MB then has 80,000 parts at most, which take a quarter of a second.
FREE_PARTS = 256
PART_BYTES = 1024
#: Scans of a JPEG: progressive ones have about ten. Each takes 25 ms for an image of 24 million pixels.
MAX_SCANS = 32

_START_OF_SCAN = 0xDA
#: Markers that no length follows: TEM, RST0 to RST7, SOI.
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})


def image_format(data: bytes) -> str | None:
    """Return the format that a file begins as, by Pillow's name: PNG, JPEG or WEBP; None for any other."""
    if (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return "WEBP"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)


def problem_of(data: bytes, kind: str) -> str | None:
    """Return why a file is not to be decoded, for a person; None where its parts are not too many.

    Args:
        data: the file.
        kind: what `image_format` says of it.
    """
    most = FREE_PARTS + len(data) // PART_BYTES
    parts = {"PNG": _png_chunks, "JPEG": _jpeg_segments, "WEBP": _webp_chunks}[kind](data)
    for number, _ in enumerate(parts):
        if number >= most:
            return f"it has more than {most} parts for its {len(data):,} bytes"
    if kind == "JPEG":
        # In the data of a scan 0xff is followed by 0 or a restart marker, so that these are scans, or some bytes of a
        # preview in the metadata.
        scans = data.count(bytes((0xFF, _START_OF_SCAN)))
        if scans > MAX_SCANS:
            return f"it has {scans} scans, at most {MAX_SCANS} are allowed"
    return None


def _png_chunks(data: bytes) -> Iterator[int]:
    """Yield where each chunk begins: length, kind, data, checksum."""
    place = 8
    while place + 8 <= len(data):
        yield place
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _webp_chunks(data: bytes) -> Iterator[int]:
    """Yield where each chunk begins: kind, length, data, filled up to an even length."""
    place = 12
    while place + 8 <= len(data):
        yield place
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + length + length % 2


def _jpeg_segments(data: bytes) -> Iterator[int]:
    """Yield where each segment in front of the first scan begins, and each odd byte between two of them."""
    place = 2
    while place + 4 <= len(data):
        yield place
        if data[place] != 0xFF or data[place + 1] in (0x00, 0xFF):
            place += 1  # the library skips such bytes one by one, too
        elif data[place + 1] == _START_OF_SCAN:
            return
        elif data[place + 1] in _BARE:
            place += 2
        else:
            place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
