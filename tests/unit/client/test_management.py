"""The management methods: what each asks of the broker, the same for both kinds of client."""

from __future__ import annotations

from typing import Any

import pytest

from tokenmq.client import AsyncClient, BadRequestError, Client
from tokenmq.client.affinity import affinity_of
from tokenmq.client.management import Management
from tokenmq.protocol.payload import Generation


class Asked(Management[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]):
    """A client whose answers are the questions."""

    def query(self, method: str, **arguments: Any) -> Any:
        return method, arguments


CLIENT = Asked()


@pytest.mark.parametrize(
    ("asked", "method", "arguments"),
    [
        (CLIENT.models(), "models", {}),
        (CLIENT.models(order="internvl"), "models", {"order": "internvl"}),
        (CLIENT.workers(), "workers", {}),
        (CLIENT.workers(tree=True), "workers", {"tree": True}),
        (CLIENT.status(), "status", {}),
        (CLIENT.status(tree=True), "status", {"tree": True}),
        (CLIENT.route("m"), "route", {"model": "m"}),
        (CLIENT.refresh(), "refresh", {}),
        (CLIENT.remove("w1"), "remove", {"worker": "w1"}),
        (CLIENT.drain("w1"), "drain", {"worker": "w1"}),
        (CLIENT.drain("w1", grace_s=0), "drain", {"worker": "w1", "grace_s": 0}),
        (CLIENT.drain("w1", stay=True), "drain", {"worker": "w1", "stay": True}),
        (CLIENT.undrain("west/w1"), "undrain", {"worker": "west/w1"}),
        (CLIENT.set_policy("lottery"), "set_policy", {"policy": "lottery"}),
        (CLIENT.set_speed("w1", 2.5), "set_speed", {"worker": "w1", "speed": 2.5}),
        (CLIENT.set_speed("w1", None), "set_speed", {"worker": "w1"}),
    ],
)
def test_what_is_asked(asked: tuple[str, dict[str, Any]], method: str, arguments: dict[str, Any]) -> None:
    assert asked == (method, arguments)


def test_a_route_for_a_session_is_that_of_its_requests() -> None:
    _, arguments = CLIENT.route("m", session="tea")
    assert arguments["affinity"] == affinity_of(Generation(prompt="whatever"), "tea")


def test_a_session_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(BadRequestError, match="session"):
        CLIENT.route("m", session="\ud800")


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_both_clients_have_them_from_one_place(kind: type[Management[Any, Any]]) -> None:
    own = [name for name in vars(Management) if not name.startswith("_") and name != "query" and name in vars(kind)]
    assert issubclass(kind, Management)
    assert own == []
