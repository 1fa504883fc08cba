"""Fixtures: clusters of real processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster

#: The longest that any wait in these tests lasts before it fails; machines under CI load are slow.
PATIENCE_S = 60.0


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., LocalCluster]]:
    """Start clusters that end with the test."""
    clusters: list[LocalCluster] = []

    def make(*broker_options: str, brokers: int = 1) -> LocalCluster:
        folder = tmp_path / f"cluster-{len(clusters)}"
        folder.mkdir()
        clusters.append(LocalCluster(*broker_options, brokers=brokers, folder=folder))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()


def eventually(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """Wait until the condition gives something true, and return that; an event that only polling can see."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def worker_names(client: Client) -> set[str]:
    """The names of the ready workers; none while the broker cannot be asked."""
    try:
        return {row["name"] for row in client.workers() if row["state"] == "ready"}
    except TokenmqError as error:
        if error.code in ("broker_lost", "no_broker"):
            return set()
        raise


def at_rest(client: Client) -> bool:
    """Whether the broker holds no request in any form, and no worker either."""
    status = client.status()
    return not any(status["requests"].values()) and all(
        row["in_flight"] == row["running"] == row["waiting"] == 0 for row in client.workers()
    )
