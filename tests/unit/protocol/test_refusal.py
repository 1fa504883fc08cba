"""What is told of a failed handshake: the options that the reader has, and no guess as a certainty."""

from __future__ import annotations

import pytest

from tokenmq.protocol.refusal import AT_BACKEND, AT_FRONTEND, KEY_OPTIONS, UPLINK_KEY_OPTIONS, Refusal, explain

WHERE = "tcp://127.0.0.1:1"


@pytest.mark.parametrize("options", [KEY_OPTIONS, UPLINK_KEY_OPTIONS])
@pytest.mark.parametrize(
    ("refusal", "keyed"), [(Refusal.MISMATCH, True), (Refusal.MISMATCH, False), (Refusal.BROKEN_OFF, False)]
)
def test_both_options_are_named_as_the_command_calls_them(
    refusal: Refusal, keyed: bool, options: tuple[str, str]
) -> None:
    words = explain(refusal, WHERE, keyed=keyed, place=AT_BACKEND, options=options).replace(",", " ").split()
    assert {word.strip("()") for word in words if word.lstrip("(").startswith("--")} - {"--curve"} == set(options)


@pytest.mark.parametrize("keyed", [True, False])
def test_a_handshake_that_breaks_off_may_have_any_of_its_causes(keyed: bool) -> None:
    text = explain(Refusal.BROKEN_OFF, WHERE, keyed=keyed, place=AT_FRONTEND)
    for part in (WHERE, "--server-key", "has too many connections", "is no broker"):
        assert part in text


@pytest.mark.parametrize(("place", "who"), [(AT_FRONTEND, "a client or an admin"), (AT_BACKEND, "a worker")])
def test_what_we_take_the_endpoint_for_is_no_more_than_that(place: str, who: str) -> None:
    text = explain(Refusal.FORBIDDEN, WHERE, keyed=True, place=place)
    assert f"expected the key of {who}" in text
    assert "or is this not a " in text
