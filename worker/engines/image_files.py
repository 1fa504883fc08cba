"""What the bytes of an image file are made of, looked at before a library sees them. It decodes nothing.

Files are built of parts: segments (JPEG), chunks (PNG, WebP). The library that decodes looks at each part in Python,
and decodes a progressive JPEG as often as it has scans: 30 MB may hold three million parts, or scans for hours, of an
image of any size. So the parts are counted here first, and the counting stops at the first that is too many.

What is not pixels is kept from the library: packed texts and profiles may be a thousand times as large as they come,
and of EXIF data some versions of Pillow copy the same bytes for each of 60,000 tags. All that counts of it is which
way up the camera was.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

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
_APP1 = 0xE1
#: Of the application segments those that tell how colours are stored: JFIF's and Adobe's.
_KEPT_APPS = frozenset({0xE0, 0xEE})
_EXIF = b"Exif\0\0"
_ORIENTATION, _SHORT = 0x0112, 3


class Part(NamedTuple):
    """A segment or chunk: where it begins and ends in the file, its kind, and where its data begin."""

    start: int
    end: int
    kind: bytes
    data: int


def image_format(data: bytes) -> str | None:
    """Return the format that a file begins as, by Pillow's name: PNG, JPEG or WEBP; None for any other."""
    if (data[:4], data[8:12]) == (b"RIFF", b"WEBP"):
        return "WEBP"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)


def parts(data: bytes, kind: str) -> Iterator[Part]:
    """Yield the parts of a file of a format; of a JPEG those in front of its first scan, and that scan with the rest.

    The last one may end behind the file.
    """
    return {"PNG": _png_chunks, "JPEG": _jpeg_segments, "WEBP": _webp_chunks}[kind](data)


def problem_of(data: bytes, kind: str) -> str | None:
    """Return why a file is not to be decoded, for a person; None where its parts are not too many."""
    most = FREE_PARTS + len(data) // PART_BYTES
    for number, _ in enumerate(parts(data, kind)):
        if number >= most:
            return f"it has more than {most} parts for its {len(data):,} bytes"
    if kind == "JPEG":
        # In the data of a scan 0xff is followed by 0 or a restart marker, so that these are scans, or some bytes of a
        # preview in the metadata.
        scans = data.count(bytes((0xFF, _START_OF_SCAN)))
        if scans > MAX_SCANS:
            return f"it has {scans} scans, at most {MAX_SCANS} are allowed"
    return None


def without_metadata(data: bytes, kind: str) -> bytes:
    """Return a file with nothing but what its pixels need; of an animated PNG the picture that others show.

    A WebP comes back as it is: its library leaves metadata packed.
    """
    if kind == "PNG":
        # Critical chunks have a capital first, and tRNS tells which pixels can be seen through.
        kept = [part for part in parts(data, kind) if part.kind[:1].isupper() or part.kind == b"tRNS"]
    elif kind == "JPEG":
        kept = [part for part in parts(data, kind) if part.kind[0] & 0xF0 != 0xE0 or part.kind[0] in _KEPT_APPS]
    else:
        return data
    return data[: 8 if kind == "PNG" else 2] + b"".join(data[part.start : part.end] for part in kept)


def orientation(data: bytes, kind: str) -> int:
    """Return which way up the camera was, 1 to 8 as EXIF has it; 1, upright, where the file does not tell."""
    for part in parts(data, kind):
        if part.kind in (b"eXIf", b"EXIF", bytes((_APP1,))):
            found = data[part.data : min(part.end, part.data + 65_536)]
            if kind != "JPEG" or found.startswith(_EXIF):
                return _orientation(found.removeprefix(_EXIF))
    return 1


def _orientation(exif: bytes) -> int:
    """Return it from the first table of EXIF data, of which nothing else is read."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "")
    try:
        (table,) = struct.unpack_from(f"{order}I", exif, 4) if order else (len(exif),)
        (entries,) = struct.unpack_from(f"{order}H", exif, table)
        for entry in range(entries):
            tag, form, count, value = struct.unpack_from(f"{order}HHIH", exif, table + 2 + 12 * entry)
            if (tag, form, count) == (_ORIENTATION, _SHORT, 1):
                return value if 1 <= value <= 8 else 1
    except struct.error:  # it ends early, or is none
        return 1
    return 1


def _png_chunks(data: bytes) -> Iterator[Part]:
    """Yield the chunks: length, kind, data, checksum."""
    place = 8
    while place + 8 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        yield Part(place, end, data[place + 4 : place + 8], place + 8)
        place = end


def _webp_chunks(data: bytes) -> Iterator[Part]:
    """Yield the chunks: kind, length, data, filled up to an even length."""
    place = 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + length + length % 2
        yield Part(place, end, data[place : place + 4], place + 8)
        place = end


def _jpeg_segments(data: bytes) -> Iterator[Part]:
    """Yield the segments by their markers; a byte that belongs to none, which the library skips, stands alone."""
    place = 2
    while place + 4 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF):
            end, marker = place + 1, 0
        elif marker == _START_OF_SCAN:
            end = len(data)
        elif marker in _BARE:
            end = place + 2
        else:
            end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
        yield Part(place, end, bytes((marker,)), place + 4)
        place = end
