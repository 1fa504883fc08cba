"""What an echo may bring."""

from __future__ import annotations

import pytest

from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.errors import BadRequestError
from tokenmq.protocol.limits import MAX_LOGPROBS
from tokenmq.protocol.messages import Chunk, Chunks, Details, TokenLogprob, TokenLogprobs
from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.echo import MAX_ECHO_ARRAYS, check_echo
from tokenmq.worker.streams import batches

ID = bytes(16)


def echo(logprobs: int | None, *, wanted: bool = True) -> Generation:
    return Generation(prompt="x", sampling=Sampling(logprobs=logprobs), echo=wanted)


def test_only_an_echo_with_logprobs_is_bounded() -> None:
    check_echo(echo(None), 10**6)
    check_echo(echo(5, wanted=False), 10**6)
    with pytest.raises(BadRequestError, match="room for a prompt of 3855 tokens, this one has 3856"):
        check_echo(echo(32), 3856)


def entry(text: str) -> TokenLogprobs:
    top = tuple(TokenLogprob(2**31 - 1, text, -12.25) for _ in range(MAX_LOGPROBS))
    return TokenLogprobs(2**31 - 1, text, -1.5, top)


def test_the_longest_echo_fits_a_message_and_so_do_many_of_them() -> None:
    most = MAX_ECHO_ARRAYS // (MAX_LOGPROBS + 2)
    check_echo(echo(MAX_LOGPROBS), most)
    one = entry(" token")
    longest = Chunk(ID, 1, 0, 0, (1,), "text", Details((one,), (one,) * most))
    small = Chunk(ID, 1, 0, 0, (1,) * 300, "text", Details((one,) * 300))
    sent = []
    for batch in batches([small] * 40 + [longest, longest] + [small] * 40):
        sent += decode(encode(Chunks(ID, batch))).chunks  # type: ignore[union-attr]
    assert len(sent) == 82
