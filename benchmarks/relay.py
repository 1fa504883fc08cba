"""What the broker adds to a bare hop: tokens/s and CPU per million tokens, against the least that Python can do.

One worker sends CHUNKS messages of one token flat out to one client, through (a) a forwarder that only swaps the
routing id between two ROUTERs, frame by frame, and (b) zmq-broker's own server. Both run in a process of their own,
in turns, several rounds; the medians and their ratio are printed. Run: make bench, or python benchmarks/relay.py.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import zmq

from tokenmq.broker.server import BrokerServer
from tokenmq.broker.settings import BrokerSettings
from tokenmq.protocol.codec import decode, encode
from tokenmq.protocol.messages import Chunk, Chunks, Envelope, Hello, Load, Message, ModelInfo, Ready, Request
from tokenmq.transport.pump import Outcome, receive, send
from tokenmq.transport.sockets import connect, dealer, router

ANY = "tcp://127.0.0.1:*"
BATCH = 500


def bare(pipe: Connection) -> None:
    """Forward what comes from the backend to the frontend's one client, and the other way round."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    frontend, front = router(context, [ANY])
    backend, back = router(context, [ANY])
    pipe.send((front[0], back[0]))
    client, worker = receive_one(frontend)[0], receive_one(backend)[0]
    send(frontend, [client, b"ready"])
    send(backend, [worker, b"ready"])
    poller = zmq.Poller()
    poller.register(backend, zmq.POLLIN)
    began = time.process_time()
    while not pipe.poll():
        if poller.poll(100):
            for frames in receive(backend, BATCH):
                frames[0] = client
                while send(frontend, frames) is Outcome.FULL:
                    time.sleep(0)  # the client is behind
    pipe.send(time.process_time() - began)
    context.destroy(linger=0)


def broker(pipe: Connection) -> None:
    """Run the real server until told to stop."""
    server = BrokerServer(BrokerSettings(frontend=(ANY,), backend=(ANY,)), software="benchmark")
    thread = threading.Thread(target=server.run)
    thread.start()
    pipe.send((server.frontend[0], server.backend[0]))
    pipe.recv()
    began = time.process_time()
    pipe.send(None)
    pipe.recv()
    pipe.send(time.process_time() - began)
    server.drain(0)
    thread.join()


def receive_one(socket: zmq.Socket[bytes]) -> list[bytes]:
    """Wait for one message."""
    if not socket.poll(10_000):
        raise SystemExit("error: nothing came for 10 s")
    return receive(socket, 1)[0]


def expect(socket: zmq.Socket[bytes], kind: type[Any]) -> Any:
    """Wait for a message of this kind."""
    while True:
        message: Message = decode(receive_one(socket))
        if isinstance(message, kind):
            return message


def send_all(worker: zmq.Socket[bytes], frames: list[bytes], number: int) -> None:
    """Send a message so many times, as fast as it goes."""
    for _ in range(number):
        while send(worker, frames) is Outcome.FULL:
            worker.poll(1000, zmq.POLLOUT)


def measure(relay: Callable[[Connection], None], number: int) -> tuple[float, float]:
    """Return (tokens per second, CPU seconds per million tokens) of one round."""
    pipe, other = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=relay, args=(other,))
    process.start()
    frontend, backend = pipe.recv()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client, worker = dealer(context, frontend), dealer(context, backend)
    connect(client, frontend)
    connect(worker, backend)
    client.poll(5000, zmq.POLLOUT)
    worker.poll(5000, zmq.POLLOUT)
    request_id = os.urandom(16)
    chunk = (Chunk(request_id, 1, 0, 0, (1,), "word "),)
    if relay is broker:
        send(worker, encode(Ready("w", 1, "benchmark", (ModelInfo("m"),), 1, "none", Load(), 1.0)))
        send(client, encode(Hello("c", "benchmark")))
        time.sleep(0.2)
        send(client, encode(Request(request_id, Envelope("m", 1, 1), b"")))
        route = expect(worker, Request).envelope.route
        pipe.send(None)
        pipe.recv()
    else:
        send(worker, [b"hello"])
        send(client, [b"hello"])
        receive_one(worker)
        receive_one(client)
        route = bytes(16)
    sender = threading.Thread(target=send_all, args=(worker, encode(Chunks(route, chunk)), number))
    began = time.perf_counter()
    sender.start()
    count = 0
    while count < number:
        if not client.poll(10_000):
            raise SystemExit(f"error: {count} of {number} messages came")
        count += sum(len(frames) == 2 and len(frames[1]) > 20 for frames in receive(client, BATCH))
    seconds = time.perf_counter() - began
    sender.join()
    pipe.send(None)
    cpu = pipe.recv()
    context.destroy(linger=0)
    process.join()
    return number / seconds, cpu / number * 1e6


def main() -> None:
    """Measure both in turns; print medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each kind (default: 5)")
    parser.add_argument("--messages", type=int, default=100_000, help="messages a round (default: 100000)")
    options = parser.parse_args()
    kinds = {"bare forwarder": bare, "broker": broker}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(options.rounds):
        for name, relay in kinds.items():
            results[name].append(measure(relay, options.messages))
            print(f"round {number + 1}: {name}: {results[name][-1][0]:,.0f} tokens/s", flush=True)
    rates = {name: statistics.median(rate for rate, _ in rounds) for name, rounds in results.items()}
    costs = {name: statistics.median(cost for _, cost in rounds) for name, rounds in results.items()}
    for name in kinds:
        print(f"{name:15} {rates[name]:>10,.0f} tokens/s  {costs[name]:6.2f} CPU s per million tokens")
    print(f"broker / bare: {rates['broker'] / rates['bare forwarder']:.2f} of its rate", end="")
    print(f", {costs['broker'] / costs['bare forwarder']:.2f} of its CPU time")


if __name__ == "__main__":
    main()
