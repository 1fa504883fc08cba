"""`zmq-worker --adapter`: a model and its adapters through broker, worker and client."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenmq.client import Client
from tokenmq.client.local import LocalCluster
from tokenmq.protocol.errors import ModelNotFoundError

from .conftest import PATIENCE_S
from .test_parallel import save_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.slow,
    # peft asks transformers by a name that transformers will drop.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

BIN = Path(sys.executable).parent
PROMPT = "the sea is wide"
NAMES = ["tiny", "tiny:calm", "tiny:wild"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, and two adapters for it."""
    from transformers import AutoModelForCausalLM

    at = tmp_path_factory.mktemp("adapters")
    model: Any = AutoModelForCausalLM.from_pretrained(save_model(at / "tiny"))
    for seed, name in enumerate(["calm", "wild"]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
        made = peft.get_peft_model(copy.deepcopy(model), config)
        for key, weight in made.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(weight, std=0.4)
        made.save_pretrained(at / name)
    return {name: at / name for name in ("tiny", "calm", "wild")}


@pytest.fixture(scope="module")
def cluster(folders: dict[str, Path]) -> Iterator[LocalCluster]:
    with LocalCluster() as made:
        made.start_worker(
            "--model", str(folders["tiny"]), "--device", "cpu", "--dtype", "float32", "--threads", "1",
            "--adapter", f"calm={folders['calm']}", "--adapter", f"wild={folders['wild']}",
        )  # fmt: skip
        made.wait_ready("tiny:wild", timeout_s=120)
        yield made


def alone(folders: dict[str, Path], name: str) -> list[int]:
    """The greedy tokens of peft's model for PROMPT."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folders["tiny"])
    if ":" in name:
        model = peft.PeftModel.from_pretrained(model, folders[name.split(":")[1]])
    ids = AutoTokenizer.from_pretrained(folders["tiny"])(PROMPT, return_tensors="pt")
    out = model.eval().generate(**ids, do_sample=False, max_new_tokens=16, eos_token_id=None, pad_token_id=0)
    found: list[int] = out[0, ids["input_ids"].shape[1] :].tolist()
    return found


def test_each_name_has_its_own_answer(cluster: LocalCluster, folders: dict[str, Path]) -> None:
    wanted = [alone(folders, name) for name in NAMES]
    assert len({tuple(ids) for ids in wanted}) == len(NAMES)
    with Client(cluster.frontend) as client:
        wishes: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
        streams = [client.generate(name, prompt=PROMPT, **wishes) for name in NAMES * 3]  # all at once
        got = [[token for chunk in stream for token in chunk.token_ids] for stream in streams]
    assert got == wanted * 3


def test_models_lists_them_and_no_others(cluster: LocalCluster) -> None:
    done = subprocess.run(
        [BIN / "zmq-client", "models", "--broker", cluster.frontend],
        capture_output=True, text=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    assert all(name in done.stdout for name in NAMES)
    with Client(cluster.frontend) as client:
        assert sorted(row["name"] for row in client.models()) == NAMES
        with pytest.raises(ModelNotFoundError, match="tiny:calm"):
            client.generate("tiny:unknown", prompt=PROMPT).text()


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("calm=/nowhere", "adapter 'calm': /nowhere: no such folder"),
        ("calm", "adapter 'calm': give it as NAME=PATH"),
    ],
)
def test_a_wrong_adapter_is_told_in_one_line(adapter: str, says: str, folders: dict[str, Path]) -> None:
    done = subprocess.run(
        [BIN / "zmq-worker", "--model", str(folders["tiny"]), "--device", "cpu", "--adapter", adapter],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_adapters_are_for_the_transformers_engine() -> None:
    done = subprocess.run(
        [BIN / "zmq-worker", "--model", "x", "--engine", "synthetic", "--adapter", "a=b"],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--adapter: it is for the engine transformers, not for synthetic" in done.stderr
