"""The two ends of a flow-control window."""

from __future__ import annotations

import pytest

from tokenmq.protocol.credit import WINDOW_TOKENS, ReceiveWindow, SendWindow
from tokenmq.protocol.errors import ProtocolError


def test_the_sender_may_send_up_to_the_limit() -> None:
    window = SendWindow(limit=10)
    assert window.available == 10
    window.send(4)
    window.send(6)
    assert (window.sent, window.available) == (10, 0)
    window.send(0)
    with pytest.raises(ValueError, match="1 tokens to send, credit for 0"):
        window.send(1)
    assert window.sent == 10


def test_a_grant_raises_the_limit() -> None:
    window = SendWindow(limit=4, sent=4)
    assert window.grant(7)
    assert window.available == 3


@pytest.mark.parametrize("limit", [0, 3, 4])
def test_late_and_repeated_grants_change_nothing(limit: int) -> None:
    window = SendWindow(limit=4, sent=1)
    assert not window.grant(limit)
    assert window.limit == 4


def test_a_stream_that_resumes_beyond_its_limit_waits() -> None:
    window = SendWindow(limit=5, sent=8)
    assert window.available == 0
    window.grant(9)
    assert window.available == 1


def test_the_first_window_is_granted_at_once() -> None:
    assert ReceiveWindow().limit == WINDOW_TOKENS
    assert ReceiveWindow(size=8, limit=20).limit == 20


@pytest.mark.parametrize("size", [0, -1])
def test_a_window_holds_at_least_a_token(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        ReceiveWindow(size=size)


def test_an_overrun_is_a_fault_of_the_sender() -> None:
    window = ReceiveWindow(size=8)
    window.receive(8)
    with pytest.raises(ProtocolError, match="credit overrun: 9 tokens received, 8 were granted"):
        window.receive(1)
    assert window.received == 8


def test_half_a_window_consumed_is_granted_anew() -> None:
    window = ReceiveWindow(size=8)
    window.receive(8)
    assert window.consume(3) is None
    assert window.consume(1) == 12
    assert window.consume(3) is None
    assert window.consume(1) == 16


def test_only_what_was_received_can_be_consumed() -> None:
    window = ReceiveWindow(size=8)
    window.receive(2)
    with pytest.raises(ValueError, match="3 tokens consumed, 2 were received"):
        window.consume(3)
    assert window.consumed == 0


@pytest.mark.parametrize("size", [1, 2, 3, 256])
def test_a_reader_that_has_read_all_never_leaves_the_sender_without_credit(size: int) -> None:
    sender, reader = SendWindow(limit=size), ReceiveWindow(size=size)
    for _ in range(20):
        tokens = sender.available
        assert tokens > 0
        sender.send(tokens)
        reader.receive(tokens)
        limit = reader.consume(tokens)
        assert limit is not None
        sender.grant(limit)
