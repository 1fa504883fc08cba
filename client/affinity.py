"""What requests have in common that one worker serves best: a key that a broker can compare, and not read.

A worker keeps the KV cache of prompts that it has computed. A request that begins like an earlier one costs less
where that one ran. The broker cannot see it, since it opens no payload: so the client tells it by a short hash of
the prompt's beginning. Equal beginnings give equal keys in every process and on every machine.
"""

from __future__ import annotations

from hashlib import blake2b

from ..protocol.packing import pack
from ..protocol.payload import Generation

#: Long enough to tell system prompts and few-shot examples apart, and short enough that what people ask behind them
#: stands outside: prompts with one beginning shall have one key, whatever their ends.
BEGINNING_CHARS = 1024
#: The same length, at about four characters a token.
BEGINNING_TOKENS = 256
_HASH_BYTES = 8


def affinity_of(generation: Generation, session: str | None = None) -> str:
    """Return the affinity of a request: 16 hexadecimal digits, or "" for embeddings, which no cache makes cheaper.

    Args:
        generation: what is asked for.
        session: a name that the application gave to requests that belong together; it counts in place of the prompt.

    Raises:
        ProtocolError: the name cannot be written in UTF-8.
    """
    if session is not None:
        return session_affinity(session)
    if generation.texts is not None:
        return ""
    if generation.messages is not None:
        # A conversation is sent whole with every turn, and grows at its end: up to the first user message it is the
        # same in all of them, and only there differs from others with the same system prompt.
        users = (n for n, message in enumerate(generation.messages, 1) if message["role"] == "user")
        return _key(b"messages", list(generation.messages[: next(users, None)]))
    if generation.token_ids is not None:
        return _key(b"token_ids", list(generation.token_ids[:BEGINNING_TOKENS]))
    return _key(b"prompt", (generation.prompt or "")[:BEGINNING_CHARS])


def session_affinity(session: str) -> str:
    """Return the affinity of all requests of a session.

    Raises:
        ProtocolError: the name cannot be written in UTF-8.
    """
    return _key(b"session", session)


def _key(kind: bytes, value: object) -> str:
    # The kind is part of the key, lest a session meet a prompt that reads like its name.
    return blake2b(pack(value), digest_size=_HASH_BYTES, person=kind).hexdigest()
