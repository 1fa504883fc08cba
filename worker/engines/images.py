"""Images of a request: from the bytes of their files to pixels. It knows nothing of models.

What a file is made of and what it says of itself is looked at first, and only then are its pixels decoded: a few
kilobytes may claim to be gigabytes. No format but PNG, JPEG and WebP is ever opened, whatever Pillow knows.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from PIL import Image

from ...protocol.errors import BadRequestError
from .image_files import image_format, orientation, problem_of, without_metadata

#: Images of one request. Each is some hundred to some thousand tokens of the prompt, so that few contexts have room
#: for more.
MAX_IMAGES = 64
#: Bytes of one file: a photograph of that many pixels has a fifth of it as JPEG, and a third as PNG.
MAX_BYTES = 32 * 1024 * 1024
#: Pixels of one image, and of all of a request: three bytes each while they are processed, and no model looks at so
#: many.
MAX_PIXELS = 24_000_000
MAX_PIXELS_TOGETHER = 4 * MAX_PIXELS
#: How many times the longer side is the shorter one. Processors bring the shorter side to a few hundred pixels, and
#: a long thin line would become gigabytes by that.
MAX_ASPECT = 200
#: What turns an image upright, by what EXIF calls its orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Characters of what Pillow says that a user is told.
_MAX_REASON_CHARS = 200


def decode(files: Sequence[bytes]) -> list[Image.Image]:
    """Decode images, turned upright as their EXIF data say, to RGB; of an animation the first frame.

    Args:
        files: PNG, JPEG or WebP.

    Raises:
        BadRequestError: too many, or one of them is too large, of another format, truncated or damaged. The message
            names it by its number from 0.
    """
    if len(files) > MAX_IMAGES:
        raise BadRequestError(f"{len(files)} images, at most {MAX_IMAGES} are allowed")
    left = MAX_PIXELS_TOGETHER
    opened = []
    for number, data in enumerate(files):
        image = _open(number, data)
        left -= image.width * image.height
        opened.append(image)
    if left < 0:
        raise BadRequestError(
            f"all images have {MAX_PIXELS_TOGETHER - left:,} pixels together, "
            f"at most {MAX_PIXELS_TOGETHER:,} are allowed"
        )
    turns = [orientation(data, image.format or "") for data, image in zip(files, opened, strict=True)]
    return [_pixels(number, image, turn) for number, (image, turn) in enumerate(zip(opened, turns, strict=True))]


def fingerprint(files: Sequence[bytes]) -> bytes:
    """Return a hash of the files in their order."""
    together = blake2b(digest_size=16)
    for data in files:
        together.update(blake2b(data, digest_size=16).digest())
    return together.digest()


def _open(number: int, data: bytes) -> Image.Image:
    """Read a file's header."""
    if len(data) > MAX_BYTES:
        raise BadRequestError(f"image {number}: {len(data):,} bytes, at most {MAX_BYTES:,} are allowed")
    kind = image_format(data)
    if kind is None:
        begin = data[:12].hex() or "nothing"
        raise BadRequestError(f"image {number}: it is no PNG, JPEG or WebP file; it begins with {begin}")
    problem = problem_of(data, kind)
    if problem is not None:
        raise BadRequestError(f"image {number}: {problem}")
    try:
        with warnings.catch_warnings():
            # Of many pixels, and of what is odd in a file but does no harm; the check of the size is below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(without_metadata(data, kind)), formats=(kind,))
    except Image.DecompressionBombError as error:
        raise BadRequestError(f"image {number}: more than the {MAX_PIXELS:,} pixels that are allowed") from error
    except Exception as error:  # Pillow raises many kinds for what is broken
        raise BadRequestError(f"image {number}: it is no {kind} that can be read: {_reason(error)}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadRequestError(f"image {number}: {width} x {height} pixels, at most {MAX_PIXELS:,} pixels are allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadRequestError(
            f"image {number}: {width} x {height} pixels; one side may be {MAX_ASPECT} times the other at most"
        )
    return image


def _pixels(number: int, image: Image.Image, turn: int) -> Image.Image:
    try:
        with warnings.catch_warnings(), image:
            warnings.simplefilter("ignore")
            upright = image.transpose(_TURNS[turn]) if turn in _TURNS else image
            if upright.mode.startswith("I"):
                # Pillow cuts 16 bits off at 255 instead of scaling them: all would be white.
                upright = Image.fromarray((np.asarray(upright) >> 8).clip(0, 255).astype(np.uint8))
            return upright.convert("RGB")
    except Exception as error:  # as above
        raise BadRequestError(f"image {number}: its {image.format} data are damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what Pillow says of a file that it had as an object in memory, the object left out."""
    lines = str(error).strip().splitlines()
    said = lines[0].strip() if lines else type(error).__name__
    return "its header is damaged" if "BytesIO" in said else said[:_MAX_REASON_CHARS]
