"""Loading: what works, what is refused with one line, and that a local model needs no network."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)

from tokenmq.protocol.messages import ModelInfo
from tokenmq.worker.engines.base import EngineLoadError, EngineStats
from tokenmq.worker.engines.transformers import gguf, sizing
from tokenmq.worker.engines.transformers.devices import choose_dtype
from tokenmq.worker.engines.transformers.engine import TransformersEngine

from .conftest import CONTEXT, VOCABULARY, job, make_model, make_tokenizer, reference, run

PROMPT = [5, 9, 200, 31, 8]


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[str], Any], tokenizer: Any) -> Path:
    """Return a folder with the tiny llama and its tokenizer."""
    path = tmp_path / "tiny-llama"
    tiny("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record and refuse every attempt to reach the network."""
    attempts: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        attempts.append(str(arguments))
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


def failure(**settings: Any) -> str:
    with pytest.raises(EngineLoadError) as caught:
        TransformersEngine(**{"slots": 2, "device": "cpu", **settings}).load()
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_a_folder_loads_without_the_network(
    folder: Path, no_network: list[str], tiny: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tokenmq.worker")
    engine = TransformersEngine(model=str(folder), slots=2, device="cpu")
    assert engine.load() == [ModelInfo("tiny-llama", CONTEXT, chat=True, resumes=True)]
    assert no_network == []
    # 2 layers, K and V, 2 heads of 8, 4 bytes: 256 bytes a token
    assert f"{256 * 224:,} bytes ({2 * CONTEXT} tokens, and 32 of prefixes), 2 slots, on cpu" in caplog.text
    engine.submit(job(1, PROMPT, max_tokens=10))
    assert run(engine).ids[1] == reference(tiny("llama"), PROMPT, 10, [0])
    engine.close()
    engine.close()
    assert engine.stats() == EngineStats()
    assert engine.next_step_in() is None


def test_half_precision(folder: Path) -> None:
    engine = TransformersEngine(model=folder, slots=2, device="cpu", dtype="bfloat16", name="half")
    assert engine.load()[0].name == "half"
    for ticket in range(3):
        engine.submit(job(ticket, [*PROMPT, 40 + ticket], max_tokens=6, ignore_eos=True))
    together = run(engine).ids
    for ticket in range(3):
        engine.submit(job(ticket, [*PROMPT, 40 + ticket], max_tokens=6, ignore_eos=True))
        assert run(engine).ids[ticket] == together[ticket], "the stream depends on its company"


def test_mistakes_of_the_user(folder: Path, tmp_path: Path) -> None:
    assert failure(model="/no/such/folder") == "/no/such/folder: no such file or folder"
    assert "no such file" in failure(model="./nothing.gguf")
    assert "no config.json" in failure(model=tmp_path)
    other = tmp_path / "weights.bin"
    other.write_bytes(b"x")
    assert "another file" in failure(model=other)
    assert "cuda:63" in failure(model=folder, device="cuda:63")
    assert "toaster" in failure(model=folder, device="toaster")
    assert "float32, bfloat16, float16" in failure(model=folder, dtype="int3")
    assert "slots must be 1" in failure(model=folder, slots=0)
    assert "prefill_tokens" in failure(model=folder, prefill_tokens=0)
    assert "96 positions" in failure(model=folder, max_context=97)
    assert "max_context must be 8" in failure(model=folder, max_context=7)
    assert "cache_tokens must be 8" in failure(model=folder, cache_tokens=7)
    assert "prefix_tokens must be 0" in failure(model=folder, prefix_tokens=-1)
    assert "the cache has 50 tokens for all rows" in failure(model=folder, cache_tokens=50, max_context=60)


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nobody/nothing" in failure(model="nobody/nothing")


def test_damaged_files(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert failure(model=folder).startswith(f"cannot load {folder}")
    weights.unlink()
    assert str(folder) in failure(model=folder)
    (folder / "config.json").write_text('{"model_type": "never-heard-of"}')
    assert "never-heard-of" in failure(model=folder)


def test_an_absent_or_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert f"{folder}: its tokenizer (tokenizer.json and others) is absent or damaged" in failure(model=folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = failure(model=folder)
    assert "is absent or damaged" in message
    assert not message.endswith(":")


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    model = make_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up" not in name}
    model.save_pretrained(folder, state_dict=state)
    assert "model.layers.1.mlp.up_proj.weight" in failure(model=folder)


def test_an_encoder_decoder_is_refused(folder: Path) -> None:
    T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=1).save_pretrained(folder)
    assert "encoder-decoder" in failure(model=folder)


def test_a_cache_larger_than_the_machine_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 layers, K and V, 2 heads of 8, 4 bytes, 96 columns, 2 slots; and half a row of prefixes, in whole blocks
    monkeypatch.setattr(sizing, "_room", lambda _: 1000)
    message = failure(model=folder, cache_tokens=2 * CONTEXT)
    assert "57,344 bytes (192 tokens, and 32 of prefixes)" in message
    assert "less max_context, cache_tokens or prefix_tokens" in message
    # Where nothing is asked for, what there is room for will do, but the longest row must fit.
    assert "24,576 bytes (96 tokens, and 0 of prefixes)" in failure(model=folder)


def test_an_allocation_that_fails_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sizing, "SlotCache", full)
    assert "57,344 bytes" in failure(model=folder)


# ----------------------------------------------------------------------------------------------- architectures


def around(model: Any, **settings: Any) -> TransformersEngine:
    return TransformersEngine.from_loaded(model, make_tokenizer(), name="tiny", **{"slots": 2, **settings})


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.4}
ATTENTION = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}


def test_a_sliding_window_slides() -> None:
    torch.manual_seed(1)
    sizes = {**SMALL, **ATTENTION, **IDS, "max_position_embeddings": 64, "sliding_window": 24}
    model = MistralForCausalLM(MistralConfig(**sizes)).eval()
    engine = around(model, prefill_tokens=4)
    engine.load()
    engine.submit(job(1, PROMPT, max_tokens=100, ignore_eos=True))
    engine.submit(job(2, [*PROMPT, *PROMPT, *PROMPT], max_tokens=100, ignore_eos=True))
    record = run(engine)
    assert len(record.ids[1]) == 64 - len(PROMPT)
    assert record.ids[1] == reference(model, PROMPT, 64 - len(PROMPT))
    assert record.ids[2] == reference(model, [*PROMPT, *PROMPT, *PROMPT], 64 - 3 * len(PROMPT))


@pytest.mark.parametrize("window", [16, 32])
def test_layers_of_two_kinds_slide_or_not(window: int) -> None:
    torch.manual_seed(2)
    sizes = {**SMALL, **ATTENTION, **IDS, "head_dim": 8, "max_position_embeddings": 64, "sliding_window": window}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval()
    engine = around(model, prefill_tokens=4)
    engine.load()
    engine.submit(job(1, PROMPT, max_tokens=40, ignore_eos=True))
    engine.submit(job(2, PROMPT[:2], max_tokens=40, ignore_eos=True))
    record = run(engine)
    assert record.ids[1] == reference(model, PROMPT, 40)
    assert record.ids[2] == reference(model, PROMPT[:2], 40)


def test_states_that_are_no_keys_and_values_are_refused() -> None:
    model = MambaForCausalLM(MambaConfig(**SMALL, **IDS)).eval()
    with pytest.raises(EngineLoadError, match="MambaForCausalLM has layers of kind LinearAttentionLayer"):
        around(model).load()


def test_positions_read_out_of_a_2d_mask_are_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **IDS)).eval()
    with pytest.raises(EngineLoadError, match="BloomForCausalLM"):
        around(model).load()


def test_the_check_at_load_sees_a_model_that_ignores_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    forward = model.forward

    def without_positions(*arguments: Any, position_ids: Any = None, **more: Any) -> Any:
        return forward(*arguments, **more)

    monkeypatch.setattr(model, "forward", without_positions)
    with pytest.raises(EngineLoadError, match="other results"):
        around(model).load()


def test_a_slow_tokenizer_is_refused(tiny: Callable[[str], Any]) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(EngineLoadError, match="no fast version"):
        TransformersEngine.from_loaded(tiny("llama"), Slow(), name="tiny", slots=1).load()


# -------------------------------------------------------------------------------------------------------- GGUF


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> list[str]:
    """Let transformers read any GGUF file as the tiny llama; return a list of the readings."""
    readings: list[str] = []

    def model(_folder: Path, *, gguf_file: str, dtype: torch.dtype, **_: Any) -> Any:
        readings.append(gguf_file)
        time.sleep(0.05)  # long enough for a second one to come in between, were there no lock
        read = make_model("llama").to(dtype)
        read.hf_quantizer = object()  # as transformers leaves it
        read.config.quantization_config = {"quant_method": "gguf"}
        return read

    monkeypatch.setattr(gguf.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(gguf.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    return readings


def test_workers_that_start_together_convert_once(tmp_path: Path, conversions: list[str]) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    folders: list[Path] = []
    starts = threading.Barrier(3)

    def start() -> None:
        starts.wait()
        folders.append(gguf.converted(file, torch.float32, tmp_path / "cache"))

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 3
    assert conversions == ["tiny.gguf"]
    assert (folders[0] / "model.safetensors").is_file()
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert "quantization_config" not in (folders[0] / "config.json").read_text()


def test_the_cache_goes_by_content_and_dtype(tmp_path: Path, conversions: list[str]) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b" / "a.gguf"
    second.parent.mkdir()
    first.write_bytes(b"one")
    second.write_bytes(b"one")
    cache = tmp_path / "cache"
    folder = gguf.converted(first, torch.float32, cache)
    assert gguf.converted(second, torch.float32, cache) == folder
    assert gguf.converted(first, torch.bfloat16, cache) != folder
    second.write_bytes(b"two")
    assert gguf.converted(second, torch.float32, cache) != folder
    assert len(conversions) == 3


def test_a_kill_in_the_middle_leaves_nothing_half(tmp_path: Path, conversions: list[str]) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    folder = gguf.converted(file, torch.float32, tmp_path)
    folder.rename(folder.with_name(folder.name + ".partial"))  # killed just before the rename
    (folder.with_name(folder.name + ".partial") / "model.safetensors").write_bytes(b"half")
    (folder.with_name(folder.name + ".partial") / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    assert gguf.converted(file, torch.float32, tmp_path) == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").stat().st_size > 1000
    assert not list(tmp_path.glob("*.partial"))
    assert not list(folder.glob("*-of-*"))


def test_a_gguf_file_becomes_an_engine(
    tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch, tiny: Callable[[str], Any]
) -> None:
    file = tmp_path / "tiny.q4.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setenv(gguf.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    folder = gguf.converted(file, torch.float32, gguf.default_cache_dir())
    assert folder.parent == tmp_path / "elsewhere" / "models"
    monkeypatch.undo()  # from here on transformers reads the folder itself
    monkeypatch.setenv(gguf.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    engine = TransformersEngine(model=file, slots=2, device="cpu")
    assert [info.name for info in engine.load()] == ["tiny.q4"]
    engine.submit(job(1, PROMPT, max_tokens=8))
    assert run(engine).ids[1] == reference(tiny("llama"), PROMPT, 8, [0])
    assert conversions == ["tiny.q4.gguf"]
    assert AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).config.vocab_size == VOCABULARY


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, but not really" * 50)
    assert failure(model=file, cache_dir=str(tmp_path / "cache")).startswith(f"cannot load {file}")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


# ------------------------------------------------------------------------------------------------------ import


def test_dtypes_by_device() -> None:
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("auto", torch.device("mps")) is torch.float32
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("float16", torch.device("cpu")) is torch.float16


def test_the_package_is_imported_without_torch_and_sets_the_wait_policy() -> None:
    program = (
        "import os, sys; os.environ.pop('OMP_WAIT_POLICY', None)\n"
        "import tokenmq.worker.engines.transformers\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
