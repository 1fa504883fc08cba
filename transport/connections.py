"""The connections of a ROUTER that listens, one by one: who has come, who has gone, and closing one of them.

libzmq tells of a connection only its file descriptor, which the system gives to another one as soon as it is free.
With its inode it is one of a kind: a socket's inode is not used again while anybody could mean it.
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

import zmq

from .pump import DONTWAIT, another, raw_recv

#: A connection: file descriptor and inode.
ConnectionId = tuple[int, int]

#: Monitor events read in one call: a few milliseconds of work.
_BATCH = 1_000
#: Events that wait for the broker. With libzmq's default of 1,000 a storm of connections stops its I/O thread, and
#: with it everybody's messages, until the broker looks.
_QUEUE_EVENTS = 100_000

_ACCEPTED = int(zmq.EVENT_ACCEPTED)
_DISCONNECTED = int(zmq.EVENT_DISCONNECTED)
#: What handshakes fail of, by event.
_FAILED = {
    #: ZAP has refused the key.
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "key",
    #: What came is no ZMTP, or another mechanism, or a key for another server.
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "protocol",
    #: The peer left before the end, or was too slow.
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "unfinished",
}
_EVENTS = _ACCEPTED | _DISCONNECTED | sum(_FAILED)

#: Where the kernel's answer about a TCP connection has tcpi_bytes_received (linux/tcp.h, since 4.1).
_BYTES_AT = 128
_BYTES_RECEIVED = struct.Struct("=Q")
_SRCFD = int(zmq.SRCFD)
_EVENT = struct.Struct("=HI")


class Arrival(NamedTuple):
    """A new connection.

    Attributes:
        connection: its id.
        address: the other side's IP address, without a port; "" for ipc.
    """

    connection: ConnectionId
    address: str


class Seen(NamedTuple):
    """What has happened since the last look.

    Attributes:
        closed: connections that are gone, of those that had arrived.
        arrived: connections that are there now.
        broken: whether any connection has gone, also one that had not arrived by the last look.
    """

    closed: list[ConnectionId]
    arrived: list[Arrival]
    broken: bool


class Entrance:
    """Watches a ROUTER. `socket` becomes readable when there is something to see.

    Attributes:
        accepted: connections that have come so far, also those that had gone before anybody looked.
        failed: handshakes that failed so far, by what they failed of: "key", "protocol", "unfinished".
    """

    def __init__(self, watched: zmq.Socket[bytes]) -> None:
        """Start watching; before the socket binds, since who has come before is never seen."""
        self._watched = watched
        endpoint = f"inproc://tokenmq-entrance-{id(watched)}"
        watched.monitor(endpoint, _EVENTS)
        self.socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self.socket.setsockopt(zmq.RCVHWM, _QUEUE_EVENTS)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)
        self.accepted = 0
        self.failed: dict[str, int] = dict.fromkeys(_FAILED.values(), 0)
        self._hand = _Hand()
        #: Those that have arrived, by descriptor.
        self._open: dict[int, Arrival] = {}

    def look(self) -> Seen:
        """Return what has happened since the last look, up to a bound; never waits.

        A descriptor is looked at after the event that names it was read, and may be another connection's by then. But
        the end of the first one was told before its descriptor was free: so that is read before anything is believed.
        """
        closed: list[ConnectionId] = []
        arrived: dict[int, Arrival | None] = {}
        broken = False
        read = 0
        while read < _BATCH and (events := self._read(_BATCH - read)):
            read += len(events)
            for event, value in events:
                if event == _ACCEPTED:
                    self.accepted += 1
                    arrived[value] = None
                elif event == _DISCONNECTED:
                    broken = True
                    if value in arrived:
                        del arrived[value]
                    elif value in self._open:
                        closed.append(self._open.pop(value).connection)
                elif event in _FAILED:
                    self.failed[_FAILED[event]] += 1
            # Not before: most connections of a storm are gone by now, and cost no more.
            for fd, known in arrived.items():
                if known is None:
                    arrived[fd] = self._hand.arrival(fd)
        new = {fd: arrival for fd, arrival in arrived.items() if arrival is not None}
        self._open.update(new)
        return Seen(closed, list(new.values()), broken)

    def _read(self, limit: int) -> list[tuple[int, int]]:
        """Return up to `limit` events that are there, each with its value: a descriptor, or an error."""
        events: list[tuple[int, int]] = []
        while len(events) < limit and another(self.socket):
            events.append(_EVENT.unpack_from(raw_recv(self.socket, DONTWAIT)))
            raw_recv(self.socket, DONTWAIT)  # the endpoint; a message is there whole or not at all
        return events

    def cut(self, connection: ConnectionId) -> bool:
        """Close a connection, if it is still there; its end is seen later, as any.

        What libzmq has not sent yet is lost.

        Returns:
            False when it is gone already.
        """
        return self._hand.shut_down(connection)

    def bytes_in(self, connection: ConnectionId) -> int | None:
        """Return how many bytes a connection has brought so far; None where it is gone, no TCP, or not on Linux."""
        return self._hand.bytes_in(connection)

    def close(self) -> None:
        """Stop watching; call it before the watched socket closes."""
        # Where there is no room for an event, libzmq's I/O thread waits for it with the lock that is needed here. So
        # all that can be there is read; a storm may go on, but not fill it again in a moment.
        for _ in range(0, _QUEUE_EVENTS + _BATCH, _BATCH):
            if not self._read(_BATCH):
                break
        self._watched.disable_monitor()
        self.socket.close(linger=0)
        self._hand.close()


class _Hand:
    """Takes hold of a descriptor that another thread may close and use again at any moment.

    It is duplicated over one that is kept for this, so that it works also when no descriptor is free.
    """

    def __init__(self) -> None:
        self._nothing = os.open(os.devnull, os.O_RDONLY)
        self._fd = os.dup(self._nothing)

    def arrival(self, fd: int) -> Arrival | None:
        """Return what there is to know of a connection by its descriptor, None when it is gone."""
        with contextlib.suppress(OSError), self._held(fd) as (inode, socket):
            address = ""
            with contextlib.suppress(OSError):  # gone, with its descriptor still there: its end is told next
                name = socket.getpeername()
                if socket.family in (sockets.AF_INET, sockets.AF_INET6):
                    address = str(name[0])
            return Arrival((fd, inode), address)
        return None

    def shut_down(self, connection: ConnectionId) -> bool:
        """Shut a connection down; False when it is gone."""
        with contextlib.suppress(OSError), self._held(connection[0]) as (inode, socket):
            if inode == connection[1]:
                socket.shutdown(sockets.SHUT_RDWR)
                return True
        return False

    def bytes_in(self, connection: ConnectionId) -> int | None:
        """Return what a TCP connection has brought."""
        if sys.platform != "linux":
            return None
        with contextlib.suppress(OSError), self._held(connection[0]) as (inode, socket):
            if inode == connection[1] and socket.family in (sockets.AF_INET, sockets.AF_INET6):
                told = socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _BYTES_RECEIVED.size + _BYTES_AT)
                return int(_BYTES_RECEIVED.unpack_from(told, _BYTES_AT)[0])
        return None

    @contextlib.contextmanager
    def _held(self, fd: int) -> Iterator[tuple[int, sockets.socket]]:
        """Hold what the descriptor stands for now: its inode, and a socket that lives within the block.

        Raises:
            OSError: there is no such descriptor, or it is not a socket.
        """
        os.dup2(fd, self._fd, inheritable=False)
        try:
            socket = sockets.socket(fileno=self._fd)
            try:
                yield os.fstat(self._fd).st_ino, socket
            finally:
                socket.detach()
        finally:
            # Or the connection would stay open for as long as the hand holds it.
            os.dup2(self._nothing, self._fd, inheritable=False)

    def close(self) -> None:
        """Let go of both descriptors."""
        os.close(self._fd)
        os.close(self._nothing)


def id_of(frame: zmq.Frame) -> ConnectionId | None:
    """Return the connection that a frame came by, received uncopied; None when it is gone.

    Where it is gone and its descriptor is in use again, this is the connection that uses it now.
    """
    try:
        fd = int(frame.get(_SRCFD))
        return fd, os.fstat(fd).st_ino
    except (OSError, zmq.ZMQError):
        return None
