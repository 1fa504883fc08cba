"""Image files that are made to cost much memory or time: each is refused, or costs as little as others."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from tokenmq.protocol.errors import BadRequestError
from tokenmq.worker.engines import images
from tokenmq.worker.engines.image_files import FREE_PARTS, MAX_SCANS, image_format, without_metadata
from tokenmq.worker.engines.images import decode

from .eyes import picture

#: What one of these files may add to the memory of the process at most; unbounded, each would add a gigabyte or more.
MOST_BYTES = 200 * 1024 * 1024


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*between: bytes, size: int = 8) -> bytes:
    """Return a PNG with these chunks between header and pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((3 * size + 1) * size)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + pixels + chunk(b"IEND", b"")


def jpeg(*segments: bytes, **options: Any) -> bytes:
    """Return a JPEG with these segments in front of its own."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 99, 40)).save(file, "JPEG", **options)
    whole = file.getvalue()
    return whole[:2] + b"".join(segments) + whole[2:]


def exif(tags: int, each_bytes: int) -> bytes:
    """Return EXIF data whose tags all claim the same bytes."""
    table = b"".join(struct.pack("<HHII", tag, 1, each_bytes, 8) for tag in range(1, tags + 1))
    data = struct.pack("<H", tags) + table + bytes(4)
    return b"II*\0\x08\0\0\0" + data.ljust(each_bytes, b"\0")


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(file, kind, **options)
    return file.getvalue()


def scanned(times: int) -> bytes:
    """Return a progressive JPEG whose last scan comes so often again."""
    whole = jpeg(progressive=True)
    scan = whole[whole.rfind(b"\xff\xda") : -2]
    return whole[:-2] + scan * times + whole[-2:]


TEXT = zlib.compress(bytes(200_000_000), 9)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (png(chunk(b"abCd", b"") * 100_000), "parts for its 1,2"),
        (jpeg(b"\xff\xe5\0\x02" * 100_000), "parts for its 400,"),
        (jpeg(b"\xff" * 100_000), "parts for its 100,"),
        (scanned(5_000), "it has 5010 scans, at most 32 are allowed"),
    ],
    ids=["chunks", "segments", "padding", "scans"],
)
def test_a_bomb_is_refused(file: bytes, words: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadRequestError) as caught:
        decode([picture(1), file])
    assert caught.value.message.startswith("image 1: ")
    assert words in caught.value.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_BYTES // 1024


def frames(kind: str) -> bytes:
    more = [Image.new("RGB", (32, 32), (number % 256, number // 256, 0)) for number in range(1, 1_500)]
    return saved(kind, save_all=True, append_images=more)


@pytest.mark.parametrize("file", [frames("PNG"), frames("WEBP")], ids=["APNG", "WebP"])
def test_of_an_animation_only_the_first_frame_is_decoded(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    sought: list[int] = []
    monkeypatch.setattr(ImageFile.ImageFile, "seek", lambda _image, frame: sought.append(frame))
    # As many parts as its frames are no mistake of its own, but of what encoders write.
    monkeypatch.setattr(images, "problem_of", lambda _data, _kind: None)
    [image] = decode([file])
    assert image.size == (32, 32)
    assert not [frame for frame in sought if frame > 0]


def segments(data: bytes) -> list[bytes]:
    """Return EXIF data as JPEG has them, 64 KB at a time."""
    cut = [data[place : place + 65_000] for place in range(0, len(data), 65_000)]
    return [b"\xff\xe1" + struct.pack(">H", len(piece) + 8) + b"Exif\0\0" + piece for piece in cut]


EXIF = exif(20_000, 500_000)  # 10 GB, were the bytes copied for each tag
MANY = [chunk(b"zTXt", b"%d\0\0" % number + zlib.compress(bytes(1_000_000), 9)) for number in range(150)]


@pytest.mark.parametrize(
    "file",
    [
        png(chunk(b"eXIf", EXIF)),
        saved("WEBP", exif=EXIF),
        jpeg(*segments(EXIF)),
        # Without the segment of its resolution, for which Pillow looks into the EXIF data.
        jpeg(*segments(EXIF)).replace(b"\xff\xe0\0\x10JFIF", b"\xff\xe9\0\x10JFIF"),
        png(chunk(b"zTXt", b"k\0\0" + TEXT)),
        png(chunk(b"iCCP", b"k\0\0" + TEXT)),
        png(chunk(b"iTXt", b"k\0\1\0\0\0" + TEXT)),
        png(*MANY),
    ],
    ids=["eXIf", "EXIF", "APP1", "APP1 without JFIF", "zTXt", "iCCP", "iTXt", "many zTXt"],
)
def test_metadata_are_neither_unpacked_nor_copied(file: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [image] = decode([file])
    assert image.mode == "RGB"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_BYTES // 1024


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("order", ["<", ">"])
def test_all_ways_up_are_those_of_pillow(kind: str, turn: int, order: str) -> None:
    table = struct.pack(order + "HHHIHH", 1, 0x0112, 3, 1, turn, 0) + bytes(4)
    data = (b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08") + table
    file = picture(3, 40, 24, kind, exif=b"Exif\0\0" + data)
    [image] = decode([file])
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    assert image.size == expected.size
    assert image.tobytes() == expected.tobytes()


def test_what_is_left_of_a_file_has_the_same_pixels() -> None:
    seen_through = io.BytesIO()
    Image.new("P", (20, 10), 3).save(seen_through, "PNG", transparency=3)
    for file in (seen_through.getvalue(), png(chunk(b"gAMA", bytes(4))), jpeg(progressive=True), saved("WEBP")):
        kind = image_format(file)
        assert kind is not None
        ours, whole = (Image.open(io.BytesIO(data)) for data in (without_metadata(file, kind), file))
        assert ours.convert("RGBA").tobytes() == whole.convert("RGBA").tobytes()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "ICO", "PPM", "EPS", "TGA", "ICNS", "JPEG2000", "DDS", "PDF"])
def test_no_other_format_is_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(images.Image, "open", lambda *given, **_options: opened.append(given))
    with pytest.raises(BadRequestError, match="image 0: it is no PNG, JPEG or WebP file"):
        decode([saved(kind)])
    for text in (b'<svg xmlns="http://www.w3.org/2000/svg"/>', b"%!PS-Adobe-3.0 EPSF-3.0\n", b"", b"\0" * 100):
        with pytest.raises(BadRequestError, match="image 0: it is no PNG, JPEG or WebP file"):
            decode([text])
    assert not opened


@pytest.mark.parametrize(
    "file",
    [saved("PNG"), saved("WEBP"), jpeg(), jpeg(progressive=True), png(*[chunk(b"tEXt", b"k\0v")] * (FREE_PARTS - 3))],
    ids=["PNG", "WebP", "JPEG", "progressive", "many parts"],
)
def test_honest_files_have_few_parts(file: bytes) -> None:
    assert decode([file])[0].mode == "RGB"


def test_as_many_scans_as_are_allowed() -> None:
    ten = scanned(0).count(b"\xff\xda")
    assert decode([scanned(MAX_SCANS - ten)])[0].size == (16, 16)
    with pytest.raises(BadRequestError, match="33 scans"):
        decode([scanned(MAX_SCANS + 1 - ten)])


@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.binary(max_size=300), st.integers(0, 400))
def test_whatever_the_bytes_are_they_are_an_image_or_a_bad_request(kind: str, noise: bytes, place: int) -> None:
    whole = saved(kind)
    file = whole[:place] + noise + whole[place + len(noise) :]
    problem = None
    try:
        [image] = decode([file])
        assert image.mode == "RGB"
    except BadRequestError as refused:
        problem = refused.message
    if problem is not None:
        assert problem.startswith("image 0: ")
        assert len(problem) < 400
        assert "\n" not in problem
