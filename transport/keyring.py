"""A broker's folder of keys: its own pair, and the lists of those that it lets in, read again while they change.

    DIR/server.key_secret     the broker's own pair
    DIR/clients/NAME.key      public keys; who holds the secret half is a client and is called NAME
    DIR/workers/NAME.key
    DIR/admins/NAME.key

What is doubtful counts for nobody: a file that cannot be read, that others can write, that holds no key; a folder
that others can write, or that is gone. A key that lies in two files counts for neither of them: one is a mistake or a
lie, and its holder is not to choose who he is. Names that begin with a dot are left alone: files of editors, and
copies that are not complete.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from ..protocol.identity import Allowed, Identity, Role
from ..protocol.limits import MAX_NAME_CHARS
from .keys import PUBLIC_SUFFIX, KeyFileError, KeyPair, check_guarded, create_pair, load_pair, read_public, shown

#: The broker's own pair, and its public half for those who connect.
SERVER_PAIR = "server.key_secret"
SERVER_KEY = "server.key"
#: Where the keys of a role lie.
FOLDERS = {role: f"{role.value}s" for role in Role}

#: A file may be written twice within one tick of its file system's clock, and the second time leaves no trace. So one
#: that has changed so lately is read again at the next look. Linux's own clock has 10 ms at most.
_TICK_NS = 50_000_000
#: The same where times have no fractions of a second, as those of FAT, which knows even ones only.
_COARSE_TICK_NS = 2_000_000_000
_SECOND_NS = 1_000_000_000
#: This process or machine can open no more files now; that says nothing about the keys.
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

#: What tells one state of a file from another: device, inode, size, times of the last change of content and of
#: anything, in ns; permissions are in the latter. None: it cannot be looked at.
_Stamp: TypeAlias = "tuple[int, int, int, int, int] | None"


@dataclass(frozen=True, slots=True)
class KeyFile:
    """One file of an allow-list.

    Attributes:
        role: whose list it is in.
        name: the file's, without `.key`.
        path: where it is.
    """

    role: Role
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class _Folder:
    """What a look at a role's folder has shown."""

    files: dict[str, _Stamp]  # by name
    complaint: str | None = None


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a file held when it was last read."""

    stamp: _Stamp
    key: str | None
    complaint: str | None
    settled: bool  # while its stamp stays, so does what it holds


class Keyring:
    """The keys of a broker.

    Attributes:
        server: the broker's own pair, as it was at construction.
        allowed: whom it lets in, as last read; never changed, only replaced.
    """

    def __init__(self, folder: str) -> None:
        """Read the keys.

        Args:
            folder: made by `zmq-broker keys init`.

        Raises:
            KeyFileError: it is no such folder, the server's pair is unusable, or others could put keys in; the
                message says what to type.
        """
        self._folder = folder
        _check(folder)
        self.server: KeyPair = load_pair(os.path.join(folder, SERVER_PAIR))
        self.allowed = Allowed(MappingProxyType({}))
        self._seen: dict[Role, _Folder] = {}
        self._readings: dict[KeyFile, _Reading] = {}
        self._complaints: list[str] = []
        self._standing: frozenset[str] = frozenset()
        self.poll()

    def poll(self) -> bool:
        """Look whether anything has changed; return whether others are allowed now than before.

        Where nothing has, this is a look at each file and no reading: about 2 ms for a thousand keys. It never raises
        an error: what cannot be read lets nobody in.
        """
        seen = {role: self._look(role) for role in Role}
        if seen == self._seen and all(reading.settled for reading in self._readings.values()):
            return False
        self._seen = seen
        self._read(seen)
        before = self.allowed
        self.allowed = Allowed(MappingProxyType(self._identities()))
        return self.allowed.by_key != before.by_key

    def complaints(self) -> list[str]:
        """Return what is wrong with files and folders; each once, and again if it was mended in between."""
        taken, self._complaints = self._complaints, []
        return taken

    def _look(self, role: Role) -> _Folder:
        path = os.path.join(self._folder, FOLDERS[role])
        try:
            for guarded in (self._folder, path):
                check_guarded(guarded, os.stat(guarded))
            with os.scandir(path) as entries:
                return _Folder(_stamps(entries))
        except KeyFileError as error:
            return _Folder({}, f"{error}; until then it lets nobody in")
        except OSError as error:
            if error.errno in _OUT_OF_FILES and role in self._seen:
                return self._look_at_known(role)
            return _Folder({}, f"{shown(path)} cannot be read ({error.strerror}), and lets nobody in")

    def _look_at_known(self, role: Role) -> _Folder:
        """Look at the files that are known, which opens none.

        A flood of connections can take all the files that this process may open. That must not revoke every key; nor
        may it keep a revoked one alive.
        """
        files: dict[str, _Stamp] = {}
        for name in self._seen[role].files:
            with contextlib.suppress(OSError):  # it is gone, and so is its key
                files[name] = _stamp_of(os.stat(self._file(role, name).path))
        return _Folder(files, "no more files can be opened: new keys count once there are some to spare")

    def _read(self, seen: dict[Role, _Folder]) -> None:
        """Read what has changed, or may have."""
        before, self._readings = self._readings, {}
        now_ns = time.time_ns()
        for role, folder in seen.items():
            for name, stamp in sorted(folder.files.items()):
                file = self._file(role, name)
                known = before.get(file)
                if known is not None and known.stamp != stamp:
                    known = None
                if known is None or not known.settled:
                    self._readings[file] = _reading(file, stamp, known, now_ns)
                else:
                    self._readings[file] = known

    def _identities(self) -> dict[str, Identity]:
        """Return who may come in by key, and note what is wrong now and was not before."""
        holders: dict[str, list[KeyFile]] = {}
        for file, reading in self._readings.items():
            if reading.key is not None:
                holders.setdefault(reading.key, []).append(file)
        wrong = [folder.complaint for folder in self._seen.values()]
        wrong += [reading.complaint for reading in self._readings.values()]
        identities = {}
        for key, files in holders.items():
            if key == self.server.public:
                wrong += [f"{shown(file.path)} holds the server's own key, and lets nobody in" for file in files]
            elif len(files) > 1:
                paths = " and ".join(shown(file.path) for file in files)
                wrong.append(f"{paths} hold the same key, which lets nobody in until only one of them does")
            else:
                identities[key] = Identity(files[0].role, files[0].name, key)
        standing = dict.fromkeys(complaint for complaint in wrong if complaint)
        self._complaints += [complaint for complaint in standing if complaint not in self._standing]
        self._standing = frozenset(standing)
        return identities

    def _file(self, role: Role, name: str) -> KeyFile:
        return key_file(self._folder, role, name)


def key_file(folder: str, role: Role, name: str) -> KeyFile:
    """Return where the public key of this role and name lies, or would."""
    return KeyFile(role, name, os.path.join(folder, FOLDERS[role], name + PUBLIC_SUFFIX))


def key_files(folder: str) -> list[KeyFile]:
    """Return all files of the allow-lists, whatever is in them.

    Raises:
        KeyFileError: this is no folder of keys, or it cannot be read.
    """
    _check_shape(folder)
    found = []
    try:
        for role, lists in FOLDERS.items():
            path = os.path.join(folder, lists)
            if os.path.lexists(path):  # a role without a folder has no keys
                with os.scandir(path) as entries:
                    found += [key_file(folder, role, name) for name in sorted(name for name, _ in _keys(entries))]
    except OSError as error:
        raise KeyFileError(f"cannot read {shown(path)}: {error.strerror}") from error
    return found


def holders(folder: str, key: str) -> list[KeyFile]:
    """Return the files of the allow-lists that hold this public key.

    Raises:
        KeyFileError: this is no folder of keys, or it cannot be read.
    """
    found = []
    for file in key_files(folder):
        with contextlib.suppress(KeyFileError):  # it holds no key, so not this one
            if read_public(file.path) == key:
                found.append(file)
    return found


def create_folder(folder: str) -> str:
    """Make a folder of keys, mode 0700, with a pair for the server and nobody allowed; return the public key.

    Raises:
        KeyFileError: there is something of this name already that is no empty folder, or it cannot be made; then
            nothing is left behind.
    """
    made: list[str] = []
    try:
        if os.path.lexists(folder):
            _check_empty(folder)
            os.chmod(folder, 0o700)
            check_guarded(folder, os.stat(folder))
        else:
            os.mkdir(folder, 0o700)
            made.append(folder)
        for lists in FOLDERS.values():
            path = os.path.join(folder, lists)
            os.mkdir(path, 0o700)
            made.append(path)
        return create_pair(os.path.join(folder, SERVER_KEY), os.path.join(folder, SERVER_PAIR))
    except BaseException as error:
        for path in reversed(made):
            os.rmdir(path)
        if isinstance(error, OSError):
            raise KeyFileError(f"cannot make {shown(folder)}: {error.strerror}") from error
        raise


def check_name(name: str) -> None:
    """Check that a key's name can stand in messages, logs and tables.

    Raises:
        KeyFileError: it is empty or too long, or has characters that a line cannot show.
    """
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise KeyFileError(f"a key's name has 1 to {MAX_NAME_CHARS} printable characters, not {name!r:.80}")


def _check(folder: str) -> None:
    """Check that this is a folder of keys, and that only its owner can put keys in."""
    _check_shape(folder)
    try:
        for path in (folder, *(os.path.join(folder, lists) for lists in FOLDERS.values())):
            if os.path.lexists(path):
                check_guarded(path, os.stat(path))
    except OSError as error:
        raise KeyFileError(f"cannot look at {shown(path)}: {error.strerror}") from error


def _check_empty(folder: str) -> None:
    if os.path.lexists(os.path.join(folder, SERVER_PAIR)):
        raise KeyFileError(f"{shown(folder)} is a folder of keys already, and is not overwritten")
    if not os.path.isdir(folder) or os.listdir(folder):
        raise KeyFileError(f"{shown(folder)} is there already, and is no empty folder: take another name")


def _check_shape(folder: str) -> None:
    if not os.path.lexists(os.path.join(folder, SERVER_PAIR)):
        what = f"has no {SERVER_PAIR} in it" if os.path.isdir(folder) else "is no folder of keys"
        raise KeyFileError(f"{shown(folder)} {what}: make one with `zmq-broker keys init {shlex.quote(folder)}`")


def _keys(entries: Iterable[os.DirEntry[str]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Pick the key files; give them with the names of their holders."""
    for entry in entries:
        if entry.name.endswith(PUBLIC_SUFFIX) and not entry.name.startswith("."):
            yield entry.name[: -len(PUBLIC_SUFFIX)], entry


def _stamps(entries: Iterable[os.DirEntry[str]]) -> dict[str, _Stamp]:
    stamps: dict[str, _Stamp] = {}
    for name, entry in _keys(entries):
        if entry.is_symlink():
            stamps[name] = None  # unless it leads to something
        with contextlib.suppress(OSError):  # it was removed a moment ago
            stamps[name] = _stamp_of(entry.stat())
    return stamps


def _stamp_of(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_old(changed_ns: int, now_ns: int) -> bool:
    """Tell whether a file that changed then could not change now and keep its stamp."""
    tick_ns = _TICK_NS if changed_ns % _SECOND_NS else _COARSE_TICK_NS
    return abs(now_ns - changed_ns) > tick_ns  # a clock that was set back makes no file young for ever


def _reading(file: KeyFile, stamp: _Stamp, known: _Reading | None, now_ns: int) -> _Reading:
    """Read a file.

    Args:
        file: which.
        stamp: of it, as seen before.
        known: what it held when it had the same stamp.
        now_ns: by the clock that file systems use.
    """
    settled = stamp is not None and _is_old(stamp[-1], now_ns)
    try:
        check_name(file.name)
        return _Reading(stamp, read_public(file.path, guarded=True), None, settled)
    except KeyFileError as error:
        cause = error.__cause__
        if isinstance(cause, OSError):
            if cause.errno in _OUT_OF_FILES and known is not None:
                return known
            settled = False  # what failed may work at the next time without any change of the file
        return _Reading(stamp, None, f"{error}; until then it lets nobody in", settled)
