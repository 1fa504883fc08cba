"""A broker's folder of keys: who is in, what counts for nobody, and what changes while it runs."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tokenmq.protocol.identity import Identity, Role
from tokenmq.protocol.limits import MAX_NAME_CHARS
from tokenmq.transport import keyring as module
from tokenmq.transport.keyring import (
    FOLDERS,
    SERVER_KEY,
    SERVER_PAIR,
    Keyring,
    check_name,
    create_folder,
    holders,
    key_file,
    key_files,
)
from tokenmq.transport.keys import KeyFileError, load_pair, public_key, write_public

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    create_folder(str(path))
    return path


def new_key() -> str:
    return zmq.curve_keypair()[0].decode()


def add(folder: Path, role: str, name: str, key: str | None = None) -> str:
    """Put a key into a list; return it."""
    key = key or new_key()
    write_public(str(folder / f"{role}s" / f"{name}.key"), key)
    return key


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def names(keyring: Keyring) -> set[str]:
    return {f"{one.role.value} {one.name}" for one in keyring.allowed.by_key.values()}


def test_a_new_folder_lets_nobody_in(folder: Path) -> None:
    keyring = Keyring(str(folder))
    assert keyring.server == load_pair(str(folder / SERVER_PAIR))
    assert keyring.server.public == public_key(str(folder / SERVER_KEY))
    assert not keyring.allowed.by_key
    assert keyring.complaints() == []
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())} == {
        "keys": 0o700, "clients": 0o700, "workers": 0o700, "admins": 0o700, SERVER_PAIR: 0o600,
        SERVER_KEY: 0o644 & ~umask(),
    }  # fmt: skip


def test_an_empty_folder_is_filled_and_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    create_folder(str(tmp_path))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
    Keyring(str(tmp_path))


def test_a_folder_is_not_made_over_another(folder: Path, tmp_path: Path) -> None:
    before = load_pair(str(folder / SERVER_PAIR))
    with pytest.raises(KeyFileError, match="is a folder of keys already, and is not overwritten"):
        create_folder(str(folder))
    assert load_pair(str(folder / SERVER_PAIR)) == before
    with pytest.raises(KeyFileError, match="is no empty folder"):
        create_folder(str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="is no empty folder"):
        create_folder(str(tmp_path / "file"))
    with pytest.raises(KeyFileError, match=r"cannot make .*/none/keys: No such file"):
        create_folder(str(tmp_path / "none" / "keys"))


def test_a_folder_that_could_not_be_made_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: str) -> str:
        raise KeyFileError("no")

    monkeypatch.setattr(module, "create_pair", fails)
    with pytest.raises(KeyFileError, match="no"):
        create_folder(str(tmp_path / "keys"))
    assert os.listdir(tmp_path) == []


def test_each_list_gives_its_role(folder: Path) -> None:
    made = {role: add(folder, role.value, "alice") for role in Role}
    keyring = Keyring(str(folder))
    assert dict(keyring.allowed.by_key) == {key: Identity(role, "alice", key) for role, key in made.items()}


def test_changes_are_seen_and_snapshots_stay(folder: Path) -> None:
    keyring = Keyring(str(folder))
    assert not keyring.poll()
    alice = add(folder, "client", "alice")
    assert keyring.poll()
    assert not keyring.poll()
    before = keyring.allowed
    add(folder, "worker", "gpu-1")
    (folder / "clients" / "alice.key").unlink()
    assert keyring.poll()
    assert names(keyring) == {"worker gpu-1"}
    assert before.by_key == {alice: Identity(Role.CLIENT, "alice", alice)}
    with pytest.raises(TypeError):
        before.by_key["x"] = before.by_key[alice]  # type: ignore[index]
    assert keyring.complaints() == []


def test_another_role_or_name_of_a_key_is_a_change(folder: Path) -> None:
    alice = add(folder, "client", "alice")
    keyring = Keyring(str(folder))
    (folder / "clients" / "alice.key").rename(folder / "admins" / "alice.key")
    assert keyring.poll()
    assert keyring.allowed.by_key[alice].role is Role.ADMIN
    (folder / "admins" / "alice.key").rename(folder / "admins" / "eve.key")
    assert keyring.poll()
    assert names(keyring) == {"admin eve"}


def test_a_file_that_changes_without_changing_anybody_is_no_change(folder: Path) -> None:
    add(folder, "client", "alice")
    keyring = Keyring(str(folder))
    with (folder / "clients" / "alice.key").open("a") as file:
        file.write("# a comment\n")
    (folder / "clients" / "README").write_text("not a key")
    (folder / "clients" / ".alice.key.swp").write_text("not a key")
    (folder / "clients" / ".half.key").write_text("not a key")
    assert not keyring.poll()
    assert names(keyring) == {"client alice"}
    assert keyring.complaints() == []


def test_a_key_written_over_in_place_is_seen_however_soon(folder: Path) -> None:
    # Same inode, same size, and on many file systems the same times: nothing but its content has changed.
    path = folder / "clients" / "alice.key"
    before = add(folder, "client", "alice")
    keyring = Keyring(str(folder))
    for _ in range(200):
        key = new_key()
        path.write_text(path.read_text().replace(before, key))
        assert keyring.poll()
        assert list(keyring.allowed.by_key) == [key]
        before = key


def test_what_is_old_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, "client", "alice")
    monkeypatch.setattr(module.time, "time_ns", lambda: os.stat(folder).st_mtime_ns + 3600 * 10**9)
    keyring = Keyring(str(folder))
    monkeypatch.setattr(module, "read_public", lambda *_, **__: pytest.fail("read"))
    assert not keyring.poll()
    add(folder, "client", "bob")
    with pytest.raises(pytest.fail.Exception):
        keyring.poll()


@pytest.mark.parametrize(
    ("changed_ns", "later_ns", "old"),
    [
        (7_123_000_000, 49_000_000, False),
        (7_123_000_000, 51_000_000, True),
        (7_000_000_000, 1_999_000_000, False),  # a file system without fractions of a second
        (7_000_000_000, 2_001_000_000, True),
        (7_123_000_000, -3_600_000_000_000, True),  # the clock was set back
    ],
)
def test_a_file_is_young_for_a_tick_of_its_file_system(changed_ns: int, later_ns: int, old: bool) -> None:
    assert module._is_old(changed_ns, changed_ns + later_ns) is old


def broken(path: Path) -> None:
    path.write_text(path.read_text()[:-10])


def with_secret(path: Path) -> None:
    public, secret = zmq.curve_keypair()
    path.write_text(f'public-key = "{public.decode()}"\nsecret-key = "{secret.decode()}"')


def replaced_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replaced_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def leading_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text(""), "has no key in it"),
        (broken, "is not 40 characters"),
        (with_secret, "has a secret key in it"),
        (lambda path: path.write_bytes(b"#" * 65_537), "longer than 65536 bytes"),
        (lambda path: path.chmod(0o664), "chmod go-w"),
        (replaced_by_a_folder, "is a folder"),
        (replaced_by_a_pipe, "no regular file"),
        (leading_nowhere, "there is no file"),
        pytest.param(
            lambda path: os.chown(path, 12345, -1), "belongs to user 12345",
            marks=pytest.mark.skipif(not AS_ROOT, reason="only root can give files away"),
        ),
    ],
)  # fmt: skip
def test_a_bad_file_is_left_out_and_told_once(folder: Path, spoil: Callable[[Path], Any], words: str) -> None:
    path = folder / "clients" / "alice.key"
    for name in ("alice", "bob"):
        add(folder, "client", name)
    keyring = Keyring(str(folder))
    spoil(path)
    assert keyring.poll()
    assert names(keyring) == {"client bob"}
    (complaint,) = keyring.complaints()
    assert words in complaint
    assert str(path) in complaint
    assert not keyring.poll()
    assert keyring.complaints() == []
    # At the start it is no different; and mended and spoilt again, it is told again.
    assert Keyring(str(folder)).complaints() == [complaint]
    path.rmdir() if path.is_dir() else path.unlink()
    add(folder, "client", "alice")
    assert keyring.poll()
    assert names(keyring) == {"client alice", "client bob"}
    spoil(path)
    assert keyring.poll()
    assert keyring.complaints() == [complaint]


def test_a_link_to_a_key_is_one_and_is_followed_where_it_leads(folder: Path, tmp_path: Path) -> None:
    first, second = new_key(), new_key()
    write_public(str(tmp_path / "1"), first)
    write_public(str(tmp_path / "2"), second)
    link = folder / "workers" / "gpu.key"
    link.symlink_to(tmp_path / "1")
    keyring = Keyring(str(folder))
    assert dict(keyring.allowed.by_key) == {first: Identity(Role.WORKER, "gpu", first)}
    link.unlink()
    link.symlink_to(tmp_path / "2")
    assert keyring.poll()
    assert list(keyring.allowed.by_key) == [second]
    (tmp_path / "2").chmod(0o666)
    assert keyring.poll()
    assert not keyring.allowed.by_key


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\u202eb", os.fsdecode(b"\xff")])
def test_names_that_no_line_can_show_are_left_out(folder: Path, name: str) -> None:
    add(folder, "client", name)
    keyring = Keyring(str(folder))
    assert not keyring.allowed.by_key
    (complaint,) = keyring.complaints()
    assert complaint.isprintable()


def test_names_are_as_long_as_the_wire_allows(folder: Path) -> None:
    add(folder, "client", "Zoë of the 2nd floor")
    assert names(Keyring(str(folder))) == {"client Zoë of the 2nd floor"}
    check_name("n" * MAX_NAME_CHARS)
    for name in ("n" * (MAX_NAME_CHARS + 1), ""):
        with pytest.raises(KeyFileError, match="1 to 256 printable"):
            check_name(name)


@pytest.mark.parametrize("other", ["client", "admin"])
def test_a_key_in_two_files_counts_for_neither(folder: Path, other: str) -> None:
    key = add(folder, "client", "alice")
    add(folder, "worker", "gpu")
    keyring = Keyring(str(folder))
    add(folder, other, "eve", key)
    assert keyring.poll()
    assert names(keyring) == {"worker gpu"}
    (complaint,) = keyring.complaints()
    assert "alice.key and " in complaint
    assert "eve.key hold the same key" in complaint
    assert [file.name for file in holders(str(folder), key)] == ["alice", "eve"]
    (folder / f"{other}s" / "eve.key").unlink()
    assert keyring.poll()
    assert names(keyring) == {"client alice", "worker gpu"}


def test_the_servers_own_key_lets_nobody_in(folder: Path) -> None:
    shutil.copy(folder / SERVER_KEY, folder / "admins" / "root.key")
    keyring = Keyring(str(folder))
    assert not keyring.allowed.by_key
    (complaint,) = keyring.complaints()
    assert "root.key holds the server's own key" in complaint


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: path.rename(path.parent / "elsewhere")])
def test_a_folder_that_has_gone_empties_its_role(folder: Path, gone: Callable[[Path], Any]) -> None:
    add(folder, "client", "alice")
    add(folder, "admin", "root")
    keyring = Keyring(str(folder))
    gone(folder / "admins")
    assert keyring.poll()
    assert names(keyring) == {"client alice"}
    (complaint,) = keyring.complaints()
    assert "admins cannot be read (No such file or directory), and lets nobody in" in complaint
    assert Keyring(str(folder)).complaints() == [complaint]
    shutil.rmtree(folder)
    assert keyring.poll()
    assert not keyring.allowed.by_key


@pytest.mark.parametrize("which", ["", *FOLDERS.values()])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write_is_refused(folder: Path, which: str, mode: int) -> None:
    add(folder, "client", "alice")
    keyring = Keyring(str(folder))
    (folder / which).chmod(mode)
    with pytest.raises(KeyFileError, match=rf"others can write to .*{which} \(mode {mode:04o}\): chmod go-w "):
        Keyring(str(folder))
    # One that runs lets nobody in from there until it is closed again.
    assert keyring.poll() is (which in ("", "clients"))
    assert bool(keyring.allowed.by_key) is (which not in ("", "clients"))
    assert "chmod go-w" in keyring.complaints()[0]
    (folder / which).chmod(0o700)
    keyring.poll()
    assert names(keyring) == {"client alice"}


def test_a_folder_that_others_can_only_read_is_fine(folder: Path) -> None:
    for path in (folder, *(folder / lists for lists in FOLDERS.values())):
        path.chmod(0o755)
    assert Keyring(str(folder)).complaints() == []


@pytest.mark.skipif(not AS_ROOT, reason="only root can give folders away")
@pytest.mark.parametrize("which", ["", "workers"])
def test_a_folder_of_somebody_else_is_refused(folder: Path, which: str) -> None:
    os.chown(folder / which, 12345, -1)
    with pytest.raises(KeyFileError, match="belongs to user 12345"):
        Keyring(str(folder))


def test_what_is_no_folder_of_keys_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"has no server.key_secret in it: make one with `zmq-broker keys init /"):
        Keyring(str(tmp_path))
    with pytest.raises(KeyFileError, match=r"is no folder of keys: make one with `zmq-broker keys init '/.*/a b'`"):
        Keyring(str(tmp_path / "a b"))
    (tmp_path / "file").touch()
    with pytest.raises(KeyFileError, match="file is no folder of keys"):
        Keyring(str(tmp_path / "file"))
    with pytest.raises(KeyFileError, match="is no folder of keys"):
        key_files(str(tmp_path / "file"))


def test_a_server_pair_that_others_can_read_is_refused(folder: Path) -> None:
    (folder / SERVER_PAIR).chmod(0o644)
    with pytest.raises(KeyFileError, match=r"server\.key_secret.*chmod 600"):
        Keyring(str(folder))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_files_to_spare_revoke_nobody_and_save_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    # A flood of connections takes all descriptors: whoever is in stays in, and who is revoked then is out.
    for name in ("alice", "bob", "carol"):
        add(folder, "client", name)
    keyring = Keyring(str(folder))

    def none_left(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as flood:
        flood.setattr(os, "open", none_left)
        flood.setattr(os, "scandir", none_left)
        assert not keyring.poll()
        (folder / "clients" / "bob.key").unlink()
        (folder / "clients" / "carol.key").rename(folder / "clients" / "carol.txt")
        assert keyring.poll()
        assert names(keyring) == {"client alice"}
        (folder / "clients" / "alice.key").touch()  # whatever it holds now, it cannot be read
        assert keyring.poll()
        assert not keyring.allowed.by_key
        complaints = keyring.complaints()
        assert sum("no more files can be opened" in one for one in complaints) == 1
    add(folder, "client", "dave")
    assert keyring.poll()
    assert names(keyring) == {"client alice", "client dave"}
    assert keyring.complaints() == []


def test_a_read_that_failed_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(folder, "client", "alice")
    monkeypatch.setattr(module.time, "time_ns", lambda: os.stat(folder).st_mtime_ns + 3600 * 10**9)
    with monkeypatch.context() as trouble:

        def fails(*_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

        keyring = Keyring(str(folder))
        (folder / "clients" / "alice.key").touch()
        trouble.setattr(os, "open", fails)
        assert keyring.poll()
        assert not keyring.allowed.by_key
    assert keyring.poll()
    assert names(keyring) == {"client alice"}


def test_key_files_lists_whatever_is_there(folder: Path) -> None:
    add(folder, "client", "alice")
    (folder / "workers" / "bad.key").write_text("")
    (folder / "workers" / ".hidden.key").write_text("")
    (folder / "admins").rmdir()
    assert key_files(str(folder)) == [
        key_file(str(folder), Role.CLIENT, "alice"),
        key_file(str(folder), Role.WORKER, "bad"),
    ]


KEYS = [new_key() for _ in range(4)]


class Changes(RuleBasedStateMachine):
    """Any changes in any order: what a keyring has seen bit by bit is what a new one reads."""

    def __init__(self) -> None:
        super().__init__()

        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "keys"
        create_folder(str(self.folder))
        self.keyring = Keyring(str(self.folder))
        self.known = dict(self.keyring.allowed.by_key)

    def path(self, role: Role, name: str) -> Path:
        return self.folder / FOLDERS[role] / f"{name}.key"

    @rule(role=st.sampled_from(Role), name=st.sampled_from("ab"), key=st.sampled_from(KEYS))
    def write(self, role: Role, name: str, key: str) -> None:
        if self.path(role, name).parent.is_dir():
            self.path(role, name).write_text(f'public-key = "{key}"')
            self.path(role, name).chmod(0o644)  # whatever the umask is

    @rule(role=st.sampled_from(Role), name=st.sampled_from("ab"))
    def spoil(self, role: Role, name: str) -> None:
        if self.path(role, name).parent.is_dir():
            self.path(role, name).write_text("x")

    @rule(role=st.sampled_from(Role), name=st.sampled_from("ab"))
    def revoke(self, role: Role, name: str) -> None:
        self.path(role, name).unlink(missing_ok=True)

    @rule(role=st.sampled_from(Role), mode=st.sampled_from([0o700, 0o770]))
    def open_or_close(self, role: Role, mode: int) -> None:
        if self.path(role, "a").parent.is_dir():
            self.path(role, "a").parent.chmod(mode)

    @rule(role=st.sampled_from(Role))
    def remove_or_make(self, role: Role) -> None:
        lists = self.path(role, "a").parent
        if lists.is_dir():
            shutil.rmtree(lists)
        else:
            lists.mkdir(0o700)

    @rule()
    def look(self) -> None:
        changed = self.keyring.poll()
        now = dict(self.keyring.allowed.by_key)
        assert changed is (now != self.known)
        self.known = now
        assert now == self.expected()

    @invariant()
    def nobody_is_in_twice(self) -> None:
        identities = list(self.keyring.allowed.by_key.values())
        assert len({(one.role, one.name) for one in identities}) == len(identities)

    def expected(self) -> dict[str, Identity]:
        """Read it all in the plainest way."""
        found: dict[str, list[Identity]] = {}
        for role in Role:
            lists = self.path(role, "a").parent
            if not lists.is_dir() or lists.stat().st_mode & 0o022:
                continue
            for path in lists.iterdir():
                key = path.read_text()[len('public-key = "') : -1]
                if key:
                    found.setdefault(key, []).append(Identity(role, path.stem, key))
        return {key: holders[0] for key, holders in found.items() if len(holders) == 1}

    def teardown(self) -> None:
        self.place.cleanup()


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
