"""The keys of a peer that connects to servers with CURVE, as users give them: one secret, and a public key each."""

from __future__ import annotations

from collections.abc import Sequence

from .keys import Curve, KeyFileError, load_pair, public_key


def curves(server_keys: Sequence[str], key: str, endpoints: Sequence[str]) -> tuple[Curve, ...]:
    """Return what each connection needs, in the order of the endpoints; nothing where no keys are given.

    Args:
        server_keys: the servers' public keys, each as text (Z85) or as the path of its file: one for all of them, or
            one for each endpoint.
        key: the path of the peer's own secret file; "" for none.
        endpoints: the servers.

    Raises:
        KeyFileError: a key cannot be used, or one of the two is missing; the message says which.
    """
    if not server_keys and not key:
        return ()
    if not key:
        raise KeyFileError("a server key is given, and no key of one's own: --key FILE is needed, too")
    if not server_keys:
        raise KeyFileError("a key is given, and no server key: --server-key is needed, too, the broker's public key")
    if len(server_keys) not in (1, len(endpoints)):
        raise KeyFileError(
            f"{len(server_keys)} server keys for {_counted(len(endpoints), 'endpoint')}: "
            "expected one for all of them, or one for each"
        )
    pair = load_pair(key)
    publics = [public_key(each) for each in server_keys]
    return tuple(Curve(pair, publics[index % len(publics)]) for index in range(len(endpoints)))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
