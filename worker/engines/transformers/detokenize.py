"""Token ids to text, as they come: never half a character, and in the end exactly what a full decode gives."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

#: Tokens in a row that may complete no text. A character has 4 bytes, so behind that many there is a run of broken
#: ones, and the library decodes the whole run again with each token of it.
MOST_HELD = 64
#: How many of them stay, for a character that has just begun.
KEPT = 8


class Detokenizer:
    """Decodes one stream of tokens; special tokens give no text.

    The pieces joined equal the decode of all ids at once. One exception lies in the nature of things: tokenizers with
    byte fallback (Llama 2) decode a whole run of byte tokens to replacement characters when one of them is invalid,
    also the characters that had been complete; those were sent long ago and stay.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode with `tokenizer`, the `backend_tokenizer` of a transformers one."""
        self._tokenizer = tokenizer
        self._special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._sent = ""
        self._decoded = 0

    def feed(self, token_id: int) -> str:
        """Take a token; return the text that it completes, which may be none."""
        if token_id in self._special:
            return ""  # not fed: a run of them would be decoded again and again
        self._token_ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 (the library raises bare Exception)
            # Later tokens changed text that is out already (byte fallback): go on after it with a fresh stream.
            self._stream = DecodeStream(skip_special_tokens=True)
            self._decoded = len(self._token_ids)
            return ""
        if text:
            self._sent += text
            self._decoded = len(self._token_ids)
            return text
        return self._release() if len(self._token_ids) - self._decoded > MOST_HELD else ""

    def _release(self) -> str:
        """Return the text of a long run of broken bytes but for its newest tokens, where it can be cut there."""
        held = self._token_ids[self._decoded :]
        old, new = (self._tokenizer.decode(part) for part in (held[:-KEPT], held[-KEPT:]))
        if self._tokenizer.decode(held) != old + new:
            return ""
        self._stream = DecodeStream(skip_special_tokens=True)
        for token in held[-KEPT:]:
            self._stream.step(self._tokenizer, token)  # no text: it still ends in a broken character
        self._sent += old
        self._decoded = len(self._token_ids) - KEPT
        return old

    def flush(self) -> str:
        """End the stream; return what the full decode has beyond the text so far, such as half a character."""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        if whole.startswith(self._sent):
            return whole[len(self._sent) :]
        return self._tokenizer.decode(self._token_ids[self._decoded :], skip_special_tokens=True)
