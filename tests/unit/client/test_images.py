"""Images on their way into a request: what is read, what is refused and how, and in which order they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenmq.client.images import collect
from tokenmq.client.request import build_submit
from tokenmq.protocol import limits
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.payload import unpack_generation

PNG = b"\x89PNG\r\n\x1a\n-a-png"
JPEG = b"\xff\xd8\xff\xe0-a-jpeg"
WEBP = b"RIFF\x10\x00\x00\x00WEBPVP8 "


def image(source: Any = None) -> dict[str, Any]:
    return {"type": "image"} if source is None else {"type": "image", "image": source}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


TEXT = {"type": "text", "text": "What is this?"}


def test_bytes_of_any_kind_and_paths_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.webp"
    file.write_bytes(WEBP)
    given = [PNG, bytearray(JPEG), memoryview(PNG), file, str(file)]
    assert collect(None, given) == (None, (PNG, JPEG, PNG, WEBP, WEBP))


def test_images_leave_in_the_order_of_their_parts_and_not_in_the_payload() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user(image(PNG), TEXT, image()),
        user(image(WEBP)),
    ]
    order = build_submit("m", {"messages": messages}, {}, window_tokens=8, images=[JPEG])
    assert order.attachments == (PNG, JPEG, WEBP)
    sent = unpack_generation(order.payload).messages
    assert sent == (messages[0], user(image(), TEXT, image()), user(image()))
    assert messages[1] == user(image(PNG), TEXT, image()), "what the application gave was changed"


def test_images_that_no_part_takes_are_for_marks_in_the_text() -> None:
    messages = [user(image(PNG)), {"role": "user", "content": "and <image>?"}]
    assert collect(messages, iter([JPEG, WEBP]))[1] == (PNG, JPEG, WEBP)
    assert build_submit("m", {"prompt": "<image>"}, {}, window_tokens=8, images=[PNG]).attachments == (PNG,)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (PNG, "request.images: expected a list of images"),
        ("a.png", "request.images: expected a list of images"),
        ([PNG, 7], r"request.images\[1\]: expected bytes or a path, got int"),
        ([b"GIF89a"], r"request.images\[0\]: it is no PNG, JPEG or WebP file; it begins with 474946383961"),
        ([b""], r"request.images\[0\]: it is no PNG.* nothing"),
        ([b"RIFF\x10\x00\x00\x00WAVEfmt "], "no PNG, JPEG or WebP"),
        (["/nowhere/a.png"], r"request.images\[0\]: cannot read '/nowhere/a.png': No such file"),
        (["a\0b"], r"request.images\[0\]: cannot read .*null"),
        (["/"], r"request.images\[0\]: cannot read '/': Is a directory"),
        ([PNG] * 65, r"request.images\[64\]: at most 64 images are allowed"),
    ],
)
def test_what_is_no_image_is_named(images: Any, told: str) -> None:
    with pytest.raises(BadRequestError, match=told):
        build_submit("m", {"prompt": "x"}, {}, window_tokens=8, images=images)


def test_the_parts_image_is_named() -> None:
    with pytest.raises(BadRequestError, match=r"request.messages\[0\].content\[1\].image: it is no PNG"):
        collect([user(TEXT, image(b"nothing"))], [])
    with pytest.raises(BadRequestError, match=r"request.messages\[0\].content\[1\]: no image for it: put one in"):
        collect([user(TEXT, image())], [])
    with pytest.raises(BadRequestError, match=r"request.images\[0\]: it is no PNG"):
        collect([user(image())], [b"nothing"])


def test_sizes_are_bounded_one_by_one_and_together(tmp_path: Path) -> None:
    most = limits.MAX_FRAME_BYTES
    file = tmp_path / "sparse.png"
    with file.open("wb") as sink:
        sink.write(PNG)
        sink.truncate(3 * most)
    with pytest.raises(BadRequestError, match=rf"images\[0\]: {3 * most} bytes, at most {most} are allowed"):
        collect(None, [file])
    large = PNG + bytes(most - len(PNG))
    assert len(collect(None, [large])[1][0]) == most
    with pytest.raises(BadRequestError, match=r"images\[0\]: .* at most"):
        collect(None, [large + b"x"])
    with pytest.raises(
        BadRequestError, match=rf"images\[2\]: all images have at most {limits.MAX_MESSAGE_BYTES} bytes"
    ):
        collect(None, [large, large, PNG])


@pytest.mark.parametrize(
    "messages", [["x"], [{"role": "user"}], [user({"type": "audio"})], [{"role": "user", "content": ["x"]}], "x"]
)
def test_messages_that_are_none_are_left_to_the_payloads_checks(messages: Any) -> None:
    with pytest.raises(BadRequestError, match=r"request\.messages"):
        build_submit("m", {"messages": messages}, {}, window_tokens=8)
