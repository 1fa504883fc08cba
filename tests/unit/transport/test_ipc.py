"""Sockets in the file system: only the user's own, in folders that are the user's own."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from tokenmq.transport.endpoints import EndpointError
from tokenmq.transport.sockets import router


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """As open as it comes: what is private in spite of it, is made so."""
    before = os.umask(0o000)
    yield
    assert os.umask(before) == 0o000, "the mask was not restored"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_socket_and_folder_are_the_users_alone(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    path = tmp_path / "run" / "front"
    with zmq.Context() as former, router(former, [f"ipc://{path}"])[0]:
        assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    with router(context, [f"ipc://{path}"])[0]:  # and again, now that the folder is there
        assert mode(path) == 0o600


def test_only_one_folder_is_made(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=r"cannot make the folder .*/no/such: No such file"):
        router(context, [f"ipc://{tmp_path}/no/such/front"])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("open_mode", [0o777, 0o1777, 0o770, 0o720])
def test_a_folder_that_others_can_write_to_is_refused(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, open_mode: int
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(open_mode)
    with pytest.raises(EndpointError, match=r"other users can write to the folder .*/shared/tokenmq, or chmod go-w"):
        router(context, [f"ipc://{folder}/front"])
    assert not list(folder.iterdir())
    with router(context, [f"ipc://{folder}/tokenmq/front"])[0]:  # what the message says
        assert mode(folder / "tokenmq") == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(0o755)
    os.chown(folder, 12345, 12345)
    with pytest.raises(EndpointError, match="belongs to another user"):
        router(context, [f"ipc://{folder}/front"])


def test_a_file_that_is_no_socket_stays(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    notes = tmp_path / "notes"
    notes.write_text("mine")
    with pytest.raises(EndpointError, match="is no socket"):
        router(context, [f"ipc://{notes}"])
    assert notes.read_text() == "mine"


def test_a_path_that_libzmq_makes_up_is_private_too(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    server, (endpoint,) = router(context, ["ipc://*"])
    with server:
        path = Path(endpoint.removeprefix("ipc://"))
        assert mode(path.parent) == 0o700
        assert mode(path) & 0o077 == 0
