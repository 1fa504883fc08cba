"""What is kept for peers that do not read, against a socket that takes what the test lets it take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tokenmq.broker import backlog as backlog_module
from tokenmq.broker.backlog import RETRY_READING_S, RETRY_S, Backlog, Loss
from tokenmq.broker.metrics import Pending
from tokenmq.transport.pump import Outcome

GONE = "its connection is gone"


class Wire:
    """Peers with room for so many messages more; None is a peer that is gone."""

    def __init__(self, **room: int | None) -> None:
        self.room = {name.encode(): number for name, number in room.items()}
        self.sent: list[tuple[bytes, bytes]] = []
        self.calls = 0

    def send(self, frames: Sequence[bytes]) -> Outcome:
        self.calls += 1
        room = self.room.get(frames[0], 1_000_000)
        if room is None:
            return Outcome.GONE
        if room == 0:
            return Outcome.FULL
        self.room[frames[0]] = room - 1
        self.sent.append((frames[0], frames[1]))
        return Outcome.SENT

    def got(self, peer: bytes) -> list[bytes]:
        return [body for to, body in self.sent if to == peer]


class Scene:
    def __init__(self, wire: Wire, *, limit_bytes: int = 100, timeout_s: float = 5.0) -> None:
        self.wire = wire
        self.pending = Pending()
        self.backlog = Backlog(wire.send, limit_bytes, timeout_s, self.pending)
        self.now = 1000.0

    def send(self, peer: bytes, body: bytes) -> Loss | None:
        return self.backlog.send([peer, body], self.now)

    def retry(self, after_s: float = RETRY_S) -> list[Loss]:
        self.now += after_s
        return self.backlog.retry(self.now)

    @property
    def kept(self) -> tuple[int, int]:
        assert self.pending.peers == len(self.backlog.peers)
        assert self.pending.bytes == sum(queue.bytes for queue in self.backlog.peers.values())
        return self.pending.peers, self.pending.bytes


def test_a_peer_that_reads_needs_no_backlog() -> None:
    scene = Scene(Wire())
    assert scene.send(b"a", b"1") is None
    assert scene.kept == (0, 0)
    assert scene.backlog.next_deadline() is None
    assert scene.retry() == []


def test_a_peer_that_is_gone_is_told_at_once() -> None:
    scene = Scene(Wire(a=None))
    assert scene.send(b"a", b"1") == Loss(b"a", GONE)
    assert scene.kept == (0, 0)


def test_what_is_refused_is_kept_in_order_and_sent_when_there_is_room() -> None:
    scene = Scene(Wire(a=1))
    for body in (b"1", b"2", b"3"):
        assert scene.send(b"a", body) is None
    assert scene.kept == (1, 4)
    assert scene.backlog.next_deadline() == scene.now + RETRY_READING_S
    scene.wire.room[b"a"] = 1
    assert scene.send(b"a", b"4") is None  # there is room, but others come before it
    assert scene.wire.got(b"a") == [b"1"]
    assert scene.retry() == []
    assert scene.wire.got(b"a") == [b"1", b"2"]
    scene.wire.room[b"a"] = 9
    assert scene.retry() == []
    assert scene.wire.got(b"a") == [b"1", b"2", b"3", b"4"]
    assert scene.kept == (0, 0)
    assert scene.backlog.next_deadline() is None


def test_nobody_else_waits_for_a_peer_that_does_not_read() -> None:
    scene = Scene(Wire(a=0))
    scene.send(b"a", b"1")
    assert scene.send(b"b", b"2") is None
    assert scene.wire.sent == [(b"b", b"2")]
    assert scene.kept == (1, 2)


def test_it_is_tried_again_only_when_it_is_due() -> None:
    scene = Scene(Wire(a=0))
    scene.send(b"a", b"1")
    calls = scene.wire.calls
    assert scene.retry(RETRY_READING_S / 2) == []
    assert scene.wire.calls == calls
    scene.retry(RETRY_READING_S)
    assert scene.wire.calls == calls + 1


def test_one_that_reads_slowly_is_tried_again_sooner_than_one_that_does_not_read() -> None:
    scene = Scene(Wire(a=0))
    for body in (b"1", b"2", b"3"):
        scene.send(b"a", body)
    assert scene.retry() == []
    assert scene.backlog.next_deadline() == scene.now + RETRY_S  # it took nothing
    scene.wire.room[b"a"] = 2
    assert scene.retry() == []
    assert scene.backlog.next_deadline() == scene.now + RETRY_READING_S
    assert scene.retry() == []
    assert scene.backlog.next_deadline() == scene.now + RETRY_S


def test_too_many_bytes_are_the_peers_loss() -> None:
    scene = Scene(Wire(a=0), limit_bytes=10)
    assert scene.send(b"a", b"x" * 1000) is None  # one long message is no reason
    assert scene.send(b"a", b"y") == Loss(b"a", "it has stopped reading: 1001 bytes wait", stalled=True)
    assert scene.kept == (0, 0)
    scene.wire.room[b"a"] = 9
    assert scene.retry() == []
    assert scene.wire.sent == []


def test_the_bound_counts_what_waits_and_not_what_has_gone() -> None:
    scene = Scene(Wire(a=0), limit_bytes=10)
    scene.send(b"a", b"x" * 9)
    scene.wire.room[b"a"] = 1
    scene.retry()
    assert scene.send(b"a", b"y" * 8) is None
    assert scene.kept == (1, 9)
    assert scene.send(b"a", b"z") is None
    assert scene.send(b"a", b"z") == Loss(b"a", "it has stopped reading: 11 bytes wait", stalled=True)


def test_taking_nothing_for_too_long_is_the_peers_loss() -> None:
    scene = Scene(Wire(a=0, b=0), timeout_s=0.5)
    scene.send(b"a", b"1")
    scene.send(b"a", b"2")
    scene.retry(0.4)
    scene.wire.room[b"a"] = 1
    assert scene.retry(0.09) == []  # a message taken is a beginning
    scene.send(b"b", b"3")
    assert scene.retry(0.4) == []
    why = "it has stopped reading: it took nothing for 0.5 s, 2 bytes wait"
    assert scene.retry(0.1) == [Loss(b"a", why, stalled=True), Loss(b"b", why, stalled=True)]
    assert scene.kept == (0, 0)


def test_a_loop_that_stood_still_gives_nobody_up_for_it() -> None:
    scene = Scene(Wire(a=0), timeout_s=5.0)
    scene.send(b"a", b"1")
    assert scene.retry(3600.0) == []
    assert scene.retry(0.9) == []
    losses = []
    for _ in range(10):
        losses += scene.retry(0.5)
    assert [loss.peer for loss in losses] == [b"a"]


def test_a_peer_whose_connection_breaks_meanwhile_is_gone() -> None:
    scene = Scene(Wire(a=0))
    scene.send(b"a", b"1")
    scene.wire.room[b"a"] = None
    assert scene.retry() == [Loss(b"a", GONE)]
    assert scene.kept == (0, 0)


def test_the_last_message_of_a_session_drops_what_was_kept_and_is_not_kept_itself() -> None:
    scene = Scene(Wire(a=0, b=1))
    scene.send(b"a", b"1")
    scene.send(b"a", b"2")
    scene.backlog.send_last([b"a", b"end"])
    scene.backlog.send_last([b"b", b"end"])
    assert scene.kept == (0, 0)
    scene.wire.room[b"a"] = 9
    scene.retry()
    assert scene.wire.sent == [(b"b", b"end")]


def test_a_round_is_bounded_and_everybody_has_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "ROUND_SENDS", 10)
    scene = Scene(Wire(a=0, b=0), limit_bytes=10_000)
    for number in range(25):
        scene.send(b"a", b"%d" % number)
    scene.send(b"b", b"only")
    scene.wire.room = {b"a": 1000, b"b": 1000}
    scene.retry()
    assert len(scene.wire.sent) == 10
    scene.retry()
    assert b"only" in scene.wire.got(b"b")
    scene.retry()
    assert scene.wire.got(b"a") == [b"%d" % number for number in range(25)]
    assert scene.kept == (0, 0)


def test_many_that_take_nothing_cost_a_bounded_number_of_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "ROUND_SENDS", 10)
    scene = Scene(Wire(**{f"p{number}": 0 for number in range(100)}))
    for number in range(100):
        scene.send(b"p%d" % number, b"1")
    scene.wire.calls = 0
    scene.wire.room[b"p99"] = 9
    for _ in range(10):
        scene.retry()
    assert scene.wire.calls == 100
    assert scene.wire.got(b"p99") == [b"1"]
