"""zmq-broker keys: what is made, with which permissions, what is printed, and each mistake in one line."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
import zmq.auth
from click.testing import CliRunner, Result

from tokenmq.cli.broker import main as broker
from tokenmq.cli.keys import MAX_NAME_BYTES, keys
from tokenmq.transport.keyring import Keyring
from tokenmq.transport.keys import load_pair, public_key

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder, in which `keys` is the broker's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOKENMQ_BROKER_CURVE", raising=False)

    def run(*arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(keys, arguments)
        assert done.exit_code == code, done.output
        assert code == 0 or done.stderr.strip().splitlines()[-1].lower().startswith("error: ")
        return done

    return run


@pytest.fixture
def made(run: Run) -> Run:
    """The same, with `keys` made."""
    run("init", "keys")
    return run


def allowed() -> set[tuple[str, str]]:
    return {(one.role.value, one.name) for one in Keyring("keys").allowed.by_key.values()}


def mode(path: str) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_init_makes_a_folder_and_says_what_comes_next(run: Run) -> None:
    lines = run("init", "my keys").stdout.splitlines()
    assert mode("my keys") == mode("my keys/clients") == mode("my keys/workers") == mode("my keys/admins") == 0o700
    assert mode("my keys/server.key_secret") == 0o600
    assert public_key("my keys/server.key") in lines[0]
    assert "  zmq-broker --curve 'my keys'" in lines
    # What it says can be typed as it stands.
    for line in lines:
        if " keys new " in line:
            role = line.split("--role ")[1].split()[0]
            run(*shlex.split(line.replace("NAME", role))[2:])
            assert os.listdir(f"my keys/{role}s") == [f"{role}.key"]


def test_init_makes_no_folder_twice(made: Run) -> None:
    before = Path("keys/server.key_secret").read_text()
    assert "is a folder of keys already, and is not overwritten" in made("init", "keys", code=1).stderr
    assert Path("keys/server.key_secret").read_text() == before


@pytest.mark.parametrize(
    ("role", "command"), [("client", "zmq-client"), ("worker", "zmq-worker"), ("admin", "zmq-client")]
)
def test_new_lets_somebody_in_and_says_how(made: Run, role: str, command: str) -> None:
    shown = made("new", "alice", "--role", role).stdout
    assert allowed() == {(role, "alice")}
    assert mode("alice.key_secret") == 0o600
    pair = load_pair("alice.key_secret")
    assert public_key(f"keys/{role}s/alice.key") == pair.public
    assert f"  {command} --server-key keys/server.key --key alice.key_secret" in shown.splitlines()
    assert pair.secret not in shown


def test_the_secret_goes_where_it_is_told(made: Run) -> None:
    shown = made("new", "alice", "--role", "client", "--out", "a b/secret", code=1)
    assert "cannot make a b/secret: No such file or directory" in shown.stderr
    assert allowed() == set()
    os.mkdir("a b")
    assert "--key 'a b/secret'" in made("new", "alice", "--role", "client", "--out", "a b/secret").stdout
    assert mode("a b/secret") == 0o600
    assert load_pair("a b/secret").public == public_key("keys/clients/alice.key")


def test_no_secret_is_overwritten(made: Run) -> None:
    Path("alice.key_secret").write_text("mine")
    shown = made("new", "alice", "--role", "client", code=1)
    assert "alice.key_secret is there already, and is not overwritten" in shown.stderr
    assert Path("alice.key_secret").read_text() == "mine"
    assert allowed() == set()


def test_the_folder_comes_from_the_environment(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    os.rename("keys", "elsewhere")
    missing = made("new", "alice", "--role", "client", code=1)
    assert "keys is no folder of keys: make one with `zmq-broker keys init keys`" in missing.stderr
    monkeypatch.setenv("TOKENMQ_BROKER_CURVE", "elsewhere")
    assert "--server-key elsewhere/server.key" in made("new", "alice", "--role", "client").stdout
    assert "alice" in made("list").stdout
    made("revoke", "alice")
    assert "alice" not in made("list", "--curve", "elsewhere").stdout


@pytest.mark.parametrize("name", ["alice", "gpu-3.lab", "_x", "eve@home", "7", "n" * MAX_NAME_BYTES])
def test_names_are_safe_names_of_files(made: Run, name: str) -> None:
    made("new", name, "--role", "worker")
    assert allowed() == {("worker", name)}


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".x", "a/b", "../x", "a b", "a\n", "é", "-x", "a$b", "n" * (MAX_NAME_BYTES + 1)]
)
def test_other_names_are_refused(made: Run, name: str) -> None:
    shown = made("new", "--role", "worker", "--", name, code=2)
    assert "expected at most 244 letters, digits and . _ - @" in shown.stderr
    assert allowed() == set()


def test_a_name_is_there_once_in_all_roles(made: Run) -> None:
    made("new", "alice", "--role", "client")
    os.remove("alice.key_secret")
    shown = made("new", "alice", "--role", "admin", code=1)
    assert "there is a client alice already: keys/clients/alice.key; take another name" in shown.stderr
    assert not os.path.exists("alice.key_secret")
    # Also if the key there is unusable.
    Path("keys/clients/alice.key").write_text("")
    made("new", "alice", "--role", "admin", code=1)


def test_a_key_from_elsewhere_is_let_in(made: Run) -> None:
    public, _ = zmq.auth.create_certificates(".", "theirs")
    key = zmq.curve_keypair()[0].decode()
    shown = made("new", "alice", "--role", "client", "--public", public).stdout
    made("new", "gpu", "--role", "worker", f"--public={key}")
    assert allowed() == {("client", "alice"), ("worker", "gpu")}
    assert public_key("keys/workers/gpu.key") == key
    assert not os.path.exists("alice.key_secret")
    assert "  zmq-client --server-key keys/server.key --key FILE" in shown.splitlines()


def test_a_key_of_somebody_else_is_not_let_in_twice(made: Run) -> None:
    # It would shut out both, so that anybody who knows a public key could have its owner cut off.
    made("new", "alice", "--role", "client")
    for given in ("keys/clients/alice.key", f"--public={public_key('keys/clients/alice.key')}"):
        public = (given,) if given.startswith("--") else ("--public", given)
        shown = made("new", "eve", "--role", "admin", *public, code=1)
        assert "this is the key of the client alice already: keys/clients/alice.key" in shown.stderr
    shown = made("new", "eve", "--role", "admin", "--public", "keys/server.key", code=1)
    assert "the broker's own public key" in shown.stderr
    shown = made("new", "eve", "--role", "admin", "--public", "alice.key_secret", code=1)
    assert "give the public one" in shown.stderr
    assert load_pair("alice.key_secret").secret not in shown.output
    assert allowed() == {("client", "alice")}


def test_public_and_out_exclude_each_other(made: Run) -> None:
    assert "with --public there is none" in made(
        "new", "x", "--role", "client", "--public", "k", "--out", "f", code=2
    ).stderr  # fmt: skip


def test_a_folder_that_a_broker_would_refuse_gets_no_key(made: Run) -> None:
    os.chmod("keys/admins", 0o770)
    for command in (("new", "alice", "--role", "client"), ("list",)):
        shown = made(*command, code=1)
        assert "others can write to keys/admins (mode 0770): chmod go-w keys/admins" in shown.stderr
    assert not os.path.exists("alice.key_secret")


def test_a_role_without_a_folder_gets_one(made: Run) -> None:
    os.rmdir("keys/workers")
    made("new", "gpu", "--role", "worker")
    assert mode("keys/workers") == 0o700
    assert allowed() == {("worker", "gpu")}


def test_list_is_a_table_or_json_and_never_a_secret(made: Run) -> None:
    for name, role in (("zoe", "client"), ("gpu", "worker"), ("abe", "client"), ("root", "admin")):
        made("new", name, "--role", role)
    os.utime("keys/clients/zoe.key", (1_700_000_000, 1_700_000_000))
    table = made("list").stdout.splitlines()
    assert [line.split()[:2] for line in table] == [
        ["ROLE", "NAME"], ["client", "abe"], ["client", "zoe"], ["worker", "gpu"], ["admin", "root"],
    ]  # fmt: skip
    assert table[2].split()[2:] == [public_key("keys/clients/zoe.key"), "2023-11-14T22:13:20Z"]
    rows = [json.loads(line) for line in made("list", "--json").stdout.splitlines()]
    assert rows[1] == {
        "role": "client", "name": "zoe", "public_key": public_key("keys/clients/zoe.key"),
        "since": "2023-11-14T22:13:20Z",
    }  # fmt: skip
    assert len(rows) == 4
    everything = "\n".join(table) + json.dumps(rows)
    assert load_pair("zoe.key_secret").secret not in everything
    assert load_pair("keys/server.key_secret").secret not in everything


def test_list_tells_what_is_wrong_apart(made: Run) -> None:
    made("new", "alice", "--role", "client")
    Path("keys/workers/gpu.key").write_text("not a key")
    os.chmod("keys/workers/gpu.key", 0o644)
    shown = made("list")
    assert len(shown.stdout.splitlines()) == 2
    assert "warning: keys/workers/gpu.key has no key in it" in shown.stderr
    os.remove("keys/clients/alice.key")
    assert made("list", "--json").stdout == ""
    assert made("list").stdout.split() == ["ROLE", "NAME", "PUBLIC_KEY", "SINCE"]


def test_revoke_removes_a_key(made: Run) -> None:
    for name in ("alice", "bob"):
        made("new", name, "--role", "client")
    shown = made("revoke", "alice").stdout
    assert "client alice is revoked: a broker that runs cuts it off within a second" in shown
    assert allowed() == {("client", "bob")}
    assert "did you mean" not in made("revoke", "alice", code=1).stderr


def test_revoke_names_those_that_are_there(made: Run) -> None:
    assert "there is no key named 'alice' in keys; there are none at all" in made("revoke", "alice", code=1).stderr
    for number in range(3):
        made("new", f"worker-{number}", "--role", "worker")
    assert "did you mean worker-1 or" in made("revoke", "worke-1", code=1).stderr
    assert "there are worker-0, worker-1, worker-2" in made("revoke", "alice", code=1).stderr
    assert "no client named 'worker-1' in keys; there are none" in made(
        "revoke", "worker-1", "--role", "client", code=1
    ).stderr  # fmt: skip
    for number in range(3, 30):
        Path(f"keys/clients/client-{number}.key").touch()
    assert made("revoke", "XYZ", code=1).stderr.strip().endswith("and 10 more")


@pytest.mark.parametrize("name", ["../server", "../clients/alice", "/etc/x", "", ".", "..", "alice.key"])
def test_revoke_removes_nothing_else(made: Run, name: str) -> None:
    made("new", "alice", "--role", "client")
    made("revoke", name, code=1)
    assert allowed() == {("client", "alice")}
    assert os.path.exists("keys/server.key")


def test_revoke_asks_for_the_role_where_there_are_two(made: Run) -> None:
    made("new", "alice", "--role", "client")
    made("new", "alice2", "--role", "admin")
    os.rename("keys/admins/alice2.key", "keys/admins/alice.key")
    assert "alice has keys as client and admin: say which with --role" in made("revoke", "alice", code=1).stderr
    made("revoke", "alice", "--role", "admin")
    assert allowed() == {("client", "alice")}


def test_revoke_tells_where_the_key_still_is(made: Run) -> None:
    made("new", "alice", "--role", "client")
    Path("keys/admins/eve.key").write_text(Path("keys/clients/alice.key").read_text())
    os.chmod("keys/admins/eve.key", 0o644)
    shown = made("revoke", "alice")
    assert "warning: its key is in keys/admins/eve.key too, and counts there from now on" in shown.stderr
    assert allowed() == {("admin", "eve")}


def test_revoke_works_where_the_rest_is_broken(made: Run) -> None:
    made("new", "alice", "--role", "client")
    Path("keys/clients/bad.key").write_text("bad")
    os.chmod("keys/clients", 0o777)
    os.chmod("keys/server.key_secret", 0o644)
    made("revoke", "alice")
    made("revoke", "bad")
    assert os.listdir("keys/clients") == []


def test_every_option_tells_its_default(run: Run) -> None:
    for command in keys.commands:
        words = " ".join(run(command, "--help").stdout.split("Options:")[1].split())
        for entry in words.split(" --")[1:]:
            if not entry.startswith(("help", "json")):
                assert "default: " in entry or "required" in entry, entry
    assert "TOKENMQ_BROKER_CURVE; default: keys" in " ".join(run("new", "--help").stdout.split())


def test_its_help_needs_no_zmq() -> None:
    code = "import sys; sys.modules['zmq'] = None; from tokenmq.cli.keys import keys; keys(['new', '--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_folder_may_stand_before_the_command_as_for_a_broker(tmp_path: Path) -> None:
    folder = str(tmp_path / "elsewhere")
    assert CliRunner().invoke(broker, ["keys", "init", folder]).exit_code == 0
    made = CliRunner().invoke(
        broker, ["--curve", folder, "keys", "new", "ann", "--role", "client", "--public", "0" * 40]
    )
    assert made.exit_code == 0, made.output
    assert "ann" in CliRunner().invoke(broker, ["--curve", folder, "keys", "list"]).output
    assert CliRunner().invoke(broker, ["--curve", folder, "keys", "revoke", "ann"]).exit_code == 0
    assert not (tmp_path / "elsewhere" / "clients" / "ann.key").exists()
