"""Key files: what is read, what is refused and why, what is written and with which permissions."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import zmq
import zmq.auth
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from tokenmq.transport import keys
from tokenmq.transport.keys import (
    MAX_FILE_BYTES,
    KeyFileError,
    create_pair,
    is_key,
    load_pair,
    public_key,
    read_public,
    write_public,
)

AS_ROOT = os.geteuid() == 0


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A public and a secret file."""
    files = tmp_path / "a.key", tmp_path / "a.key_secret"
    create_pair(*map(str, files))
    return files


def secret_in(path: Path) -> str:
    _, secret = zmq.auth.load_certificate(path)
    assert secret is not None
    return secret.decode()


def write_secret(path: Path, public: str | None, secret: str | None, more: str = "") -> Path:
    lines = [f'public-key = "{public}"'] if public is not None else []
    lines += [f'secret-key = "{secret}"'] if secret is not None else []
    path.touch(0o600)
    path.write_text("\n".join(["curve", *lines, more]))
    return path


def test_what_was_made_is_read_by_us_and_by_pyzmq(pair: tuple[Path, Path]) -> None:
    public, secret = pair
    read = load_pair(str(secret))
    assert public_key(str(public)) == read.public
    assert zmq.auth.load_certificate(public) == (read.public.encode(), None)
    assert zmq.auth.load_certificate(secret) == (read.public.encode(), read.secret.encode())
    assert zmq.curve_public(read.secret.encode()) == read.public.encode()


def test_what_pyzmq_made_is_read(tmp_path: Path) -> None:
    public, secret = zmq.auth.create_certificates(tmp_path, "theirs", {"name": "x", "public-key-of": "y"})
    os.chmod(secret, 0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_pair(secret)
    os.chmod(secret, 0o600)
    assert public_key(public).encode() == zmq.curve_public(load_pair(secret).secret.encode())


def test_lines_may_end_as_on_windows_and_quotes_may_lack(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = load_pair(str(pair[1]))
    other = tmp_path / "b.key_secret"
    other.touch(0o600)
    other.write_bytes(f"curve\r\n  public-key={made.public}\r\n\tsecret-key = '{made.secret}'\r\n".encode())
    assert load_pair(str(other)) == made


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_secret_is_its_owners_alone_from_its_first_byte(
    tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []
    create, secret = os.open, str(tmp_path / "a.key_secret")

    def watch(path: str, flags: int, mode: int = 0o777) -> int:
        descriptor = create(path, flags, mode)
        if path == secret:
            assert flags & os.O_EXCL
            modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    monkeypatch.setattr(keys.os, "open", watch)
    before = os.umask(umask)
    try:
        create_pair(str(tmp_path / "a.key"), secret)
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE(os.stat(secret).st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o644 & ~umask


@pytest.mark.parametrize("there", [0, 1])
def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path, there: int) -> None:
    files = [tmp_path / "a.key", tmp_path / "a.key_secret"]
    files[there].write_text("mine")
    with pytest.raises(KeyFileError, match=f"{files[there].name} is there already"):
        create_pair(*map(str, files))
    assert files[there].read_text() == "mine"
    assert os.listdir(tmp_path) == [files[there].name]


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "a.key_secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="is there already"):
        create_pair(str(tmp_path / "a.key"), str(tmp_path / "a.key_secret"))
    assert os.listdir(tmp_path) == ["a.key_secret"]


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys.os, "fsync", full)
    with pytest.raises(KeyFileError, match=r"cannot write .*a\.key_secret: No space left"):
        create_pair(str(tmp_path / "a.key"), str(tmp_path / "a.key_secret"))
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync
    calls: list[int] = []

    def interrupted(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:  # the public file, when the secret one is complete
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(keys.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_pair(str(tmp_path / "a.key"), str(tmp_path / "a.key_secret"))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"cannot make .*/none/a\.key_secret: No such file"):
        create_pair(str(tmp_path / "a.key"), str(tmp_path / "none" / "a.key_secret"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o660, 0o777, 0o610])
def test_a_secret_that_others_could_reach_is_refused(pair: tuple[Path, Path], mode: int) -> None:
    pair[1].chmod(mode)
    with pytest.raises(KeyFileError, match=rf"a\.key_secret \(mode {mode:04o}\).*chmod 600 .*a\.key_secret"):
        load_pair(str(pair[1]))


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_secret_of_ours_alone_is_read(pair: tuple[Path, Path], mode: int) -> None:
    pair[1].chmod(mode)
    assert load_pair(str(pair[1])).public == public_key(str(pair[0]))


def test_permissions_are_those_of_what_was_opened(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever can swap the file between a look at the path and the opening must gain nothing by it.
    pair[1].chmod(0o644)
    monkeypatch.setattr(keys.os, "stat", lambda *_, **__: pytest.fail("looked at the path"))
    with pytest.raises(KeyFileError, match="mode 0644"):
        load_pair(str(pair[1]))


@pytest.mark.skipif(not AS_ROOT, reason="only root can give files away")
def test_a_secret_of_somebody_else_is_refused(pair: tuple[Path, Path]) -> None:
    os.chown(pair[1], 12345, -1)
    with pytest.raises(KeyFileError, match=r"belongs to user 12345.*chown 0 "):
        load_pair(str(pair[1]))


def test_a_secret_of_root_is_read_by_others(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if not AS_ROOT:
        pytest.skip("only root has such files")
    monkeypatch.setattr(keys.os, "geteuid", lambda: 4711)
    assert load_pair(str(pair[1])).public == public_key(str(pair[0]))


def test_a_file_that_may_not_be_read_is_told(pair: tuple[Path, Path]) -> None:
    pair[1].chmod(0)
    if AS_ROOT:
        pair[1].parent.chmod(0o700)
        os.seteuid(65534)
    try:
        with pytest.raises(KeyFileError, match=r"may not read .*a\.key_secret: have its owner"):
            load_pair(str(pair[1]))
    finally:
        if AS_ROOT:
            os.seteuid(0)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(KeyFileError, match="pipe is no regular file"):
        load_pair(str(tmp_path / "pipe"))
    with pytest.raises(KeyFileError, match=r"is a folder: expected a key file"):
        load_pair(str(tmp_path))
    with pytest.raises(KeyFileError, match=r"there is no file .*/none"):
        load_pair(str(tmp_path / "none"))
    with pytest.raises(KeyFileError, match=r"'a\\x00b' is no path"):
        load_pair("a\0b")
    with pytest.raises(KeyFileError, match="there is no file ''"):
        load_pair("")


def test_a_long_file_is_not_read(pair: tuple[Path, Path]) -> None:
    room = MAX_FILE_BYTES - pair[1].stat().st_size
    with pair[1].open("a") as file:
        file.write("#" * room)
    assert load_pair(str(pair[1]))
    with pair[1].open("a") as file:
        file.write("#")
    with pytest.raises(KeyFileError, match=f"longer than {MAX_FILE_BYTES} bytes"):
        load_pair(str(pair[1]))


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_a_file_without_a_secret_is_told_so_whoever_can_read_it(
    pair: tuple[Path, Path], tmp_path: Path, mode: int
) -> None:
    (tmp_path / "other").write_text("root:x:0:0:root:/root:/bin/bash\n")
    for path, words in (
        (pair[0], r"a\.key has only a public key in it: give the file with the secret key, NAME\.key_secret"),
        (tmp_path / "other", "other has no secret key in it"),
    ):
        path.chmod(mode)
        with pytest.raises(KeyFileError, match=words) as caught:
            load_pair(str(path))
        assert "chmod" not in str(caught.value)


def test_halves_of_two_pairs_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    public, _ = zmq.curve_keypair()
    mixed = write_secret(tmp_path / "b", public.decode(), secret_in(pair[1]))
    with pytest.raises(KeyFileError, match="does not belong to its secret"):
        load_pair(str(mixed))


def test_malformed_files_are_refused_and_show_no_secret(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = load_pair(str(pair[1]))
    cases: list[tuple[str | None, str | None, str, str]] = [
        (made.public, made.secret[:-1], "", "secret key is not 40"),
        (made.public, made.secret + "a", "", "secret key is not 40"),
        (made.public, "~" + made.secret[1:], "", "secret key is not 40"),
        (made.public, "#" * 40, "", "secret key is not 40"),  # the groups are too large numbers
        (made.public, "", "", "secret key is not 40"),
        (made.public[1:], made.secret, "", "public key is not 40"),
        (None, made.secret, "", "no public key in it"),
        (None, None, "secret-key", "no secret key in it"),
        (None, None, "\0\xff" * 99, "no secret key in it"),
        (made.public, made.secret, f"secret-key = {made.secret[::-1]}", "more than one secret-key"),
    ]
    for public, secret, more, words in cases:
        path = tmp_path / "bad"
        write_secret(path, public, secret, more)
        with pytest.raises(KeyFileError, match=words) as caught:
            load_pair(str(path))
        path.unlink()
        assert made.secret[1:-1] not in f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"


def test_a_secret_is_in_no_repr_and_no_message(pair: tuple[Path, Path]) -> None:
    made = load_pair(str(pair[1]))
    assert made.secret not in repr(made)
    for given_instead_of_a_file in (made.secret, f'"{made.secret}"', made.secret[3:], f"{made.secret}\n"):
        with pytest.raises(KeyFileError) as caught:
            load_pair(given_instead_of_a_file)
        assert made.secret[3:] not in str(caught.value)
        assert "not shown" in str(caught.value)
    with pytest.raises(KeyFileError) as caught:
        public_key(made.secret + "a")
    assert made.secret not in str(caught.value)


def test_a_public_key_is_given_as_it_is_or_in_a_file(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = public_key(str(pair[0]))
    assert public_key(key) == public_key(f" {key}\n") == key
    # A path of 40 characters is Z85, too.
    monkeypatch.chdir(pair[0].parent)
    name = "a" * 40
    assert public_key(name) == name
    shutil.copy(pair[0], name)
    assert public_key(name) == key
    with pytest.raises(KeyFileError, match=r"there is no file a{36}\.key"):
        public_key("a" * 36 + ".key")


@pytest.mark.parametrize(
    "given_key", ["", "llama", "/etc", "a" * 39 + "~", "%" * 40, "none.key", "x/none.key_secret"]
)
def test_what_is_no_public_key_is_refused(given_key: str) -> None:
    with pytest.raises(KeyFileError):
        public_key(given_key)


def test_a_secret_file_is_no_public_key(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"secret key.*give the public one, .*/a\.key$"):
        public_key(str(pair[1]))
    renamed = pair[1].rename(tmp_path / "renamed")
    with pytest.raises(KeyFileError, match=r"renamed has a secret key in it.*give the public one, FILE\.key"):
        public_key(str(renamed))


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_guarded_key_is_one_that_others_cannot_change(pair: tuple[Path, Path], mode: int) -> None:
    key = read_public(str(pair[0]), guarded=True)
    pair[0].chmod(mode)
    assert read_public(str(pair[0])) == key
    with pytest.raises(KeyFileError, match=rf"mode {mode:04o}\): chmod go-w .*a\.key"):
        read_public(str(pair[0]), guarded=True)


def test_a_written_public_key_is_read_again(tmp_path: Path) -> None:
    public, _ = zmq.curve_keypair()
    write_public(str(tmp_path / "a.key"), public.decode())
    assert public_key(str(tmp_path / "a.key")) == public.decode()


def test_names_with_odd_characters_stay_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError) as caught:
        load_pair(str(tmp_path / "a\nERROR b"))
    assert "\n" not in str(caught.value)


def test_a_libzmq_without_curve_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda _: False)
    with pytest.raises(KeyFileError, match="without CURVE"):
        create_pair(str(tmp_path / "a.key"), str(tmp_path / "a.key_secret"))
    assert os.listdir(tmp_path) == []


@given(st.binary(min_size=32, max_size=32))
def test_every_32_bytes_are_a_key(content: bytes) -> None:
    assert is_key(z85.encode(content).decode())


@given(st.lists(st.integers(2**32 - 500, 85**5 - 1) | st.integers(0, 2**32 - 1), min_size=8, max_size=8))
def test_groups_beyond_four_bytes_are_none(numbers: list[int]) -> None:
    digits = [number // 85**place % 85 for number in numbers for place in reversed(range(5))]
    text = "".join(chr(z85.Z85CHARS[digit]) for digit in digits)
    assert is_key(text) == all(number < 2**32 for number in numbers)


@given(st.text(min_size=38, max_size=42) | st.text("0aZ~_é%#", min_size=39, max_size=41))
def test_any_text_is_a_key_only_if_libzmq_says_so(text: str) -> None:
    try:
        zmq.curve_public(text.encode())
        good = True
    except (ValueError, zmq.ZMQError):
        good = False
    assert is_key(text) == good
