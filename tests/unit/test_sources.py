"""What our sources must not do: run what they were sent, reach for the network when they are imported."""

from __future__ import annotations

import ast
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("protocol", "transport", "broker", "worker", "client", "cli")
SOURCES = sorted(path for name in (*PACKAGES, "scripts", "examples") for path in (ROOT / name).rglob("*.py"))
COMMANDS = ("zmq-broker", "zmq-worker", "zmq-client")

#: Modules that make objects, and so calls, out of bytes.
MODULES = frozenset({"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"})
CALLS = frozenset({"eval", "exec", "compile", "__import__"})
#: By the end of their names: `os.system`, pyzmq's own pickles, YAML, numpy's.
METHODS = frozenset(
    {"system", "popen", "send_pyobj", "recv_pyobj", "send_serialized", "recv_serialized", "full_load", "unsafe_load"}
)


def faults(tree: ast.AST) -> Iterator[str]:
    """Yield what in a module could run what somebody sent."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {one.name}" for one in node.names if one.name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES and not node.level:
            yield f"from {node.module} import"
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in CALLS:
                yield f"{called.id}()"
            if isinstance(called, ast.Attribute):
                owner = called.value.id if isinstance(called.value, ast.Name) else ""
                if called.attr in METHODS:
                    yield f".{called.attr}()"
                if (owner, called.attr) == ("torch", "load") and not _says(node, "weights_only", True):
                    yield "torch.load() without weights_only=True"
                if called.attr == "from_pretrained" and _says(node, "trust_remote_code", True):
                    yield "trust_remote_code=True"
            for name in ("shell", "allow_pickle", "trust_remote_code"):
                if any(word.arg == name and not _is(word.value, False) for word in node.keywords):
                    yield f"{name}= that is not False"


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _says(call: ast.Call, name: str, value: object) -> bool:
    return any(word.arg == name and _is(word.value, value) for word in call.keywords)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_was_sent(path: Path) -> None:
    found = sorted(set(faults(ast.parse(path.read_text("utf-8")))))
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import safe_load",
        "import os.path, marshal",
        "eval('1')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=wish)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "numpy.load(file, allow_pickle=True)",
        "socket.recv_pyobj()",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "def f():\n    exec('x')",
    ],
)
def test_the_check_sees_it(source: str) -> None:
    assert list(faults(ast.parse(source))) != []


def test_the_check_sees_nothing_where_nothing_is() -> None:
    lines = (
        "model.eval()",
        "re.compile('a')",
        "run(['ls'])",
        "torch.load(f, weights_only=True)",
        "from .pickle import a",
    )
    assert list(faults(ast.parse("\n".join(lines)))) == []


def test_every_source_is_looked_at() -> None:
    assert len(SOURCES) > 150
    assert all((ROOT / name).is_dir() for name in PACKAGES)


#: Put in front of every interpreter that is started: no socket leaves this machine, and no name is looked up. A pair
#: of sockets, and those of libzmq's own threads, are for this process itself.
GUARD = """
import os, socket, sys

def refuse(*arguments, **_named):
    with open(os.environ["TRIED"], "a") as file:
        print(arguments, file=file)
    raise OSError("no network when it is imported")

for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, refuse)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "gethostbyaddr", "create_connection"):
    setattr(socket, name, refuse)
"""


@pytest.fixture
def guarded(tmp_path: Path) -> tuple[dict[str, str], Path, list[str]]:
    """Return an environment without a network, the file of what was tried, and how to start a command in it.

    Where the kernel allows it, the process has a network of its own as well, in which there is nothing.
    """
    (tmp_path / "sitecustomize.py").write_text(GUARD)
    tried = tmp_path / "tried"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRIED": str(tried)}
    environment.pop("HF_HUB_OFFLINE", None)
    unshare = shutil.which("unshare")
    alone = [unshare, "-n", "--"] if unshare else []
    if alone and subprocess.run([*alone, "true"], capture_output=True, timeout=30, check=False).returncode:
        alone = []
    return environment, tried, alone


def modules() -> list[str]:
    """Return all modules of the package but those that run as programs and that need vLLM."""
    found = []
    for package in PACKAGES:
        inside = pkgutil.walk_packages([str(ROOT / package)], f"tokenmq.{package}.")
        found += [f"tokenmq.{package}", *(one.name for one in inside)]
    return [name for name in found if "engines.vllm." not in name or name.endswith("lifeline")]


def test_the_guard_works(guarded: tuple[dict[str, str], Path, list[str]]) -> None:
    environment, tried, alone = guarded
    code = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    done = subprocess.run(
        [*alone, sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert "no network when it is imported" in done.stderr
    assert tried.exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="some modules need the extra `transformers`")
def test_no_module_reaches_for_the_network_when_it_is_imported(
    guarded: tuple[dict[str, str], Path, list[str]],
) -> None:
    environment, tried, alone = guarded
    names = modules()
    assert len(names) > 150
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)\nprint('all imported')"
    done = subprocess.run(
        [*alone, sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "all imported\n"), done.stderr
    assert not tried.exists(), tried.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_network(command: str, guarded: tuple[dict[str, str], Path, list[str]]) -> None:
    environment, tried, alone = guarded
    program = Path(sys.executable).with_name(command)
    done = subprocess.run(
        [*alone, program, "--help"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {command}")
    assert not tried.exists(), tried.read_text()
