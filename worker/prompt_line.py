"""What `--log-prompts` writes of a request: the begin of its prompt, on one line. Without it no prompt is logged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..protocol.payload import Generation

#: Characters of a prompt that are logged: enough to know it again.
MAX_CHARS = 1_000
#: Token ids, where a prompt has no text: about as long.
MAX_IDS = 150


def begin_of_prompt(generation: Generation) -> str:
    """Return the begin of a prompt, of a chat with its roles, of texts to embed one after the other.

    What is cut off ends in three dots; images are told by their marks alone.
    """
    if generation.token_ids is not None:
        ids = " ".join(map(str, generation.token_ids[:MAX_IDS]))
        return ids + ("..." if len(generation.token_ids) > MAX_IDS else "")
    found = ""
    for text in _texts(generation):
        found += ("\n" if found else "") + text[: MAX_CHARS + 1]
        if len(found) > MAX_CHARS:
            return found[:MAX_CHARS] + "..."
    return found


def _texts(generation: Generation) -> Iterator[str]:
    if generation.prompt is not None:
        yield generation.prompt
    yield from generation.texts or ()
    for message in generation.messages or ():
        content: Any = message["content"]
        if isinstance(content, str):
            yield f"{message['role']}: {content[: MAX_CHARS + 1]}"
        else:
            for part in content or ():
                yield f"{message['role']}: {part['text'][: MAX_CHARS + 1] if part['type'] == 'text' else '[image]'}"
