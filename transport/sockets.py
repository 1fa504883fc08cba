"""Socket factories: every option that differs from libzmq's default is set here, with its reason."""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

import zmq

from ..protocol.limits import MAX_FRAME_BYTES
from .endpoints import EndpointError, check_destination, check_endpoint, is_ipv6
from .ipc import IPC, private_file
from .keys import Curve, KeyPair

#: Messages that libzmq queues on the side of a client or worker. Credit keeps what is in flight far below.
PEER_QUEUE_MESSAGES = 10_000
#: The same on the broker's side, for each of its many peers. Libzmq bounds no bytes, so it is small; what a peer does
#: not take beyond it, the broker keeps and counts itself.
ROUTER_QUEUE_MESSAGES = 1_000
#: Connections that wait for accept: many clients may start at once, or come back after a restart (default 100).
_BACKLOG = 1024
#: A peer that connects and does not speak ZMTP holds a file descriptor no longer than this (default 30 s). Thousands
#: that come back at once with keys need seconds.
_HANDSHAKE_MS = 10_000
#: Reconnection starts quickly and backs off, so that a thousand peers do not storm a broker that is down.
_RECONNECT_MS = 50
_RECONNECT_MAX_MS = 1_000
#: Between a worker and its clients' own connections (SPEC.md, 14) nothing of TMQ/1 tells that the other side is gone
#: where the network drops everything; ZMTP's PING does, in the time that a session takes to expire by default.
_HEARTBEAT_MS = 1_000
_HEARTBEAT_TIMEOUT_MS = 5_000
#: What may still leave when a socket closes: a GOODBYE. The default (for ever) hangs the exit.
_LINGER_MS = 200


def _common(socket: zmq.Socket[bytes], queue_messages: int) -> None:
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)  # default: unlimited
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    socket.setsockopt(zmq.SNDHWM, queue_messages)
    socket.setsockopt(zmq.RCVHWM, queue_messages)


def _heartbeats(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)


def _unguessable_ids() -> None:
    """Let nobody know which routing id a ROUTER draws next.

    libzmq takes the first one from C's `rand`, which gives every process the same numbers unless somebody has called
    `srand`; the others follow by counting. A peer that speaks ZMTP by itself could claim the next id as its own
    identity, and libzmq ends the process over it (4.3.5: "Assertion failed: ok (src/socket_base.cpp)").
    """
    # TypeError, OSError: a platform without a C library of the process (Windows); it has no such function to call.
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).srand(ctypes.c_uint(secrets.randbits(32)))


def router(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoints: Sequence[str],
    *,
    heartbeats: bool = False,
    most_bytes: int = MAX_FRAME_BYTES,
    curve: KeyPair | None = None,
    domain: str = "",
    prepare: Callable[[zmq.Socket[bytes]], None] = lambda _socket: None,
) -> tuple[zmq.Socket[bytes], list[str]]:
    """Make a ROUTER bound to all endpoints.

    Args:
        context: where it lives.
        endpoints: what it listens on.
        heartbeats: ZMTP finds out when a peer is gone.
        most_bytes: a peer that sends a longer frame is cut off before it is read.
        curve: its key pair: then only peers with CURVE get in, those that know its public half. None for no CURVE.
        domain: by what name it is known to the ZAP handler of the context, which says whose keys are let in. In a
            context without a handler all are.
        prepare: what is to be done with the socket before it is bound.

    Returns:
        The socket and the endpoints as bound, with the port that was chosen where `*` was asked for.

    Raises:
        EndpointError: one of them cannot be bound; the message says why. No socket is left behind.
    """
    _unguessable_ids()
    socket = context.socket(zmq.ROUTER)
    try:
        _common(socket, ROUTER_QUEUE_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, most_bytes)
        if heartbeats:
            _heartbeats(socket)
        # A full or vanished peer is an error to handle; by default ROUTER drops the message and reports success.
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        if curve is not None:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, curve.secret.encode())
            if domain:
                socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        prepare(socket)
        bound = []
        for endpoint in endpoints:
            _family(socket, endpoint)
            _bind(socket, endpoint)
            bound.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        return socket, bound
    except BaseException:
        socket.close(linger=0)
        raise


def _family(socket: zmq.Socket[bytes], endpoint: str) -> None:
    # Only where the address asks for it: with this option libzmq resolves `localhost` to ::1 alone, and `*` is both
    # families. It counts for the next bind or connect.
    socket.setsockopt(zmq.IPV6, int(is_ipv6(endpoint)))


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> None:
    check_endpoint(endpoint)
    try:
        with private_file(endpoint) if endpoint.startswith(IPC) else nullcontext():
            socket.bind(endpoint)
    except zmq.ZMQError as error:
        reason = "the address is already in use" if error.errno == zmq.EADDRINUSE else zmq.strerror(error.errno or 0)
        raise EndpointError(f"cannot listen on {endpoint}: {reason}") from error


def dealer(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, heartbeats: bool = False, curve: Curve | None = None
) -> zmq.Socket[bytes]:
    """Make a DEALER for the endpoint; `connect` connects it, now or as soon as somebody listens there.

    Args:
        context: where it lives.
        endpoint: what it is to be connected to.
        heartbeats: ZMTP finds out when the other side is gone.
        curve: its own keys and the other side's public one; None for no CURVE.

    Raises:
        EndpointError: the endpoint is not valid.
    """
    check_destination(endpoint)
    socket = context.socket(zmq.DEALER)
    try:
        _common(socket, PEER_QUEUE_MESSAGES)
        if heartbeats:
            _heartbeats(socket)
        if curve is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, curve.server_key.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.pair.public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, curve.pair.secret.encode())
        _family(socket, endpoint)
        # ZMQ_IMMEDIATE stays off: with it libzmq drops a pipe in mid-message when its connection breaks, and the next
        # receive aborts the process (4.3.5: "Assertion failed: !_more (src/fq.cpp:80)"). What it is for, that nothing
        # is queued for a broker that is not there, the sessions see to: they send only between CONNECTED and
        # DISCONNECTED, and use a socket for one connection.
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        return socket
    except BaseException:
        socket.close(linger=0)
        raise


def connect(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect; apart from `dealer`, so that a monitor can be attached first and misses nothing.

    Raises:
        EndpointError: libzmq refuses the endpoint (an unknown host name is found out later, when it connects).
    """
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot connect to {endpoint}: {zmq.strerror(error.errno or 0)}") from error
