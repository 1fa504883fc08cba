"""A model's files are data: nothing in them runs, and what would have to is refused with a clear word."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import BertConfig, BertModel

from tokenmq.worker.engines.base import EngineLoadError
from tokenmq.worker.engines.transformers import loading
from tokenmq.worker.engines.transformers.embeddings import EmbeddingEngine
from tokenmq.worker.engines.transformers.engine import TransformersEngine

from .conftest import job, make_model, run
from .test_adapters import save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {base} as Own
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Return a file that is there once something of a model has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[[str], Any], tokenizer: Any) -> Path:
    """Return a folder with the tiny llama and its tokenizer."""
    path = tmp_path / "model"
    tiny("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def failure(folder: Path, **settings: Any) -> str:
    with pytest.raises(EngineLoadError) as caught:
        TransformersEngine(model=folder, slots=2, device="cpu", **settings).load()
    message = str(caught.value)
    assert "\n" not in message
    return message


class Runs:
    """Runs something when it is unpickled by whoever lets it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(file: Path, marker: Path, form: str) -> None:
    """Write a checkpoint whose pickle makes a folder, as torch writes it or as a plain pickle."""
    if form == "torch":
        torch.save({"weight": Runs(marker)}, file)
    else:
        file.write_bytes(pickle.dumps({"weight": Runs(marker)}))


def test_the_trap_works(tmp_path: Path, marker: Path) -> None:
    pickled(tmp_path / "a.bin", marker, "torch")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_pickled_checkpoint_does_not_run(folder: Path, marker: Path, form: str) -> None:
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin", marker, form)
    assert failure(folder).startswith(f"cannot load {folder}: ")
    assert not marker.exists()


def test_a_pickle_of_nothing_but_tensors_is_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(make_model("llama").state_dict(), folder / "pytorch_model.bin")
    engine = TransformersEngine(model=folder, slots=2, device="cpu")
    engine.load()
    engine.submit(job(1, [5, 9, 200, 31, 8]))
    assert run(engine).done(1).completion_tokens == 8


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_a_pickled_adapter_does_not_run(folder: Path, tmp_path: Path, marker: Path, form: str) -> None:
    adapter = save_adapter(make_model("llama"), tmp_path / "adapter", 1)
    weights = adapter / "adapter_model.safetensors"
    assert weights.is_file()
    weights.unlink()
    pickled(adapter / "adapter_model.bin", marker, form)
    assert failure(folder, adapters=(f"a={adapter}",)).startswith(f"adapter 'a': {adapter} does not fit ")
    assert not marker.exists()


def test_a_pickled_layer_of_an_embedding_model_does_not_run(tmp_path: Path, tokenizer: Any, marker: Path) -> None:
    path = tmp_path / "embedder"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=320, **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    kinds = {"0": ("Transformer", ""), "1": ("Pooling", "1_Pooling"), "2": ("Dense", "2_Dense")}
    modules = [
        {"idx": i, "path": at, "type": f"sentence_transformers.models.{kind}"} for i, (kind, at) in kinds.items()
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    for _, at in kinds.values():
        (path / at).mkdir(exist_ok=True)
    (path / "1_Pooling" / "config.json").write_text("{}")
    (path / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 32, "out_features": 8}))
    pickled(path / "2_Dense" / "pytorch_model.bin", marker, "torch")
    with pytest.raises(EngineLoadError, match="what it says of its embeddings is damaged"):
        EmbeddingEngine(model=path, device="cpu").load()
    assert not marker.exists()


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_code_in_a_models_folder_is_not_run(folder: Path, marker: Path, part: str) -> None:
    base = {"config": "LlamaConfig", "model": "LlamaForCausalLM", "tokenizer": "PreTrainedTokenizerFast"}[part]
    (folder / "own.py").write_text(CODE.format(marker=str(marker), base=base))
    if part == "tokenizer":
        change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    else:
        change(
            folder / "config.json",
            model_type="something-new",
            auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
        )
    message = failure(folder)
    assert message == f"{folder}: {loading.OWN_CODE}"
    assert not marker.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_needed(folder: Path, marker: Path) -> None:
    (folder / "own.py").write_text(CODE.format(marker=str(marker), base="LlamaForCausalLM"))
    change(folder / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    engine = TransformersEngine(model=folder, slots=2, device="cpu")
    engine.load()
    engine.close()
    assert not marker.exists()


def test_nobody_is_asked_on_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("transformers asked"))
    (folder / "own.py").write_text("")
    change(folder / "config.json", model_type="something-new", auto_map={"AutoConfig": "own.Own"})
    assert "never run here" in failure(folder)


def test_kernels_that_a_config_names_are_not_fetched(folder: Path) -> None:
    change(folder / "config.json", attn_implementation="somebody/fast-attention")
    assert "asks for the kernels 'somebody/fast-attention'" in failure(folder)


def test_a_model_of_its_own_template_cannot_leave_the_sandbox(folder: Path, marker: Path, tokenizer: Any) -> None:
    tries = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}",
        "{{ messages.append(1) }}",
        "{% set x = messages[0].__setitem__('role', 'system') %}",
        "{% include '/etc/passwd' %}",
    )
    for template in tries:
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(template)
        engine = TransformersEngine(model=folder, slots=2, device="cpu")
        engine.load()
        [failed] = engine.submit(chat())
        assert failed.code == "bad_request", template  # type: ignore[union-attr]
        assert "the chat template of model" in failed.message  # type: ignore[union-attr]
        engine.close()
    assert not marker.exists()


def chat(**more: Any) -> Any:
    from tokenmq.protocol.payload import Generation
    from tokenmq.worker.engines.base import Job

    return Job(1, "model", Generation(messages=({"role": "user", "content": "hi {{ 7 * 7 }}"},), **more))


@pytest.mark.parametrize("name", ["chat_template", "conversation", "tokenize", "tokenizer_kwargs", "return_dict"])
def test_a_client_cannot_bring_a_template(make_engine: Callable[..., TransformersEngine], name: str) -> None:
    engine = make_engine()
    [failed] = engine.submit(chat(template={name: "{% for i in range(10**9) %}{% endfor %}"}))
    assert failed.code == "bad_request"  # type: ignore[union-attr]
    assert f"request.template: {name} cannot be set" in failed.message  # type: ignore[union-attr]


def test_what_a_client_writes_is_no_template(make_engine: Callable[..., TransformersEngine]) -> None:
    engine = make_engine()
    assert engine._serving is not None
    prompt = engine._serving.prompts.read(chat().generation)
    assert "hi {{ 7 * 7 }}" in prompt.text


def test_peft_is_there() -> None:
    assert peft.PeftModel  # or the test of a pickled adapter shows nothing
