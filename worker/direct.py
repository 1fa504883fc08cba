"""Which of the clients' own connections takes the chunks of a request: keys, and who has shown them.

A key comes twice, from the broker in a request and from the client in an ATTACH, and the two race. So a key that no
request has brought yet is remembered for a while: nobody can guess one, and what is never brought costs a place in a
short list. What is kept is bounded:

- keys of requests that are held: at most one each;
- keys without a request, whose client is connected: the latest of them, since the next request may come soon;
- keys that no request has brought: the latest of them, so that a stranger pushes out nothing but these.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

#: Keys that no request has brought yet: an ATTACH is ahead of its request by milliseconds.
MOST_EARLY = 1024
#: Keys of clients that are connected and have no request here: more than a client has connections open for nothing.
MOST_IDLE = 4096


@dataclass(slots=True)
class _Key:
    """A key that a broker has given.

    Attributes:
        broker: who gave it.
        held: requests with it that the worker holds.
        peer: the connection that has shown it; None where none has.
    """

    broker: str
    held: int = 0
    peer: bytes | None = None


class Attachments:
    """All keys, and the connections that have shown them."""

    def __init__(self) -> None:
        """Know none."""
        self._keys: dict[bytes, _Key] = {}
        #: Those of `_keys` that no request is held with, the latest last.
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        #: What was shown and is not among `_keys`, the latest last.
        self._early: OrderedDict[bytes, bytes] = OrderedDict()
        #: What each connection has shown of either kind.
        self._shown: dict[bytes, set[bytes]] = {}

    def __len__(self) -> int:
        """Return how many keys are remembered, given ones and early ones."""
        return len(self._keys) + len(self._early)

    def peer(self, key: bytes) -> bytes | None:
        """Return the connection that takes the chunks of requests with this key; None where none does."""
        known = self._keys.get(key)
        return None if known is None else known.peer

    def hold(self, key: bytes, broker: str) -> None:
        """Note a request with this key that the worker holds from now on."""
        known = self._keys.get(key)
        if known is None:
            known = self._keys[key] = _Key(broker, peer=self._early.pop(key, None))
        known.held += 1
        self._idle.pop(key, None)

    def release(self, key: bytes) -> None:
        """Note that the worker holds one request less with this key."""
        known = self._keys.get(key)
        if known is None:
            return  # its broker's session has ended
        known.held -= 1
        if known.held:
            return
        if known.peer is None:
            del self._keys[key]
            return
        self._idle[key] = None
        if len(self._idle) > MOST_IDLE:
            self._forget(next(iter(self._idle)))

    def attach(self, key: bytes, peer: bytes) -> None:
        """Take what a client shows; of two connections with the same key the later one counts."""
        known = self._keys.get(key)
        before = self._early.get(key) if known is None else known.peer
        if before is not None:
            self._unshow(key, before)
        self._shown.setdefault(peer, set()).add(key)
        if known is not None:
            known.peer = peer
            return
        self._early[key] = peer
        self._early.move_to_end(key)
        if len(self._early) > MOST_EARLY:
            self._unshow(*self._early.popitem(last=False))

    def leave(self, peer: bytes) -> None:
        """Send nothing to this connection any more."""
        for key in self._shown.pop(peer, ()):
            known = self._keys.get(key)
            if known is None:
                del self._early[key]
                continue
            known.peer = None
            if not known.held:
                del self._keys[key], self._idle[key]

    def end(self, broker: str) -> None:
        """Forget what this broker has given: its session has ended."""
        for key in [key for key, known in self._keys.items() if known.broker == broker]:
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        peer = self._keys.pop(key).peer
        self._idle.pop(key, None)
        if peer is not None:
            self._unshow(key, peer)

    def _unshow(self, key: bytes, peer: bytes) -> None:
        keys = self._shown[peer]
        keys.remove(key)
        if not keys:
            del self._shown[peer]

    def validate(self) -> None:
        """Check what must hold between two events; raises AssertionError with the key at fault."""
        for key, known in self._keys.items():
            assert key not in self._early, key
            assert (key in self._idle) == (known.held == 0), key
            assert known.held or known.peer is not None, key
        assert self._idle.keys() <= self._keys.keys(), self._idle
        assert len(self._idle) <= MOST_IDLE, len(self._idle)
        assert len(self._early) <= MOST_EARLY, len(self._early)
        shown = dict(self._early)
        shown |= {key: known.peer for key, known in self._keys.items() if known.peer is not None}
        assert {key: peer for peer, keys in self._shown.items() for key in keys} == shown, "shown by another one"
        assert all(self._shown.values()), self._shown
