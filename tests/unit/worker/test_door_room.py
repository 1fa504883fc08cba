"""How many clients a worker lets in at its own door."""

from __future__ import annotations

import sys

import pytest

from tokenmq.transport.door import MOST_CONNECTIONS
from tokenmq.worker.server import most_connections


@pytest.mark.parametrize(
    ("files", "most"), [(64, 16), (256, 16), (1024, 768), (4352, 4096), (sys.maxsize, MOST_CONNECTIONS)]
)
def test_clients_leave_files_for_the_rest(files: int, most: int) -> None:
    assert most_connections(files) == most
