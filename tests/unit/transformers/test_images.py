"""Image files: what is decoded, and what is refused before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from tokenmq.protocol.errors import BadRequestError
from tokenmq.worker.engines import images
from tokenmq.worker.engines.images import decode, fingerprint

from .eyes import picture

KINDS = ("PNG", "JPEG", "WEBP")


@pytest.fixture
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where pixels are decoded."""

    def load(image: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)


def claiming(width: int, height: int) -> bytes:
    """Return a PNG of some bytes that says it is as large as that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 99))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_file(kind: str) -> None:
    file = picture(1, 30, 20, kind)
    [image] = decode([file])
    assert (image.mode, image.size) == ("RGB", (30, 20))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(2))).convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
    [image] = decode([file.getvalue()])
    assert image.mode == "RGB"


def test_sixteen_bits_of_grey_are_scaled() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 128 << 8, 255 << 8]], np.uint16)).save(file, "PNG")
    [image] = decode([file.getvalue()])
    assert [image.getpixel((column, 0))[0] for column in range(3)] == [0, 128, 255]  # type: ignore[index]


def test_an_image_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    lying = picture(3, 40, 20, "JPEG", exif=exif)
    [image] = decode([lying])
    assert image.size == (20, 40)
    plain = np.asarray(Image.open(io.BytesIO(lying)).convert("RGB"))
    assert np.array_equal(np.asarray(image), np.rot90(plain, -1))


@pytest.mark.usefixtures("no_pixels")
@pytest.mark.parametrize(
    ("file", "words"),
    [
        (claiming(60_000, 60_000), "24,000,000 pixels"),  # Pillow's own error
        (claiming(10_000, 10_000), "10000 x 10000 pixels, at most"),  # its warning
        (claiming(5_000, 4_801), "5000 x 4801 pixels, at most"),
        (claiming(1, 10_000), "1 x 10000 pixels; one side may be 200 times"),
        (b"GIF89a" + bytes(40), "no PNG, JPEG or WebP file; it begins with 474946383961"),
        (b"%PDF-1.7" + bytes(40), "no PNG, JPEG or WebP"),
        (b"", "it begins with nothing"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "no PNG that can be read"),
        (b"\xff\xd8\xff\xe0", "no JPEG that can be read"),
        (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20), "no WEBP that can be read"),
    ],
)
def test_a_header_tells_enough(file: bytes, words: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        decode([picture(1), file])
    assert caught.value.message.startswith("image 1: ")
    assert words in caught.value.message
    assert "BytesIO" not in caught.value.message


@pytest.mark.usefixtures("no_pixels")
def test_too_many_too_long_too_much_together() -> None:
    with pytest.raises(BadRequestError, match="65 images, at most 64"):
        decode([picture(1, 8, 8)] * 65)
    long = picture(1) + bytes(images.MAX_BYTES)
    with pytest.raises(BadRequestError, match=r"image 0: 33,55\d,\d+ bytes, at most 33,554,432"):
        decode([long])
    with pytest.raises(BadRequestError, match="100,000,000 pixels together, at most 96,000,000"):
        decode([claiming(5_000, 4_000)] * 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) * 2 // 3], lambda data: data[:-20] + bytes(8)])
def test_a_truncated_file_is_named(kind: str, damage: Callable[[bytes], bytes]) -> None:
    whole = picture(4, 200, 150, kind)
    with pytest.raises(BadRequestError, match=f"image 1: .*{kind}.*: ") as caught:
        decode([whole, damage(whole)])
    assert not caught.value.retryable


def test_a_fingerprint_is_of_the_files_and_their_order() -> None:
    one, other = picture(1), picture(2)
    prints = {fingerprint(files) for files in ([], [one], [other], [one, other], [other, one], [one + other])}
    assert len(prints) == 6
    assert fingerprint([one, other]) == fingerprint([one, other])
