"""One request at the server: its pieces, counted and put together as outputs of an engine. No I/O.

How tokens are counted. Offsets, credit and `max_tokens` are in tokens, and a reader takes a stream for broken that
ends with other than the number of tokens that came. So each token that the server counts is brought exactly once:

- A server that tells ids (`token_ids` of vLLM and SGLang) gives the tokens.
- With logprobs there is one entry a token; the ids in them are used where there are any (llama.cpp), else 0.
- Else each piece that says something is one token with id 0. A piece may have been several tokens, or a token may
  have had no text: what the server's usage counts beyond the pieces comes at the end, as tokens 0 without text.

So the sum is that of the server's usage. Where pieces are more than that, the pieces count; never more than
`max_tokens`: what a server sends beyond is text without tokens, and after MAX_SURPLUS such pieces the stream is ended
as `length`, as it is when very much comes that is for no token. The id 0 stands for "not told"; such tokens cannot be
given to another worker to go on behind.
"""

from __future__ import annotations

import json

from ....protocol.errors import ErrorCode
from ....protocol.messages import Details, FinishReason
from ....protocol.payload import Sampling
from ..base import Done, Failed, Output, Tokens
from ..stops import StopMatcher
from .pieces import Call, Piece

#: Pieces beyond max_tokens that are no fault: a server may flush what it held back for a stop string or a character.
MAX_SURPLUS = 8
#: Characters that a server sends for no token: none does so but for a few at the end of a stream.
MAX_UNPAID_CHARS = 262_144
_REASONING_BEGIN, _REASONING_END = "<think>", "</think>"
#: Reasons for which a completion is not what was asked for.
_CUT_BY_SERVER = {"content_filter": False, "abort": True, "error": True}


class Row:
    """A job that the server runs.

    Attributes:
        ticket: the job's.
        ended: Done or Failed has been returned; nothing more comes.
        begun: the first token has come.
        prompt_tokens: by the server's usage, once it has told.
        cached_tokens: those of them that it found in its prefix cache.
    """

    def __init__(self, ticket: int, sampling: Sampling, now: float, *, echo: str = "", watch_stops: bool = False):
        """Begin.

        Args:
            ticket: the job's.
            sampling: the job's.
            now: the time, in seconds.
            echo: what the text begins with.
            watch_stops: the server was not told the stop strings.
        """
        self.ticket = ticket
        self.ended = False
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._most = sampling.max_tokens
        self._tells_logprobs = sampling.logprobs is not None
        self._stop = StopMatcher(sampling.stop if watch_stops else ())
        #: Text that waits for the next token.
        self._text = echo
        self._tokens = 0
        self._surplus = 0
        self._unpaid_chars = 0
        self._ids_are_told = False
        self._reasons = False
        self._calls: dict[int, Call] = {}
        self._reason = ""
        self._counted = 0
        self._submitted = now
        self._first_at: float | None = None
        self._last_at = now

    @property
    def begun(self) -> bool:
        """Whether the first token has come."""
        return self._first_at is not None

    def take(self, piece: Piece, now: float) -> list[Output]:
        """Take what the server sent; where `ended` is true after it, the rest of its stream is not wanted."""
        if piece.prompt_tokens is not None:
            self.prompt_tokens, self.cached_tokens = piece.prompt_tokens, piece.cached_tokens
        self._counted = piece.completion_tokens or self._counted
        self._reason = piece.reason or self._reason
        self._text += self._stop.feed(self._readable(piece))
        ids = self._ids(piece)
        room = self._most - self._tokens
        if len(ids) > room:
            self._surplus += len(ids) - room
            ids = ids[:room]
        outputs: list[Output] = []
        if ids:
            details = self._details(piece, len(ids))
            outputs.append(self._bring(ids, details))
            self._first_at = now if self._first_at is None else self._first_at
            self._last_at = now
        if self._stop.stopped:
            return [*outputs, *self._finish(FinishReason.STOP)]
        if not ids:
            self._unpaid_chars += piece.chars
        if self._surplus > MAX_SURPLUS or self._unpaid_chars > MAX_UNPAID_CHARS:
            return [*outputs, *self._finish(FinishReason.LENGTH)]
        return outputs

    def end(self, server: str) -> list[Output]:
        """Take the end of the server's stream."""
        if not self._reason:
            return self.fail(ErrorCode.ENGINE_FAILED, f"{server} ended the stream in the middle", retryable=True)
        if self._reason in _CUT_BY_SERVER:
            text = f"{server} ended the completion: {self._reason}"
            return self.fail(ErrorCode.ENGINE_FAILED, text, retryable=_CUT_BY_SERVER[self._reason])
        self._text += self._stop.feed(self._written_calls())
        if not self._stop.stopped:
            self._text += self._stop.flush()
        missing = min(self._counted, self._most) - self._tokens
        outputs: list[Output] = [self._bring((0,) * missing)] if missing > 0 else []
        return [*outputs, *self._finish(FinishReason.LENGTH if self._reason == "length" else FinishReason.STOP)]

    def fail(self, code: ErrorCode, message: str, *, retryable: bool) -> list[Output]:
        """End badly."""
        self.ended = True
        return [Failed(self.ticket, code.value, message, retryable)]

    def cancel(self) -> list[Output]:
        """End because nobody waits any more."""
        self._text = ""
        return self._finish(FinishReason.CANCELLED)

    def _finish(self, reason: FinishReason) -> list[Output]:
        self.ended = True
        rest: list[Output] = [self._bring(())] if self._text else []
        begin = self._last_at if self._first_at is None else self._first_at
        prefill_s, decode_s = begin - self._submitted, self._last_at - begin
        done = Done(self.ticket, reason, self.prompt_tokens, self._tokens, prefill_s=prefill_s, decode_s=decode_s)
        return [*rest, done]

    def _bring(self, ids: tuple[int, ...], details: Details | None = None) -> Tokens:
        text, self._text = self._text, ""
        self._tokens += len(ids)
        return Tokens(self.ticket, ids, text, 0, details)

    def _ids(self, piece: Piece) -> tuple[int, ...]:
        if piece.token_ids is not None:
            self._ids_are_told = True
            return piece.token_ids
        if piece.logprobs:
            return tuple(one.token_id for one in piece.logprobs)
        return (0,) if piece.speaks and not self._ids_are_told else ()

    def _details(self, piece: Piece, count: int) -> Details | None:
        if not self._tells_logprobs or len(piece.logprobs) < count:
            return None
        return Details(piece.logprobs[:count])

    # --- what a server has told apart, put together again -----------------------------------------------------------

    def _readable(self, piece: Piece) -> str:
        """Return a piece's text; reasoning stands between marks, and calls are kept until they are complete."""
        text = piece.text
        if piece.reasoning:
            text = ("" if self._reasons else _REASONING_BEGIN) + piece.reasoning
            self._reasons = True
        if self._reasons and piece.text:
            text = (piece.reasoning and text) + _REASONING_END + piece.text
            self._reasons = False
        for part in piece.calls:
            known = self._calls.get(part.index, Call(part.index))
            self._calls[part.index] = Call(part.index, known.name or part.name, known.arguments + part.arguments)
        return text

    def _written_calls(self) -> str:
        """Return the calls as most models write them (Hermes' form): the chunks of TMQ/1 have text only."""
        return "".join(f"<tool_call>\n{_written(call)}\n</tool_call>" for call in self._calls.values())


def _written(call: Call) -> str:
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = call.arguments  # cut off by max_tokens
    return json.dumps({"name": call.name, "arguments": arguments}, ensure_ascii=False)
