"""The client's own connections to workers, which chunks take past the broker (SPEC.md, 14).

They carry chunks and credit, and nothing depends on them: without one, chunks come through the broker. A connection
is made when a broker offers a worker's endpoint that is in a network that the user has named. It is closed when
nothing has used it for a while.

    no link  --offer-->  dialled  --connected-->  open: keys are shown, chunks may come
       ^                    |                       |
       +---- not in time ---+------ lost, idle -----+     no new try within REDIAL_S of the last one

What becomes of streams is not decided here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from ..protocol.messages import Attach, Goodbye
from ..protocol.orders import Orders
from ..transport.networks import Networks
from .events import Action, Dial, HangUp, Tell

#: Time for TCP and the ZMTP handshake: a host in reach takes milliseconds, and nobody waits for this one.
DIAL_S = 2.0
#: Least time from one try to the next at the same endpoint, however the first one went.
REDIAL_S = 30.0
#: A link that no stream has used for so long is closed.
IDLE_S = 60.0
#: Links at a time: each is three of the 1,023 sockets that libzmq allows. Chunks of further workers go through the
#: broker.
MOST_LINKS = 64
#: Keys of one link: a worker's session with a broker has one, and the latest count.
MOST_KEYS = 64
#: Endpoints that are remembered for not being dialled again too soon.
_MOST_TRIED = 1024


@dataclass(slots=True)
class _Link:
    """A connection to a worker, or the try to make one.

    Attributes:
        server_key: whom it is a connection to; "" where CURVE does not tell.
        look_at: when the try is given up, or when an open link is looked at for having become idle.
        open: it is connected.
        keys: what was offered for this endpoint, and by which broker, the latest last.
    """

    server_key: str
    look_at: float
    open: bool = False
    keys: OrderedDict[bytes, str] = field(default_factory=OrderedDict)


class Direct:
    """All links to workers, by endpoint."""

    def __init__(self, networks: Networks, orders: Orders[Action], *, keyed: bool = False) -> None:
        """Have none.

        Args:
            networks: where workers may be that are dialled.
            orders: takes what is to be done.
            keyed: the client has keys: then it dials only workers that have some, too, and else only others.
        """
        self._keyed = keyed
        self._networks = networks
        self._orders = orders
        self._links: dict[str, _Link] = {}
        #: When each endpoint was tried last, the latest last.
        self._tried: OrderedDict[str, float] = OrderedDict()

    def is_open(self, endpoint: str) -> bool:
        """Tell whether chunks can come from there."""
        link = self._links.get(endpoint)
        return link is not None and link.open

    def has(self, endpoint: str) -> bool:
        """Tell whether there is a link, or a try to make one."""
        return endpoint in self._links

    def giver(self, endpoint: str, key: bytes) -> str | None:
        """Return the broker that has given the key of a link; None where none has, or has for another one."""
        return self._links[endpoint].keys.get(key)

    def offered(self, endpoint: str, key: bytes, broker: str, now: float, server_key: str = "") -> None:
        """Take a broker's word that chunks can be had at this endpoint, with this key.

        Args:
            endpoint: the worker's own.
            key: what is shown there.
            broker: who says so.
            now: the time.
            server_key: the worker's public key; "" where it speaks no CURVE.
        """
        link = self._links.get(endpoint)
        if link is None:
            link = self._dial(endpoint, server_key, now)
            if link is None:
                return
        if link.server_key != server_key:
            return  # who is there is somebody else
        if link.open:
            link.look_at = now + IDLE_S
        if key in link.keys:
            link.keys.move_to_end(key)  # the ones that are out of use make room
            return
        link.keys[key] = broker
        if len(link.keys) > MOST_KEYS:
            link.keys.popitem(last=False)
        if link.open:
            self._orders.add(Tell(endpoint, Attach(key)))

    def _dial(self, endpoint: str, server_key: str, now: float) -> _Link | None:
        # What is encrypted elsewhere is not to leave in the clear, and without keys nobody would be let in.
        if bool(server_key) is not self._keyed:
            return None
        if len(self._links) >= MOST_LINKS or now < self._tried.get(endpoint, -REDIAL_S) + REDIAL_S:
            return None
        if not self._networks.has(endpoint):
            return None
        self._tried[endpoint] = now
        self._tried.move_to_end(endpoint)
        if len(self._tried) > _MOST_TRIED:
            self._tried.popitem(last=False)
        link = self._links[endpoint] = _Link(server_key, now + DIAL_S)
        self._orders.add(Dial(endpoint, server_key))
        return link

    def connected(self, endpoint: str, now: float) -> None:
        """Show the keys that were offered meanwhile."""
        link = self._links.get(endpoint)
        if link is None or link.open:
            return
        link.open, link.look_at = True, now + IDLE_S
        self._orders.log("direct_opened", endpoint=endpoint)
        for key in link.keys:
            self._orders.add(Tell(endpoint, Attach(key)))

    def part(self, endpoint: str, reason: str) -> bool:
        """Close a link; tell whether chunks could come by it."""
        link = self._links.pop(endpoint)
        self._orders.add(HangUp(endpoint))
        self._orders.log("direct_lost" if link.open else "direct_unreached", endpoint=endpoint, reason=reason)
        return link.open

    def session_ended(self, broker: str) -> None:
        """Forget the keys of a broker: it has forgotten the client."""
        for link in self._links.values():
            for key in [key for key, giver in link.keys.items() if giver == broker]:
                del link.keys[key]

    def close(self) -> None:
        """Close all links for good."""
        for endpoint in list(self._links):
            self._leave(endpoint)

    def _leave(self, endpoint: str) -> None:
        """Close a link that nothing uses, and say so: else the worker would send the next chunks to nobody."""
        if self._links.pop(endpoint).open:
            self._orders.add(Tell(endpoint, Goodbye()))
        self._orders.add(HangUp(endpoint))

    # What time brings.

    def unreached(self, now: float) -> list[str]:
        """Return the endpoints that have not been reached in time."""
        return [endpoint for endpoint, link in self._links.items() if not link.open and now >= link.look_at]

    def idle(self, now: float) -> list[str]:
        """Return the open links that may be idle: it is time to look at them."""
        return [endpoint for endpoint, link in self._links.items() if link.open and now >= link.look_at]

    def looked_at(self, endpoint: str, used: bool, now: float) -> None:
        """Keep a link that is used, close one that is not."""
        if used:
            self._links[endpoint].look_at = now + IDLE_S
        else:
            self._orders.log("direct_closed", endpoint=endpoint, reason=f"not used for {IDLE_S:g} s")
            self._leave(endpoint)

    def next_deadline(self) -> float | None:
        """Return when a link next needs a look, None for never."""
        return min((link.look_at for link in self._links.values()), default=None)

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: one is broken.
        """
        assert len(self._links) <= MOST_LINKS, "too many links"
        assert len(self._tried) <= _MOST_TRIED, "too many endpoints are remembered"
        for endpoint, link in self._links.items():
            assert self._networks.has(endpoint), f"{endpoint} is in no network that was named"
            assert len(link.keys) <= MOST_KEYS, "too many keys"
