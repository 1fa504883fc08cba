"""`zmq-worker --tensor-parallel`: one model on two processes that talk by gloo, under a real broker."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client, TokenmqError
from tokenmq.client.local import LocalCluster, LocalProcess

from .conftest import PATIENCE_S, eventually, worker_names

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

WORKER = str(Path(sys.executable).parent / "zmq-worker")
PROMPTS = ["the sea", "a", "the sky is blue and the sea is wide", "wide wide"]


def save_model(folder: Path, **more: Any) -> Path:
    """A llama with random weights, far from uniform attention, and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<eos>", *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(7)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, **more}
    config = LlamaConfig(
        vocab_size=len(letters) + 1, hidden_size=8 * shape["num_attention_heads"], intermediate_size=48,
        max_position_embeddings=512, initializer_range=0.4, bos_token_id=None, eos_token_id=0, **shape,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[LocalCluster]:
    """A worker of one process, `one`, and one of two, `two`, with the same model."""
    with LocalCluster() as made:
        model = ("--model", str(folder), "--device", "cpu", "--dtype", "float32")
        made.start_worker(*model, "--name", "one", "--threads", "1")
        made.start_worker(
            *model, "--name", "two", "--threads", "1", "--tensor-parallel", "2", "--worker-name", "pair"
        )
        made.wait_ready("one")
        made.wait_ready("two")
        yield made


def ranks(process: LocalProcess) -> dict[int, int]:
    """The processes of the worker, by rank."""
    found = re.findall(r"worker_started worker=pair device=cpu,cpu pid=(\d+) rank=(\d)", process.log.read_text())
    return {int(rank): int(pid) for pid, rank in found}


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def tokens(client: Client, model: str, **sampling: Any) -> list[list[int]]:
    """What the model says to all prompts at once."""
    streams = [
        client.generate(model, prompt=prompt, seed=number, ignore_eos=True, **sampling)
        for number, prompt in enumerate(PROMPTS)
    ]
    return [[token for chunk in stream for token in chunk.token_ids] for stream in streams]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"]
)
def test_two_processes_say_what_one_says(cluster: LocalCluster, sampling: dict[str, Any]) -> None:
    with Client(cluster.frontend) as client:
        assert {"pair"} < worker_names(client)
        together = tokens(client, "two", max_tokens=100, **sampling)
        assert [len(ids) for ids in together] == [100] * len(PROMPTS)
        assert together == tokens(client, "one", max_tokens=100, **sampling)


def test_greedy_is_what_the_model_generates(cluster: LocalCluster, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with Client(cluster.frontend) as client:
        together = tokens(client, "two", max_tokens=40, temperature=0.0)
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)
        assert found == made[0, ids.shape[1] :].tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_processes_listen_on_the_loopback_interface_only(cluster: LocalCluster) -> None:
    for pid in ranks(cluster.workers[1]).values():
        links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
        own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
        lines = [
            line.split()
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        ]
        listening = [line[1].split(":")[0] for line in lines if line[3] == "0A" and line[9] in own]
        assert listening
        assert set(listening) == {"0100007F"}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("rank", [1, 0])
def test_one_process_that_dies_has_all_start_again_and_the_stream_goes_on(cluster: LocalCluster, rank: int) -> None:
    with Client(cluster.frontend, recovery_timeout_s=5 * PATIENCE_S) as client:
        expected = client.generate("two", prompt="the sea", seed=3, max_tokens=400, ignore_eos=True).text()
        stream = client.generate("two", prompt="the sea", seed=3, max_tokens=400, ignore_eos=True)
        reader = iter(stream)
        text = next(reader).text
        before = ranks(cluster.workers[1])
        os.kill(before[rank], signal.SIGKILL)
        assert text + "".join(chunk.text for chunk in reader) == expected
    after = ranks(cluster.workers[1])
    assert not set(before.values()) & set(after.values())
    assert not any(alive(pid) for pid in before.values())


def test_a_model_that_cannot_be_divided_is_refused_with_what_can(tmp_path: Path) -> None:
    odd = save_model(tmp_path / "odd", num_attention_heads=9, num_key_value_heads=3)
    done = subprocess.run(
        [WORKER, "--model", str(odd), "--tensor-parallel", "2", "--device", "cpu"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--tensor-parallel 2: a model with 9 attention heads and 3 key/value heads divides by 3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--engine", "synthetic"), "--tensor-parallel: it is for the transformers engine, not for synthetic"),
        (("--device", "mps"), "only CUDA devices and cpu can be several, not mps"),
        (("--devices", "0,1,2"), "3 CUDA devices cannot be divided into workers of 2 each"),
    ],
)
def test_a_wrong_option_is_one_line(options: tuple[str, ...], words: str) -> None:
    done = subprocess.run(
        [WORKER, "--model", "x", "--tensor-parallel", "2", *options],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert words in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_drain_lets_the_stream_end_and_then_all_processes(
    make_cluster: Callable[..., LocalCluster], folder: Path
) -> None:
    cluster = make_cluster()
    worker = cluster.start_worker(
        "--model", str(folder), "--name", "two", "--device", "cpu", "--threads", "1", "--tensor-parallel", "2",
        "--worker-name", "pair", "--grace", str(PATIENCE_S),
    )  # fmt: skip
    cluster.wait_ready("two")
    with Client(cluster.frontend) as client:
        stream = client.generate("two", prompt="the sea", max_tokens=200, ignore_eos=True)
        reader = iter(stream)
        count = len(next(reader).token_ids)
        # To all of them, as a service manager does: followers stay as long as their leader needs them.
        for pid in (*ranks(worker).values(), worker.pid):
            os.kill(pid, signal.SIGTERM)
        try:
            count += sum(len(chunk.token_ids) for chunk in reader)
        except TokenmqError as error:
            raise AssertionError(f"{error}\n{worker.log_tail()}") from error
        assert (count, len(stream.attempts)) == (200, 1)
    assert worker.wait(2 * PATIENCE_S) == 0
    eventually(lambda: not any(alive(pid) for pid in ranks(worker).values()), "none is left")
    assert "follower_failed" not in worker.log.read_text()
