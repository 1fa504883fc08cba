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
    #: when a broker has too many connections or ends at that moment, with what is no broker, and in a mismatch that
    #: the other side saw first.
    BROKEN_OFF = "broken off"


#: Whose keys are let in, by the kind of endpoint that we take it for.
AT_FRONTEND = "expected the key of a client or an admin; or is this not a frontend?"
AT_BACKEND = "expected the key of a worker; or is this not a backend?"
#: What the options are called that give the other side's public key and one's own secret one.
KEY_OPTIONS = ("--server-key", "--key")
UPLINK_KEY_OPTIONS = ("--uplink-server-key", "--uplink-key")


def explain(
    refusal: Refusal, endpoint: str, *, keyed: bool, place: str, options: tuple[str, str] = KEY_OPTIONS
) -> str:
    """Return what happened at the endpoint and what to look at.

    Args:
        refusal: how the handshake ended.
        endpoint: where.
        keyed: we speak CURVE.
        place: AT_FRONTEND or AT_BACKEND.
        options: KEY_OPTIONS, or where a broker is the one that connects, UPLINK_KEY_OPTIONS.
    """
    server_key, key = options
    if refusal is Refusal.FORBIDDEN:
        return (
            f"the broker at {endpoint} does not admit this key: "
            f"it is unknown there, revoked, or of another role ({place})"
        )
    if refusal is Refusal.MISMATCH:
        if keyed:
            return f"the broker at {endpoint} has no CURVE: give it --curve, or leave out {server_key} and {key}"
        return f"the broker at {endpoint} wants keys: give {server_key} and {key}"
    why = (
        f"it has another public key than {server_key}, or no CURVE at all"
        if keyed
        else f"it wants keys (give {server_key} and {key})"
    )
    return f"the handshake with {endpoint} broke off: {why}, or has too many connections, or is no broker"
