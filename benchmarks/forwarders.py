"""The rivals that libzmq gives: its own proxy in C, and the least that a Python program can do between two ROUTERs.

Each runs as a process of its own: python benchmarks/forwarders.py NAME FRONTEND BACKEND, with two endpoints.
"""

from __future__ import annotations

import argparse
from collections import deque

import zmq
from zmq.backend import zmq_poll

#: Messages from one socket before the other one gets its turn.
_BATCH = 500
#: What is in flight is bounded by the ends, so that nothing is dropped for want of room.
_UNBOUNDED = 0


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoint: str) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, _UNBOUNDED)
    socket.setsockopt(zmq.RCVHWM, _UNBOUNDED)
    socket.setsockopt(zmq.BACKLOG, 1024)
    socket.bind(endpoint)
    return socket


def c_proxy(frontend: str, backend: str) -> None:
    """Run libzmq's proxy: no Python after the start. Who answers puts the client's routing id first himself."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    zmq.proxy(_socket(context, zmq.ROUTER, frontend), _socket(context, zmq.DEALER, backend))


def bare(frontend: str, backend: str) -> None:
    """Forward by a dict, with pyzmq's own calls, and with one check: that a message has the frames it should have.

    Octets 8 to 24 of what a worker sends name its client, as in TMQ/1. A message of one frame from a client makes its
    octets 8 to 24 the client's name and goes back; one of two frames is a request, and goes to the workers in turn. A
    worker that names no known client is registered.
    """
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front, back = _socket(context, zmq.ROUTER, frontend), _socket(context, zmq.ROUTER, backend)
    recv, send = zmq.backend.Socket.recv, zmq.backend.Socket.send
    wait, more = int(zmq.DONTWAIT), int(zmq.SNDMORE)
    clients: dict[bytes, bytes] = {}
    workers: deque[bytes] = deque()
    watched = [(back, int(zmq.POLLIN)), (front, int(zmq.POLLIN))]
    while True:
        for socket, _ in zmq_poll(watched, -1):
            try:
                if socket is back:
                    for _ in range(_BATCH):
                        worker = recv(back, wait)
                        frame = recv(back, wait, False)  # it knows whether another one follows, at half the price
                        body = frame.bytes
                        if frame.more:
                            raise SystemExit("error: a worker has sent a message of two frames")
                        client = clients.get(body[8:24])
                        if client is None:
                            workers.append(worker)
                            continue
                        send(front, client, more)
                        send(front, body, 0)
                else:
                    for _ in range(_BATCH):
                        client = recv(front, wait)
                        frame = recv(front, wait, False)
                        body = frame.bytes
                        if not frame.more:
                            clients[body[8:24]] = client
                            send(front, client, more)
                            send(front, body, 0)
                            continue
                        workers.rotate(-1)
                        send(back, workers[0], more)
                        send(back, body, more)
                        send(back, recv(front, wait), 0)
            except zmq.Again:
                pass


FORWARDERS = {"c-proxy": c_proxy, "bare": bare}


def main() -> None:
    """Run the one that the command line names, until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=FORWARDERS)
    parser.add_argument("frontend", help="the endpoint for clients, such as tcp://127.0.0.1:5555")
    parser.add_argument("backend", help="the endpoint for workers")
    options = parser.parse_args()
    FORWARDERS[options.name](options.frontend, options.backend)


if __name__ == "__main__":
    main()
