"""Codes and exceptions."""

from __future__ import annotations

import pytest

from tokenmq.protocol import errors
from tokenmq.protocol.errors import ErrorCode, ProtocolError, TokenmqError, exception_for


@pytest.mark.parametrize("code", [code for code in ErrorCode if code is not ErrorCode.PROTOCOL])
def test_each_code_has_an_exception_of_its_own(code: ErrorCode) -> None:
    error = exception_for(code.value, "what", retryable=True, retry_after_s=2.5, request_id="0a")
    assert type(error).__name__ == code.value.title().replace("_", "") + "Error"
    assert type(error) is getattr(errors, type(error).__name__)
    assert (error.code, error.message, str(error)) == (code.value, "what", "what")
    assert (error.retryable, error.retry_after_s, error.request_id) == (True, 2.5, "0a")


@pytest.mark.parametrize("code", ["protocol", "too_hot", ""])
def test_other_codes_give_the_base_with_the_code(code: str) -> None:
    error = exception_for(code, "what")
    assert type(error) is TokenmqError
    assert (error.code, error.retryable, error.retry_after_s, error.request_id) == (code, False, None, "")


def test_an_exception_has_its_code_by_itself() -> None:
    assert errors.BusyError("full").code == "busy"
    assert ProtocolError("bad").code == "protocol"


def test_a_protocol_error_may_name_what_can_be_answered() -> None:
    assert ProtocolError("bad").subject is None
    assert ProtocolError("bad", subject=b"x" * 16).subject == b"x" * 16
