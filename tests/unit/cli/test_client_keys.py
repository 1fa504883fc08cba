"""--server-key and --key of the commands: which broker gets which, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner

from tokenmq.cli.asking import _keys_of
from tokenmq.cli.client import main as client
from tokenmq.cli.worker import main as worker

ONE, TWO, THREE = (f"tcp://127.0.0.1:{port}" for port in (1, 2, 3))


def test_one_key_is_for_all_brokers() -> None:
    assert _keys_of((THREE,), [ONE, TWO], ["k"]) == ["k"]
    assert _keys_of((THREE,), [ONE], ["k"]) == ["k"]
    assert _keys_of((THREE,), [ONE, TWO], []) == []


def test_a_broker_behind_the_command_keeps_its_key() -> None:
    assert _keys_of((TWO,), [ONE, TWO], ["k1", "k2"]) == ["k2"]


def test_a_broker_without_a_key_of_its_own_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _keys_of((THREE,), [ONE, TWO], ["k1", "k2"])
    assert f"no --server-key is given for {THREE}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["client", "worker"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--key", "/nowhere/ann.key_secret"], "no server key: --server-key is needed"),
        (["--server-key", "/nowhere/server.key"], "--key FILE is needed"),
        (["--server-key", "/nowhere/server.key", "--key", "/nowhere/ann.key_secret"], "/nowhere/"),
        (["--server-key", "a", "--server-key", "b", "--key", "c"], "2 server keys for 1 endpoint:"),
    ],
)
def test_keys_that_cannot_be_used_are_one_line(command: str, options: list[str], says: str) -> None:
    if command == "client":
        result = CliRunner().invoke(client, [*options, "models"])
    else:
        result = CliRunner().invoke(worker, [*options, "--model", "m", "--engine", "synthetic"])
    assert result.exit_code in (1, 2)
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "server_key, key" not in result.stderr, "these are the arguments of a function"


def test_a_key_that_others_can_read_is_refused_and_never_shown(tmp_path: Path) -> None:
    public, secret = (half.decode() for half in zmq.curve_keypair())
    file = tmp_path / "ann.key_secret"
    file.write_text(f'public-key = "{public}"\nsecret-key = "{secret}"\n')
    file.chmod(0o644)
    result = CliRunner().invoke(client, ["--server-key", public, "--key", str(file), "models"])
    assert result.exit_code == 1
    assert str(file) in result.stderr
    assert secret not in result.output + result.stderr
