"""Clients that do nothing, in a process of their own for peers.py: `idle_clients.py ENDPOINT COUNT`.

When all are connected it prints the memory in bytes that the process had before it made the first of them. Ends with
its standard input.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack

from idle import resident_bytes

from tokenmq.client import Client


def main() -> None:
    """Connect, tell, wait."""
    endpoint, count = sys.argv[1:]
    with ExitStack() as stack:
        before = resident_bytes(os.getpid())
        for _ in range(int(count)):
            stack.enter_context(Client(endpoint)).status()
        print(before, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
