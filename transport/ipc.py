"""Sockets in the file system: made so that only the user who runs the process can connect to them.

Whoever can write to a socket's file can connect to it, and whoever can write to its folder can put a socket of his
own in its place. So both are the user's alone: the file is made with mode 0600, the folder with 0700 where there is
none, and a folder that others can write to is refused.

Two forms of `ipc` endpoints name no such file:

- `ipc://*`: libzmq makes a new folder for itself and, with the mask that is set here, keeps it to the user as well.
- `ipc://@NAME`: an abstract name has no owner and no mode. It is open to all users of the machine, as a port of the
  loopback interface is.
"""

from __future__ import annotations

import os
import socket as sockets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .endpoints import EndpointError

IPC = "ipc://"
#: What is taken off the mode of a new file: all that is for others, and the right to execute what is no program.
_FILE_MASK = 0o177
#: The same for a new folder.
_FOLDER_MASK = 0o077
_FOLDER_MODE = 0o700
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
#: The mask is the process's: two threads that set it at a time would restore each other's.
_MASK = threading.Lock()


@contextmanager
def private_file(endpoint: str) -> Iterator[None]:
    """Prepare an `ipc` endpoint to be bound in the block, where new files are the user's alone.

    A folder that does not exist is made, if the one above it does: a path with a mistake in it must not grow a tree.

    Raises:
        EndpointError: somebody listens there, the folder is open to others, or what is there is no socket.
    """
    path = endpoint.removeprefix(IPC)
    named = not path.startswith("@") and path != "*"
    if os.name == "posix" and named:
        _check_folder(endpoint, Path(path).parent)
        _check_place(endpoint, path)
    with _MASK:
        # Where libzmq makes a folder, too, that one has to be usable.
        before = os.umask(_FILE_MASK if named else _FOLDER_MASK)
        try:
            yield
        finally:
            os.umask(before)


def _check_folder(endpoint: str, folder: Path) -> None:
    try:
        with suppress(FileExistsError):
            folder.mkdir(_FOLDER_MODE)
        found = folder.stat()
    except OSError as error:
        why = f"cannot make the folder {folder}: {error.strerror}"
        raise EndpointError(f"cannot listen on {endpoint}: {why}") from error
    if found.st_uid not in (os.geteuid(), 0):
        raise EndpointError(
            f"cannot listen on {endpoint}: the folder {folder} belongs to another user, who could put a socket of "
            "his own there: choose a folder of yours, or one that does not exist"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS:
        raise EndpointError(
            f"cannot listen on {endpoint}: other users can write to the folder {folder}, and put a socket of their "
            f"own there: choose a folder that does not exist, such as {folder / 'tokenmq'}, or chmod go-w it"
        )


def _check_place(endpoint: str, path: str) -> None:
    """Refuse a path where something is: libzmq removes the file before it binds, whatever it is and whosever."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise EndpointError(f"cannot listen on {endpoint}: there is a file {path}, which is no socket")
    except OSError:
        return  # nothing there, or what bind will complain about
    if _is_taken(path):
        raise EndpointError(f"cannot listen on {endpoint}: the address is already in use")


def _is_taken(path: str) -> bool:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # its backlog is full
        except OSError:
            return False  # a file that a killed broker left
    return True
