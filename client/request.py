"""From what a caller asks for to a request that can be sent; whatever is wrong with it is said here, at once."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
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
from .images import ImageSource, collect

#: The defaults of generate and chat: those of the wire, one object.
DEFAULTS = Sampling()
#: The arguments of generate and chat that are fields of Sampling, and those that are fields of Generation.
SAMPLING = tuple(item.name for item in fields(Sampling))
SOURCE = ("prompt", "token_ids", "messages", "tools", "template", "echo")

#: What stands in the arguments for what is not said: nothing of it is looked at or sent.
_UNSAID = {**{name: getattr(DEFAULTS, name) for name in SAMPLING}, "seed": None, "logit_bias": None}

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
    window_tokens: int,
    images: Iterable[ImageSource] = (),
    deadline_s: float | None = None,
    resume: bool = True,
    priority: int = limits.NORMAL_PRIORITY,
    session: str | None = None,
    hedge_after_s: float | None = None,
    explain: bool = False,
    ahead: bool = False,
) -> Submit:
    """Return the order for one stream.

    Args:
        model: its name.
        source: the fields of Generation that say what of: `prompt`, `token_ids`, `messages` or `texts`, and what goes
            with them. Image parts of messages may carry their images.
        sampling: the fields of Sampling, in the forms that `Client.generate` takes.
        window_tokens: the stream's credit window.
        images: bytes or paths, for what in the source stands for an image and has none.
        deadline_s: seconds until the answer has lost its worth, None for never.
        resume: whether what goes wrong is repaired by further attempts.
        priority: 0 to 9, the greatest is served first.
        session: a name that requests which belong together have in common; None for what their prompts have.
        hedge_after_s: seconds without a first token until a second worker is asked, too; None and infinity for never.
        explain: whether the end is to tell why the worker was chosen.
        ahead: the window is large enough for all tokens: the stream comes whole, though nobody reads it yet.

    Raises:
        BadRequestError: something is not valid; the message names the field.
    """
    messages, attachments = collect(source.get("messages"), images)
    given = {name: value for name, value in source.items() if value is not None}
    if messages is not None:
        given["messages"] = messages
    generation = check_generation({**given, "sampling": _sampling(sampling)})
    payload = pack_generation(generation)
    check_size(payload, attachments)
    texts, most = generation.texts or (), generation.sampling.max_tokens
    return Submit(
        id=new_id(),
        model=_model(model),
        payload=payload,
        window=ReceiveWindow(max(window_tokens, most) if ahead else window_tokens),
        attachments=attachments,
        deadline_s=_checked(optional(seconds), deadline_s, "deadline_s"),
        resume=_checked(boolean, resume, "resume"),
        max_tokens=0 if texts else most,
        priority=_checked(_check_priority, priority, "priority"),
        affinity=_affinity(generation, session),
        hedge_after_s=_hedge_after(hedge_after_s),
        explain=_checked(boolean, explain, "explain"),
        texts=len(texts),
    )


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return sampling arguments in the form of the wire."""
    chosen = {name: value for name, value in given.items() if value is not _UNSAID.get(name)}
    chosen.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
    for name in ("stop", "bad_words"):
        if isinstance(chosen.get(name), str):
            chosen[name] = (chosen[name],)
    if isinstance(chosen.get("logit_bias"), Mapping):
        chosen["logit_bias"] = tuple(chosen["logit_bias"].items())
    schema = chosen.get("json_schema")
    if schema is not None and not isinstance(schema, str):
        try:
            chosen["json_schema"] = json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequestError(f"request.sampling.json_schema: cannot be written as JSON: {error}") from error
    return chosen


def seeds(n: int, first: int | None) -> range:
    """Return the seeds of `n` completions of one prompt; None draws the first one.

    Raises:
        BadRequestError: there are not so many seeds, or not so many completions are allowed.
    """
    number: int = _checked(count(1, limits.MAX_COMPLETIONS), n, "n")
    most = MAX_SEED + 1 - number
    begin: int = secrets.randbelow(most + 1) if first is None else _checked(count(0, most), first, "seed")
    return range(begin, begin + number)


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
