"""Sessions are looked at in turns, so that thousands of heartbeats do not leave at one moment."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tokenmq.broker.rota import Rota, parts_of
from tokenmq.protocol.messages import Disconnect, Heartbeat

from .stage import Stage


@dataclass(eq=False)
class Peer:
    peer: bytes


@given(st.integers(0, 40), st.integers(1, 7), st.sets(st.integers(0, 39)), st.integers(0, 5))
def test_each_has_a_turn_in_so_many_parts_and_who_has_gone_has_none(
    number: int, parts: int, leaving: set[int], after: int
) -> None:
    sessions = {bytes([each]): Peer(bytes([each])) for each in range(number)}
    rota = Rota(sessions)
    seen: Counter[bytes] = Counter()
    for turn in range(parts):
        if turn == min(after, parts - 1):
            for each in leaving:
                if (peer := bytes([each])) in sessions and peer not in seen:
                    del sessions[peer]
        here = [session.peer for session in rota.turn(parts)]
        assert all(peer in sessions for peer in here)
        seen.update(here)
    assert seen.keys() == sessions.keys()


def test_a_few_are_looked_at_together_and_thousands_in_parts() -> None:
    assert [parts_of(number) for number in (0, 1, 499, 500, 2_000, 1_000_000)] == [1, 1, 1, 2, 5, 16]


def test_clients_that_connected_together_hear_heartbeats_in_parts() -> None:
    stage = Stage()
    clients = [stage.client(f"c{number}") for number in range(2_000)]
    beats: Counter[str] = Counter()
    most = 0
    until = stage.now + 10
    while (deadline := stage.core.next_deadline()) <= until:
        stage.now = deadline
        said = stage.tell(stage.core.tick(stage.now))
        assert not any(isinstance(message, Disconnect) for _, message in said)
        here = [to for to, message in said if isinstance(message, Heartbeat)]
        beats.update(here)
        most = max(most, len(here))
        for client in clients:
            stage.core.clients[client.peer].liveness.heard_at = stage.now
    assert most <= 500, "a wave"
    assert len(beats) == len(clients)
    # An interval of a second, late by a quarter at most.
    assert all(8 <= number <= 10 for number in beats.values())


def test_who_hears_tokens_needs_no_heartbeat() -> None:
    stage = Stage()
    client, worker = stage.client(), stage.worker()
    client.asks(1)
    route = stage.core.clients[client.peer].route
    for _ in range(30):
        stage.core.route_chunks(worker.peer, route, stage.now)
        said = stage.passes(0.1)
        stage.core.clients[client.peer].liveness.heard_at = stage.now
        stage.core.registry.by_name["w1"].liveness.heard_at = stage.now
        assert ("ann", Heartbeat) not in [(to, type(message)) for to, message in said]
