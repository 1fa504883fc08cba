"""Who is let in at the sockets: the keys in the broker's folder, which is read anew all the time."""

from __future__ import annotations

import logging
from typing import Any

import zmq

from ..protocol.identity import Allowed, Identity
from ..protocol.log import Log, write
from ..transport.keyring import Keyring
from ..transport.keys import KeyPair
from ..transport.pump import Pump
from ..transport.zap import Zap, key_of
from .clients import ROLES as CLIENT_ROLES
from .workers import ROLES as WORKER_ROLES

logger = logging.getLogger("tokenmq.broker")

#: What the ZAP handler knows the two sockets by.
FRONTEND, BACKEND = "frontend", "backend"
_ROLES = {FRONTEND: CLIENT_ROLES, BACKEND: WORKER_ROLES}
#: The folder is looked at so often: who is revoked is to be gone within a second.
LOOK_S = 0.25
#: Names in one line of the log.
_MOST_NAMES = 8
#: Refused keys are logged at most once in this time, with their number.
_REFUSED_LOG_S = 1.0


class Access:
    """The keys of a broker.

    Attributes:
        server: the broker's own pair.
        allowed: whom it lets in, as last read.
        look_at: when to look at the folder again.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], pump: Pump, folder: str, now: float) -> None:
        """Read the keys, and answer handshakes from now on.

        Raises:
            KeyFileError: the folder is none of keys, or others can write to it; the message says what to do.
        """
        self._keyring = Keyring(folder)
        self._complain()
        self.server: KeyPair = self._keyring.server
        self.allowed: Allowed = self._keyring.allowed
        self.look_at = now + LOOK_S
        self._refused = 0
        self._refused_logged_at = now - _REFUSED_LOG_S
        self._now = now
        self._zap = Zap(context, pump, self._admits)
        self._zap.serve(*_ROLES)
        self.socket = self._zap.zap_socket

    def answer(self, now: float) -> None:
        """Answer the handshakes that wait."""
        self._now = now
        self._zap.answer()

    def look(self, now: float) -> Allowed | None:
        """Look at the folder if it is time; return whom to let in from now on, where that has changed."""
        if now < self.look_at:
            return None
        self.look_at = now + LOOK_S
        changed = self._keyring.poll()
        self._complain()
        if not changed:
            return None
        before, self.allowed = self.allowed, self._keyring.allowed
        told = {
            "keys": len(self.allowed.by_key),
            "new": _names(before, self.allowed),
            "gone": _names(self.allowed, before),
        }
        level = logging.INFO if self.allowed.by_key else logging.ERROR
        write(logger, Log("keys_changed", told, level=level))
        return self.allowed

    def who(self, frame: Any) -> Identity | None:
        """Return whose key the sender of an uncopied frame has shown; None for nobody that is let in any more."""
        key = key_of(frame)
        return None if key is None else self.allowed.by_key.get(key)

    def close(self) -> None:
        """Answer nothing more."""
        self._zap.close()

    def _admits(self, domain: str, key: str, address: str) -> bool:
        identity = self.allowed.by_key.get(key)
        if identity is not None and identity.role in _ROLES[domain]:
            return True
        self._refused += 1
        if self._now >= self._refused_logged_at + _REFUSED_LOG_S:
            whose = {"name": identity.name, "role": identity.role.value} if identity else {"why": "unknown"}
            told = {"side": domain, "key": key, **whose, "from": address, "count": self._refused}
            write(logger, Log("key_refused", told, level=logging.WARNING))
            self._refused, self._refused_logged_at = 0, self._now
        return False

    def _complain(self) -> None:
        for complaint in self._keyring.complaints():
            write(logger, Log("key_left_out", {"why": complaint}, level=logging.WARNING))


def _names(before: Allowed, after: Allowed) -> str:
    """Return who is on a list that was not on another one, or not as the same: the first few by name."""
    names = sorted(
        f"{one.role.value}:{one.name}" for key, one in after.by_key.items() if before.by_key.get(key) != one
    )
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ",".join(names[:_MOST_NAMES]) + more or "none"
