"""CURVE keys in files: making them, reading them, and refusing those that others can read (ZeroMQ RFC 26, CurveZMQ).

The files look as those of pyzmq and CZMQ do, and each can read the others'. pyzmq's own reader is not used here: it
has no bounds, does not look at the permissions of what it opens, and ends in an IndexError where a line lacks its
equals sign. zmq itself is loaded where a key is made or proved, so that the help of the commands needs none of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import string
from dataclasses import dataclass, field
from types import ModuleType

#: Characters of a key, each half: 32 bytes in Z85 (RFC 32).
KEY_CHARS = 40
#: A key file: two keys, and room for comments and metadata.
MAX_FILE_BYTES = 64 * 1024
#: What the name of a file ends with, where its holder must keep it to himself.
PRIVATE_SUFFIX = "_secret"
PUBLIC_SUFFIX = ".key"

#: The digits of Z85, by their value.
_ALPHABET = string.digits + string.ascii_lowercase + string.ascii_uppercase + ".-:+=^!/*?&<>()[]{}@%$#"
_VALUES = {character: value for value, character in enumerate(_ALPHABET)}
_DIGITS = 5  # of one group of four bytes
#: The digits of 2**32 - 1: groups of digits are in the order of their numbers.
_LARGEST = bytes((2**32 - 1) // 85**place % 85 for place in reversed(range(_DIGITS)))
#: Lengths that a key has with some characters lost or doubled on the way through a shell.
_NEARLY_A_KEY = range(30, 45)

_PRIVATE_FORM = """# A CURVE key pair. Whoever can read this file can pass for its owner: keep it at mode 0600.

metadata
curve
    public-key = "{public}"
    secret-key = "{secret}"
"""
_PUBLIC_FORM = """# The public half of a CURVE key pair. It is no secret; see that it reaches others unchanged.

metadata
curve
    public-key = "{public}"
"""


class KeyFileError(ValueError):
    """A key that cannot be used; the message names the file and says why, and never shows what is in it."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key pair; both are 40 characters of Z85.

    Attributes:
        public: the half that others know it by.
        secret: the half that nobody else may see.
    """

    public: str
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Curve:
    """What a peer needs to connect to a server with CURVE.

    Attributes:
        pair: its own.
        server_key: the server's public key, as 40 characters of Z85.
    """

    pair: KeyPair
    server_key: str


@dataclass(frozen=True, slots=True)
class _Content:
    """What a key file has in it."""

    public: str | None
    secret: str | None = field(repr=False)


def is_key(text: str) -> bool:
    """Tell whether this is 32 bytes in Z85: 40 of its characters, each group of five below 2**32."""
    if len(text) != KEY_CHARS or not set(text) <= _VALUES.keys():
        return False
    digits = bytes(map(_VALUES.__getitem__, text))
    return all(digits[start : start + _DIGITS] <= _LARGEST for start in range(0, KEY_CHARS, _DIGITS))


def load_pair(path: str) -> KeyPair:
    """Read a file with a secret key, which only this user or root may be able to read.

    Raises:
        KeyFileError: it is not there, others can read or write it, it has no key pair in it, or its halves are not of
            one pair; the message says what to do.
    """
    content, status = _read(path)
    if content.secret is None:
        what = "only a public key" if content.public else "no secret key"
        raise KeyFileError(
            f"{shown(path)} has {what} in it: give the file with the secret key, NAME{PUBLIC_SUFFIX}{PRIVATE_SUFFIX}"
        )
    _check_private(path, status)  # of what holds no secret, the mode matters to nobody
    if content.public is None:
        raise KeyFileError(f"{shown(path)} has no public key in it beside the secret one")
    for half, key in (("public", content.public), ("secret", content.secret)):
        if not is_key(key):
            raise KeyFileError(f"{shown(path)}: its {half} key is not {KEY_CHARS} characters of Z85")
    if _public_of(content.secret) != content.public:
        raise KeyFileError(f"{shown(path)}: its public key does not belong to its secret key")
    return KeyPair(content.public, content.secret)


def public_key(given: str) -> str:
    """Return a public key, as 40 characters of Z85.

    Args:
        given: the key itself, or the path of a file that has it. What names a file that exists is a path, even if it
            could be read as a key, and so is all that ends with .key.

    Raises:
        KeyFileError: it is neither, or a file with a secret in it.
    """
    if given.endswith((PUBLIC_SUFFIX, PRIVATE_SUFFIX)) or _exists(given):
        return read_public(given)
    if is_key(given.strip()):
        return given.strip()
    raise KeyFileError(
        f"there is no file {shown(given)}, nor is it a public key, which is {KEY_CHARS} characters of Z85"
    )


def read_public(path: str, *, guarded: bool = False) -> str:
    """Read a file with a public key; return the key as 40 characters of Z85.

    Args:
        path: of the file.
        guarded: refuse a file that anybody but this user and root can write: who writes it chooses the key.

    Raises:
        KeyFileError: that is so, it cannot be read, or has a secret or no key in it.
    """
    if path.endswith(PRIVATE_SUFFIX):
        raise KeyFileError(_give_the_public_one(path))
    content, status = _read(path)
    if guarded:
        check_guarded(path, status)
    if content.secret is not None:
        raise KeyFileError(_give_the_public_one(path))
    if content.public is None:
        raise KeyFileError(f'{shown(path)} has no key in it: a key file has a line such as public-key = "..."')
    if not is_key(content.public):
        raise KeyFileError(f"{shown(path)}: its public key is not {KEY_CHARS} characters of Z85")
    return content.public


def create_pair(public_path: str, secret_path: str) -> str:
    """Make a key pair and write both files; return the public key.

    The secret one has mode 0600 from its first byte on. It comes first: a public key that is in place lets its owner
    in, and there is none before the secret is safe.

    Raises:
        KeyFileError: one of them is there already or cannot be written; then neither is left behind.
    """
    public, secret = _make()
    _write(secret_path, _PRIVATE_FORM.format(public=public, secret=secret), 0o600)
    try:
        write_public(public_path, public)
    except BaseException:
        os.unlink(secret_path)
        raise
    return public


def write_public(path: str, key: str) -> None:
    """Write a file with a public key, which all may read.

    Raises:
        KeyFileError: it is there already, or cannot be written.
    """
    _write(path, _PUBLIC_FORM.format(public=key), 0o644)


def check_guarded(path: str, status: os.stat_result) -> None:
    """Check that only this user and root can change a file or folder.

    Raises:
        KeyFileError: others can; the message says what to do.
    """
    _check_owner(path, status)
    if status.st_mode & 0o022:
        mode = stat.S_IMODE(status.st_mode)
        raise KeyFileError(
            f"others can write to {shown(path)} (mode {mode:04o}): chmod go-w {shlex.quote(shown(path))}"
        )


def shown(given: str) -> str:
    """Return a path as messages show it: on one line, and not at all where it may be a key, by mistake."""
    text = given.strip(" \t\r\n'\"")
    named = given.endswith((PUBLIC_SUFFIX, PRIVATE_SUFFIX)) or _exists(given)
    if len(text) in _NEARLY_A_KEY and set(text) <= _VALUES.keys() and not named:
        return f"of the name that was given (not shown: its {len(text)} characters may be a key)"
    return given if given and given.isprintable() else repr(given)


def _check_private(path: str, status: os.stat_result) -> None:
    _check_owner(path, status)
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise KeyFileError(
            f"others can read or write {shown(path)} (mode {mode:04o}), which has a secret key in it: "
            f"chmod 600 {shlex.quote(shown(path))}, and make a new key if somebody may have read it"
        )


def _check_owner(path: str, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(
            f"{shown(path)} belongs to user {status.st_uid}, who can change it: run this as that user, or "
            f"chown {os.geteuid()} {shlex.quote(shown(path))}"
        )


def _read(path: str) -> tuple[_Content, os.stat_result]:
    """Read a key file; return what is in it, and the opened file's own status, as a path can change hands."""
    try:
        # Not waiting: whoever opens a named pipe would hang until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
                raise KeyFileError(f"{shown(path)} is {what}: expected a key file")
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise KeyFileError(_why_unread(path, error)) from error
    except ValueError as error:
        if isinstance(error, KeyFileError):
            raise
        raise KeyFileError(f"{shown(path)} is no path of a file") from error  # a null character in it
    if len(content) > MAX_FILE_BYTES:
        raise KeyFileError(f"{shown(path)} is longer than {MAX_FILE_BYTES} bytes: expected a key file")
    return _parse(path, content.decode("latin-1")), status  # which takes any byte; what is no Z85 is found later


def _why_unread(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no file {shown(path)}"
    if error.errno == errno.EACCES:
        return f"this user (number {os.geteuid()}) may not read {shown(path)}: have its owner give it the file"
    return f"cannot read {shown(path)}: {error.strerror}"


def _parse(path: str, text: str) -> _Content:
    """Find the keys in the text; a line is `name = "value"`, or begins with # for a comment."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        name, value = name.strip(), value.strip(" \t'\"")
        if not equals or name not in ("public-key", "secret-key"):
            continue
        if found.setdefault(name, value) != value:
            raise KeyFileError(f"{shown(path)} has more than one {name} in it")
    return _Content(found.get("public-key"), found.get("secret-key"))


def _write(path: str, text: str, mode: int) -> None:
    """Write a new file, or nothing."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as error:
        raise KeyFileError(f"{shown(path)} is there already, and is not overwritten: take another name") from error
    except OSError as error:
        raise KeyFileError(f"cannot make {shown(path)}: {error.strerror}") from error
    try:
        with open(descriptor, "wb") as file:
            file.write(text.encode("ascii"))
            file.flush()
            os.fsync(file.fileno())  # a key that somebody was told of is not to be empty after a power cut
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise KeyFileError(f"cannot write {shown(path)}: {error.strerror}") from error
        raise


def _make() -> tuple[str, str]:
    zmq = _zmq()
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def _public_of(secret: str) -> str:
    """Return the public key that belongs to a secret one of good form."""
    public: bytes = _zmq().curve_public(secret.encode("ascii"))
    return public.decode("ascii")


def _zmq() -> ModuleType:
    import zmq  # here: the help of the commands is to be quick

    if not zmq.has("curve"):
        raise KeyFileError(
            "this libzmq was built without CURVE: `pip install --force-reinstall pyzmq` brings one with it"
        )
    return zmq


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def _give_the_public_one(path: str) -> str:
    public = path.removesuffix(PRIVATE_SUFFIX)
    instead = shown(public) if public != path and public.endswith(PUBLIC_SUFFIX) else f"FILE{PUBLIC_SUFFIX}"
    return f"{shown(path)} has a secret key in it, which stays where it is: give the public one, {instead}"
