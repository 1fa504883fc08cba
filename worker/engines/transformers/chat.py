"""How a chat template wants the content of a message: as a string, as a list of parts, or either.

A template is a program, and tells only by what it does with each of them. One that takes parts only drops strings
without a word, or walks through their characters; one that takes strings only prints a list as Python would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: What a trial looks for in the rendered text; templates may trim around it.
_PROBE = "tokenmq"


@dataclass(frozen=True, slots=True)
class ContentForms:
    """What a chat template takes as content.

    Attributes:
        strings: strings.
        parts: lists of parts.
    """

    strings: bool = True
    parts: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> ContentForms:
        """Try what the template of a tokenizer takes; strings where it takes neither, or there is none."""
        if tokenizer.chat_template is None:
            return cls()
        parts = _takes(tokenizer, [{"type": "text", "text": _PROBE}])
        return cls(strings=not parts or _takes(tokenizer, _PROBE), parts=parts)

    def convert(self, content: Any, mark: str) -> Any:
        """Return a message's content in a form that the template takes.

        Args:
            content: a string, a list of parts (text and image), or None.
            mark: what stands for an image where only strings are taken; a line of its own, as LLaVA writes it.
        """
        if isinstance(content, str) and not self.strings:
            return [{"type": "text", "text": content}]
        if isinstance(content, Sequence) and not isinstance(content, str) and not self.parts:
            return "".join(_text(part, mark) for part in content)
        return content


def _text(part: Mapping[str, Any], mark: str) -> str:
    text: str = part["text"] if part["type"] == "text" else f"{mark}\n"
    return text


def _takes(tokenizer: Any, content: Any) -> bool:
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except Exception:  # noqa: BLE001 (a template may raise anything; then it does not take it)
        return False
    # A list that is printed has its keys in the text.
    return _PROBE in text and "'type'" not in text and '"type"' not in text
