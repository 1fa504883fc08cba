"""A process with an honest client, whose second broker is a hostile one; each line says that a stream came whole."""

from __future__ import annotations

import sys
import time

from tokenmq.client import Client, TokenmqError
from tokenmq.worker.engines.synthetic import token_at


def main() -> None:
    """Read one stream after the other: `reader.py MODEL ENDPOINT...`."""
    model, *endpoints = sys.argv[1:]
    seed = 0
    with Client(endpoints, direct="127.0.0.0/8", connect_timeout_s=10.0) as client:
        while True:
            seed += 1
            try:
                stream = client.generate(model, "x", max_tokens=20, seed=seed)
                for _ in stream:
                    pass
            except TokenmqError as error:
                print(f"failed: {error.code}: {error}", flush=True)
            else:
                whole = stream.token_ids == [token_at(seed, position) for position in range(20)]
                print("whole" if whole else f"wrong: {stream.token_ids}", flush=True)
            time.sleep(0.05)


if __name__ == "__main__":
    main()
