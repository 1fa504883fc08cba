"""zmq-broker keys: make, list and revoke the keys of those that a broker lets in."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..protocol.identity import Role
from ..transport.keyring import (
    SERVER_KEY,
    KeyFile,
    Keyring,
    create_folder,
    holders,
    key_file,
    key_files,
)
from ..transport.keys import PRIVATE_SUFFIX, PUBLIC_SUFFIX, KeyFileError, create_pair, public_key, write_public
from .lifecycle import fail
from .options import option, settings
from .printing import print_json
from .tables import table

DEFAULT_FOLDER = "keys"
#: The longest name of a file, on all systems that matter, is 255 bytes.
MAX_NAME_BYTES = 255 - len(PUBLIC_SUFFIX + PRIVATE_SUFFIX)
#: Names that are file names everywhere, need no quotes in a shell, and are no options.
_NAME = re.compile(r"[A-Za-z0-9_@][A-Za-z0-9._@-]*")
_ROLES = [role.value for role in Role]
_COLUMNS = ("role", "name", "public_key", "since")
#: What somebody of a role runs.
_COMMANDS = {Role.CLIENT: "zmq-client", Role.WORKER: "zmq-worker", Role.ADMIN: "zmq-client"}
#: Known names that an error lists.
_MOST_LISTED = 20


def _curve_option(command: Any) -> Any:
    return option(
        "--curve", "folder", default=DEFAULT_FOLDER, envvar="TOKENMQ_BROKER_CURVE", metavar="DIR",
        help="The broker's folder of keys.",
    )(command)  # fmt: skip


@click.group(context_settings=settings("TOKENMQ_BROKER_KEYS"), short_help="Make, list and revoke keys.")
def keys() -> None:
    """Make, list and revoke the keys of those that a broker with --curve lets in.

    A key is a pair: the secret half stays with its owner, the public half lies in the broker's folder, under the role
    that it gives: a client sends requests, a worker answers them, an admin may also drain, remove and set. A broker
    that runs sees changes within a second.
    """


@keys.command(short_help="Make DIR, a broker's folder of keys.")
@click.argument("folder", metavar="DIR")
def init(folder: str) -> None:
    """Make DIR, a folder with a key pair for the broker and with nobody allowed yet."""
    with _one_line_errors():
        public = create_folder(folder)
    where = shlex.quote(folder)
    click.echo(f"{folder} is made; the broker's public key is {public}")
    click.echo("Next:")
    click.echo(f"  zmq-broker --curve {where}")
    for role in Role:
        click.echo(f"  zmq-broker keys new NAME --role {role.value} --curve {where}")


@keys.command(short_help="Let NAME in, with a new key.")
@click.argument("name")
@option("--role", type=click.Choice(_ROLES), required=True, help="What the owner of the key may do.")
@_curve_option
@option(
    "--out", metavar="FILE", show_default=f"NAME{PUBLIC_SUFFIX}{PRIVATE_SUFFIX}",
    help="Where the secret key goes, readable by you alone; no file is ever overwritten.",
)  # fmt: skip
@option(
    "--public", metavar="KEY", show_default="a new pair is made",
    help="Let in the owner of this public key, which was made elsewhere: 40 characters of Z85, or a file with them.",
)  # fmt: skip
def new(name: str, role: str, folder: str, out: str | None, public: str | None) -> None:
    """Make a key pair for NAME, and let its owner in: the public half goes to the broker's folder.

    NAME stands in the broker's logs, and in fairness and limits: letters, digits and . _ - @.
    """
    if public is not None and out is not None:
        raise click.UsageError("--out is for a new secret key: with --public there is none")
    if len(name) > MAX_NAME_BYTES or not _NAME.fullmatch(name):
        raise click.BadParameter(
            f"expected at most {MAX_NAME_BYTES} letters, digits and . _ - @, the first of them no . or -, "
            f"got {name!r:.80}",
            param_hint="NAME",
        )
    secret_path = out or name + PUBLIC_SUFFIX + PRIVATE_SUFFIX
    with _one_line_errors():
        server = Keyring(folder).server  # which checks the folder: a key that the broker refuses helps nobody
        file = _free_file(folder, Role(role), name)
        if public is not None:
            _enrol(folder, file, public, server.public)
        else:
            create_pair(file.path, secret_path)
    click.echo(f"{name} may connect as {role} from now on; its public key is in {file.path}")
    if public is None:
        click.echo(
            f"Its secret key is in {secret_path}: move it to where {name} runs, by a way that nobody else sees."
        )
    click.echo(f"Copy {os.path.join(folder, SERVER_KEY)} there too, which is no secret; with these paths:")
    secret = shlex.quote(secret_path) if public is None else "FILE"
    server_path = shlex.quote(os.path.join(folder, SERVER_KEY))
    click.echo(f"  {_COMMANDS[file.role]} --server-key {server_path} --key {secret}")


def _free_file(folder: str, role: Role, name: str) -> KeyFile:
    """Return where a new key goes.

    Raises:
        KeyFileError: the name is taken, in whatever role.
    """
    for taken in key_files(folder):
        if taken.name == name:
            raise KeyFileError(f"there is a {taken.role.value} {name} already: {taken.path}; take another name")
    file = key_file(folder, role, name)
    lists = os.path.dirname(file.path)
    if not os.path.isdir(lists):
        os.mkdir(lists, 0o700)
    return file


def _enrol(folder: str, file: KeyFile, given: str, server_key: str) -> None:
    """Let in the owner of a key that was made elsewhere.

    Raises:
        KeyFileError: it is no key, or somebody's already: two names for one key would shut out both.
    """
    key = public_key(given)
    if key == server_key:
        raise KeyFileError("this is the broker's own public key: give that of the one to let in")
    for owner in holders(folder, key):
        raise KeyFileError(f"this is the key of the {owner.role.value} {owner.name} already: {owner.path}")
    write_public(file.path, key)


@keys.command("list", short_help="List whom the broker lets in.")
@_curve_option
@option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def list_keys(folder: str, as_json: bool) -> None:
    """List whom the broker lets in; what is wrong with other files goes to standard error."""
    with _one_line_errors():
        keyring = Keyring(folder)
        rows = []
        for identity in sorted(keyring.allowed.by_key.values(), key=lambda one: (_ROLES.index(one.role), one.name)):
            changed = os.stat(key_file(folder, identity.role, identity.name).path).st_mtime
            since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(changed))
            rows.append(dict(zip(_COLUMNS, (identity.role.value, identity.name, identity.key, since), strict=True)))
    if as_json:
        for row in rows:
            print_json(row)
    else:
        click.echo(table(rows, _COLUMNS))
    for complaint in keyring.complaints():
        click.echo(f"warning: {complaint}", err=True)


@keys.command(short_help="Let NAME in no more.")
@click.argument("name")
@option("--role", type=click.Choice(_ROLES), show_default="the one it has", help="Only the key of this role.")
@_curve_option
def revoke(name: str, role: str | None, folder: str) -> None:
    """Let NAME in no more: its public key is removed, and a broker that runs cuts it off within a second."""
    with _one_line_errors():
        file = _find(folder, name, role)
        others = _others_with_its_key(folder, file)
        os.unlink(file.path)
    click.echo(f"{file.role.value} {name} is revoked: a broker that runs cuts it off within a second")
    if others:
        paths = " and ".join(other.path for other in others)
        click.echo(f"warning: its key is in {paths} too, and counts there from now on: revoke that as well", err=True)


def _find(folder: str, name: str, role: str | None) -> KeyFile:
    """Return the file of a key.

    Raises:
        KeyFileError: there is none of this name, or several; the message names what there is.
    """
    files = key_files(folder)
    # Compared with what is there, and never made a path of: names lead nowhere else.
    found = [file for file in files if file.name == name and role in (None, file.role.value)]
    if len(found) == 1:
        return found[0]
    if found:
        roles = " and ".join(file.role.value for file in found)
        raise KeyFileError(f"{name} has keys as {roles}: say which with --role")
    names = [file.name for file in files if role in (None, file.role.value)]
    whose = f"{role or 'key'} named {name!r:.80} in {folder}"
    raise KeyFileError(f"there is no {whose}; {_nearest(name, names)}")


def _nearest(name: str, names: list[str]) -> str:
    """Return words about the names that may have been meant."""
    import difflib  # here: only a mistake needs it

    near = difflib.get_close_matches(name, names)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if not names:
        return "there are none at all"
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"there are {', '.join(sorted(names)[:_MOST_LISTED])}{more}"


def _others_with_its_key(folder: str, file: KeyFile) -> list[KeyFile]:
    try:
        key = public_key(file.path)
    except KeyFileError:
        return []  # no key, so nobody else's
    return [other for other in holders(folder, key) if other != file]


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the command with one line where a key or a file cannot be used."""
    try:
        yield
    except KeyFileError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
