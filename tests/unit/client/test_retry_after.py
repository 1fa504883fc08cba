"""How long brokers and workers may have a request rest: no longer than nobody may take it."""

from __future__ import annotations

import pytest

from tokenmq.client.events import Ended
from tokenmq.protocol.errors import BusyError
from tokenmq.protocol.limits import MAX_SECONDS

from .story import Story, failure


@pytest.mark.parametrize("retry_after_s", [31.0, MAX_SECONDS])
def test_a_rest_beyond_the_recovery_timeout_is_the_end(retry_after_s: float) -> None:
    story = Story()
    story.open_sessions()
    story.submit()
    error = failure(story.error("busy", retry_after_s=retry_after_s))
    assert isinstance(error, BusyError)
    assert "(it is to be tried again in" in error.message
    assert "more than 30 s are too long" in error.message


def test_a_shorter_one_is_kept() -> None:
    story = Story()
    story.open_sessions()
    story.submit()
    actions = story.error("busy", retry_after_s=5.0)
    assert not [action for action in actions if isinstance(action, Ended)]
