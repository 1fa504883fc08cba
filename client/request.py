"""From what a caller asks for to a request that can be sent; whatever is wrong with it is said here, at once."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..protocol import limits
from ..protocol.credit import ReceiveWindow
from ..protocol.errors import BadRequestError, ProtocolError
from ..protocol.messages import ID_BYTES
from ..protocol.packing import pack
from ..protocol.payload import MAX_SEED, Generation, Sampling, check_generation, pack_generation
from ..protocol.schema import Check, boolean, count, mapping, optional, seconds, text
from .affinity import affinity_of
from .events import Ask, Submit

#: The defaults of generate and chat: those of the wire, one object.
DEFAULTS = Sampling()

_check_name = text(empty=False)
_check_priority = count(0, limits.MAX_PRIORITY)

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
    priority: int,
    session: str | None,
    hedge_after_s: float | None,
    explain: bool,
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
        priority: 0 to 9, the greatest is served first.
        session: a name that requests which belong together have in common; None for what their prompts have.
        hedge_after_s: seconds without a first token until a second worker is asked, too; None and infinity for never.
        explain: whether the end is to tell why the worker was chosen.

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
        deadline_s=_checked(optional(seconds), deadline_s, "deadline_s"),
        resume=_checked(boolean, resume, "resume"),
        max_tokens=generation.sampling.max_tokens,
        priority=_checked(_check_priority, priority, "priority"),
        affinity=_affinity(generation, session),
        hedge_after_s=_hedge_after(hedge_after_s),
        explain=_checked(boolean, explain, "explain"),
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


def _checked(check: Check, value: Any, field: str) -> Any:
    try:
        return check(value, f"request.{field}")
    except ProtocolError as error:
        raise BadRequestError(error.message) from error


def _model(model: Any) -> str:
    name: str = _checked(_check_name, model, "model")
    try:
        pack(name)
    except ProtocolError as error:
        raise BadRequestError(f"request.model: {error.message}") from error
    return name


def _affinity(generation: Generation, session: Any) -> str:
    name: str | None = _checked(optional(_check_name), session, "session")
    try:
        return affinity_of(generation, name)
    except ProtocolError as error:  # the prompt has been packed before: it can only be the name
        raise BadRequestError(f"request.session: {error.message}") from error


def _hedge_after(value: Any) -> float | None:
    if value is None or value == math.inf:
        return None
    if type(value) not in (int, float) or not value > 0:
        raise BadRequestError(
            f"request.hedge_after_s: expected seconds, more than 0, or infinity for never, got {value!r:.80}"
        )
    return float(value)


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
