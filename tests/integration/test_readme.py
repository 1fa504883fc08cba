"""Every command and every program in README.md, run as it stands there, against the broker that it starts itself.

The ports are the only thing that differs: the environment moves the defaults to free ones, and the server that the
openai engine asks for is a small one of ours.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.unit.openai_engine.server import FakeServer, Reply
from tokenmq.client import Client
from tokenmq.client.local import free_port, free_ports

from .conftest import eventually, worker_names

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(console|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.removeprefix("$ ")
    for kind, text in BLOCKS
    if kind == "console"
    for line in text.splitlines()
    if line[:2] == "$ "
]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python"]
SERVERS = ("zmq-broker", "zmq-worker")
KEYS = "zmq-broker keys"
#: Run by CI itself, by test_demo below, or not a command of ours.
ELSEWHERE = ("make test", "make demo", ". .venv/bin/activate")
#: Where the README says that a server is, and which model it has.
SERVER = "http://127.0.0.1:8000/v1"
SERVED = "Qwen/Qwen3-8B"
#: The first of the ports that it gives to two brokers of one command.
SHARDS = 5565
#: The first of the two ports of the broker with keys, and the files that it names.
KEYED = 5575
KEY_FILES = ("broker-keys", "gpu-1.secret", "alice.secret")
#: What makes the keys, before any of the servers starts.
MAKES_KEYS = ("zmq-broker keys init", "zmq-broker keys new")
#: Commands that end by themselves.
ENDING = ("zmq-client", "zmq-broker keys list", "zmq-broker keys revoke")


class Shell:
    """Runs lines of the README with bash, in the repository, with the environment of these tests."""

    def __init__(self, frontend: str, backend: str, server: str, log: Path) -> None:
        self.frontend = frontend
        self.server = server
        self.log = log
        self.shards = free_block(4)
        self.keyed = free_block(2)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "TOKENMQ_BROKER_FRONTEND": frontend,
            "TOKENMQ_BROKER_BACKEND": backend,
            "TOKENMQ_WORKER_BROKER": backend,
            "TOKENMQ_CLIENT_BROKER": frontend,
        }

    def here(self, line: str) -> str:
        """Return the line with the places that are the tests' own."""
        line = line.replace(SERVER, self.server)
        for number in range(4):
            line = line.replace(f"127.0.0.1:{SHARDS + number}", f"127.0.0.1:{self.shards + number}")
        for number in range(2):
            line = line.replace(f":{KEYED + number}", f":{self.keyed + number}")
        for name in KEY_FILES:
            line = re.sub(rf"(?<![\w/]){re.escape(name)}", str(self.log.parent / name), line)
        return line

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", self.here(line)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def start(self, line: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as sink:
            return subprocess.Popen(
                ["bash", "-c", f"exec {self.here(line)}"],
                cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            )  # fmt: skip

    def python(self, program: str) -> subprocess.CompletedProcess[str]:
        text = self.here(program).replace("tcp://127.0.0.1:5555", self.frontend)
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", text],
            cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip


def free_block(size: int) -> int:
    """Return the first of so many free ports that follow one another."""
    free = set(free_ports(2_000))
    return next(port for port in sorted(free) if all(port + number in free for number in range(size)))


async def answer(reply: Reply) -> None:
    await reply.begin()
    await reply.text(" wide and deep.")
    await reply.finish(completion=4)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """A server that speaks the OpenAI API."""
    made = FakeServer()
    made.models = {"data": [{"id": SERVED, "owned_by": "vllm", "max_model_len": 512}]}
    made.handle = answer
    yield made
    made.stop()


@pytest.fixture(scope="module")
def shell(server: FakeServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A shell beside the broker and the workers that the README starts."""
    log = tmp_path_factory.mktemp("readme") / "log"
    made = Shell(f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}", server.url, log)
    for line in COMMANDS:
        if line.startswith(MAKES_KEYS):
            done = made.run(line)
            assert (done.returncode, done.stderr) == (0, "")
    servers = [line for line in COMMANDS if line.startswith(SERVERS) and not line.startswith(KEYS)]
    processes = [made.start(line) for line in servers]
    sharded = [f"tcp://127.0.0.1:{made.shards + number}" for number in (0, 2)]
    workers = sum(line.startswith("zmq-worker") and "--broker" not in line for line in servers)
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(at, connect_timeout_s=60)) for at in (made.frontend, *sharded)]
            server_key, key = made.here("broker-keys/server.key"), made.here("alice.secret")
            keyed = Client(f"tcp://127.0.0.1:{made.keyed}", connect_timeout_s=60, server_key=server_key, key=key)
            clients.append(stack.enter_context(keyed))

            def ready() -> bool:
                assert all(process.poll() is None for process in processes), log.read_text()
                found = [len(worker_names(client)) for client in clients]
                return found[0] >= workers and found[1:] == [1, 1, 1]  # more where --devices finds several

            eventually(ready, "the README's workers are ready", timeout_s=240)
        yield made
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(30) for process in reversed(processes)]
    assert codes == [0] * len(processes)


def test_the_readme_has_what_these_tests_run() -> None:
    assert sum(line.startswith("zmq-broker") and not line.startswith(KEYS) for line in COMMANDS) == 3
    assert sum(line.startswith(KEYS) for line in COMMANDS) == 5
    assert all(line.startswith((*MAKES_KEYS, *ENDING)) for line in COMMANDS if line.startswith(KEYS))
    assert sum(line.startswith("zmq-worker") for line in COMMANDS) == 10
    assert sum(str(KEYED) in line for line in COMMANDS) == 2
    assert sum(str(SHARDS) in line for line in COMMANDS) == 3
    assert sum(SERVER in line and SERVED in line for line in COMMANDS) == 1
    assert sum(line.startswith("zmq-client") for line in COMMANDS) >= 6
    assert len(PROGRAMS) >= 4
    known = (*ELSEWHERE, *SERVERS, "zmq-client")
    assert not [line for line in COMMANDS if not line.startswith(known)]


@pytest.mark.model
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith(ENDING) and "revoke" not in line])
def test_command(shell: Shell, line: str) -> None:
    done = shell.run(line)
    told = "broker: " if "--explain" in line else ""  # why that worker, beside the text
    assert (done.returncode, done.stderr[: len("broker: ")]) == (0, told)
    assert done.stdout.strip()


@pytest.mark.model
@pytest.mark.parametrize("program", PROGRAMS, ids=[f"program-{number}" for number in range(len(PROGRAMS))])
def test_program(shell: Shell, program: str) -> None:
    done = shell.python(program)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.model
def test_a_key_is_revoked(shell: Shell) -> None:
    """After all that uses it."""
    [line] = [line for line in COMMANDS if "revoke" in line]
    done = shell.run(line)
    assert (done.returncode, done.stderr) == (0, "")
    assert "revoked" in done.stdout
    [asks] = [line for line in COMMANDS if "alice.secret" in line and line.startswith("zmq-client")]

    def is_out() -> bool:
        done = shell.run(asks)
        return done.returncode != 0 and "(forbidden)" in done.stderr

    eventually(is_out, "a revoked key is of no use any more")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).is_file(), target


@pytest.mark.model
def test_demo() -> None:
    """`make demo`, without the making of .venv, which is what these tests run in."""
    done = subprocess.run(
        [sys.executable, "examples/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=290, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"^\[\d\] .*\(worker-[12]\)$", done.stdout, re.MULTILINE)) == 8
    assert "tokens/s in all" in done.stdout
    assert "worker-1: 4 requests, worker-2: 4 requests" in done.stdout
    assert "Paris" in done.stdout
