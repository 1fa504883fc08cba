"""Why a handshake failed, as the side sees it that connected, and what to do about it in words."""

from __future__ import annotations

from enum import Enum


class Refusal(Enum):
    """How a handshake ended."""

    #: The broker does not know our key, or has it in another list.
    FORBIDDEN = "forbidden"
    #: One side speaks CURVE and the other does not.
    MISMATCH = "mismatch"
    #: It broke off. Under CURVE a broker does that to who has another public key for it than its own. It also happens
    #: when a broker ends at that moment, with what is no broker, and in a mismatch that the other side saw first.
    BROKEN_OFF = "broken off"


#: Whose keys are let in, by the kind of endpoint.
AT_FRONTEND = "this is a frontend: clients and admins"
AT_BACKEND = "this is a backend: workers"


def explain(refusal: Refusal, endpoint: str, *, keyed: bool, place: str) -> str:
    """Return what happened at the endpoint and what to look at.

    Args:
        refusal: how the handshake ended.
        endpoint: where.
        keyed: we speak CURVE.
        place: AT_FRONTEND or AT_BACKEND.
    """
    if refusal is Refusal.FORBIDDEN:
        return (
            f"the broker at {endpoint} does not admit this key: "
            f"it is unknown there, revoked, or of another role ({place})"
        )
    if refusal is Refusal.MISMATCH:
        if keyed:
            return f"the broker at {endpoint} has no CURVE: give it --curve, or leave out --server-key and --key"
        return f"the broker at {endpoint} wants keys: give --server-key and --key"
    if keyed:
        return (
            f"the handshake with {endpoint} broke off: the broker has no CURVE, "
            "or its public key is another one than --server-key"
        )
    return f"the handshake with {endpoint} broke off: it wants keys (give --server-key and --key), or is no broker"
