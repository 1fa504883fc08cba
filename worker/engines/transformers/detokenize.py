"""Token ids to text, as they come: never half a character, and in the end exactly what a full decode gives."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decodes one stream of tokens; special tokens give no text.

    The pieces joined equal the decode of all ids at once. One exception lies in the nature of things: tokenizers with
    byte fallback (Llama 2) decode a whole run of byte tokens to replacement characters when one of them is invalid,
    also the characters that had been complete; those were sent long ago and stay.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Decode with `tokenizer`, the `backend_tokenizer` of a transformers one."""
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._sent = ""
        self._decoded = 0

    def feed(self, token_id: int) -> str:
        """Take a token; return the text that it completes, which may be none."""
        self._token_ids.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # noqa: BLE001 (the library raises bare Exception)
            # Later tokens changed text that is out already (byte fallback): go on after it with a fresh stream.
            self._stream = DecodeStream(skip_special_tokens=True)
            self._decoded = len(self._token_ids)
            return ""
        if not text:
            return ""
        self._sent += text
        self._decoded = len(self._token_ids)
        return text

    def flush(self) -> str:
        """End the stream; return what the full decode has beyond the text so far, such as half a character."""
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        if whole.startswith(self._sent):
            return whole[len(self._sent) :]
        return self._tokenizer.decode(self._token_ids[self._decoded :], skip_special_tokens=True)
