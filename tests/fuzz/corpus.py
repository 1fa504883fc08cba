"""What mutations begin from: the golden frames of tests/vectors, good ones and bad ones."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenmq.protocol.codec import decode
from tokenmq.protocol.messages import Command, Message

_VECTORS = Path(__file__).parents[1] / "vectors"


def _vectors(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((_VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _frames(vector: dict[str, Any]) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in vector["frames"]]


@cache
def golden() -> dict[Command, list[list[bytes]]]:
    """Return the frames of good messages, by command."""
    return {command: [_frames(each) for each in _vectors(command.name.lower())] for command in Command}


@cache
def odd() -> list[list[bytes]]:
    """Return frames that are refused, and those that are taken although they could be written otherwise."""
    return [_frames(each) for name in ("bad", "lenient") for each in _vectors(name)]


@cache
def messages() -> dict[Command, list[Message]]:
    """Return the good messages, by command."""
    return {command: [decode(frames) for frames in all_frames] for command, all_frames in golden().items()}


@cache
def payloads() -> list[bytes]:
    """Return payloads of requests, good ones and bad ones."""
    return [bytes.fromhex(each["payload"]) for name in ("payload", "bad_payload") for each in _vectors(name)]
