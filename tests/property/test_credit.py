"""Both ends of a window, with chunks and grants in flight, against what credit promises."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tokenmq.protocol.credit import ReceiveWindow, SendWindow
from tokenmq.protocol.errors import ProtocolError


class CreditMachine(RuleBasedStateMachine):
    """A worker, a reader and the wire between them; grants may be delayed, repeated and reordered."""

    @initialize(size=st.integers(1, 40))
    def open(self, size: int) -> None:
        self.size = size
        self.reader = ReceiveWindow(size=size)
        self.worker = SendWindow(limit=size)
        self.chunks: list[int] = []
        self.grants: list[int] = []
        self.highest = size

    @precondition(lambda self: self.worker.available)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(1, self.worker.available))
        self.worker.send(tokens)
        self.chunks.append(tokens)

    @rule(excess=st.integers(1, 50))
    def cannot_overrun(self, excess: int) -> None:
        before = self.worker.sent
        with pytest.raises(ValueError, match="credit for"):
            self.worker.send(self.worker.available + excess)
        assert self.worker.sent == before

    @precondition(lambda self: self.chunks)
    @rule()
    def arrive(self) -> None:
        self.reader.receive(self.chunks.pop(0))

    @rule(excess=st.integers(1, 50))
    def notices_an_overrun(self, excess: int) -> None:
        before = self.reader.received
        with pytest.raises(ProtocolError, match="credit overrun"):
            self.reader.receive(self.reader.limit - before + excess)
        assert self.reader.received == before

    @precondition(lambda self: self.reader.received > self.reader.consumed)
    @rule(data=st.data())
    def consume(self, data: st.DataObject) -> None:
        limit = self.reader.consume(data.draw(st.integers(1, self.reader.received - self.reader.consumed)))
        if limit is not None:
            assert limit > self.highest
            self.highest = limit
            self.grants.append(limit)

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), keep=st.booleans())
    def grant(self, data: st.DataObject, keep: bool) -> None:
        limit = data.draw(st.sampled_from(self.grants))
        before = self.worker.limit
        assert self.worker.grant(limit) == (limit > before)
        assert self.worker.limit == max(before, limit)
        if not keep:
            self.grants.remove(limit)

    @invariant()
    def bounds(self) -> None:
        if not hasattr(self, "size"):
            return
        assert self.reader.received + sum(self.chunks) == self.worker.sent
        assert self.worker.limit <= self.reader.limit == self.highest
        assert self.worker.sent - self.reader.consumed <= self.size
        # Nobody waits for ever: with all read and all grants in, the worker may send.
        if self.worker.sent == self.reader.consumed and not self.grants:
            assert self.worker.available


TestCredit = CreditMachine.TestCase
TestCredit.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
