"""From what a caller asks for to a request that can be sent; whatever is wrong with it is said here, at once."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..protocol import limits
from ..protocol.credit import ReceiveWindow
from ..protocol.errors import BadRequestError, ProtocolError
from ..protocol.messages import ID_BYTES
from ..protocol.packing import pack
from ..protocol.payload import MAX_SEED, Sampling, check_generation, pack_generation
from ..protocol.schema import mapping, seconds, text
from .events import Ask, Submit

#: The defaults of generate and chat: those of the wire, one object.
DEFAULTS = Sampling()

_check_name = text(empty=False)


#: Room for header and envelope beside payload and attachments. The longest envelope names a model and the workers to
#: avoid, four bytes a character.
_HEADROOM_BYTES = 4 * limits.MAX_NAME_CHARS * (limits.MAX_AVOIDED + 1) + 1024


def new_id() -> bytes:
    """Return an id that no other request has, and that nobody can guess."""
    return secrets.token_bytes(ID_BYTES)


def build_submit(
    model: str,
    source: Mapping[str, Any],
    sampling: Mapping[str, Any],
    *,
    attachments: Sequence[bytes],
    deadline_s: float | None,
    window_tokens: int,
    resume: bool,
) -> Submit:
    """Return the order for one stream.

    Args:
        model: its name.
        source: `prompt`, `token_ids` or `messages`.
        sampling: the fields of Sampling; `seed` may be None, then one is drawn; `stop` may be one string.
        attachments: raw bytes, such as images.
        deadline_s: seconds until the answer has lost its worth, None for never.
        window_tokens: the stream's credit window.
        resume: whether what goes wrong is repaired by further attempts.

    Raises:
        BadRequestError: something is not valid; the message names the field.
    """
    chosen = dict(sampling)
    if chosen["seed"] is None:
        chosen["seed"] = secrets.randbelow(MAX_SEED + 1)
    if isinstance(chosen["stop"], str):
        chosen["stop"] = (chosen["stop"],)
    generation = check_generation({**source, "sampling": chosen})
    payload = pack_generation(generation)
    frames = _attachments(attachments)
    check_size(payload, frames)
    return Submit(
        id=new_id(),
        model=_model(model),
        payload=payload,
        window=ReceiveWindow(window_tokens),
        attachments=frames,
        deadline_s=_deadline(deadline_s),
        resume=_resume(resume),
    )


def check_size(payload: bytes, attachments: Sequence[bytes]) -> None:
    """Check that a request fits into one message, whatever its envelope says.

    Raises:
        BadRequestError: it does not.
    """
    size = len(payload) + sum(map(len, attachments))
    most = limits.MAX_MESSAGE_BYTES - _HEADROOM_BYTES
    if size > most:
        raise BadRequestError(f"request: {size} bytes, at most {most} are allowed")


def build_ask(method: str, arguments: Mapping[str, Any]) -> Ask:
    """Return the order for one query.

    Raises:
        BadRequestError: method or arguments cannot be sent; the message says which and why.
    """
    try:
        _check_name(method, "method")
        taken = mapping(arguments, "arguments")
        pack([method, taken])
    except ProtocolError as error:
        raise BadRequestError(f"query: {error.message}") from error
    return Ask(new_id(), method, taken)


def _model(model: Any) -> str:
    try:
        name: str = _check_name(model, "request.model")
        pack(name)
    except ProtocolError as error:
        raise BadRequestError(error.message) from error
    return name


def _resume(value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRequestError(f"request.resume: expected true or false, got {value!r:.80}")
    return value


def _deadline(value: Any) -> float | None:
    if value is None:
        return None
    try:
        return seconds(value, "request.deadline_s")
    except ProtocolError as error:
        raise BadRequestError(error.message) from error


def _attachments(values: Iterable[Any]) -> tuple[bytes, ...]:
    if isinstance(values, (bytes, bytearray, memoryview, str)):
        raise BadRequestError("request.attachments: expected a list of bytes")
    frames = []
    for position, value in enumerate(values):
        if not isinstance(value, (bytes, bytearray, memoryview)):
            name = type(value).__name__
            raise BadRequestError(f"request.attachments[{position}]: expected bytes, got {name}")
        frame = bytes(value)
        if len(frame) > limits.MAX_FRAME_BYTES:
            raise BadRequestError(
                f"request.attachments[{position}]: {len(frame)} bytes, at most {limits.MAX_FRAME_BYTES} are allowed"
            )
        frames.append(frame)
    if len(frames) > limits.MAX_ATTACHMENTS:
        raise BadRequestError(
            f"request.attachments: {len(frames)} attachments, at most {limits.MAX_ATTACHMENTS} are allowed"
        )
    return tuple(frames)
