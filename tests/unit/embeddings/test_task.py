"""Which engine a model gets, by its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenmq.worker.engines.transformers.task import engine_for


@pytest.mark.parametrize(
    ("architectures", "engine"),
    [
        (["BertModel"], "embeddings"),
        (["XLMRobertaModel"], "embeddings"),
        (["Qwen3Model"], "embeddings"),
        (["BertForMaskedLM"], "embeddings"),
        (["LlamaForCausalLM"], "transformers"),
        (["GPT2LMHeadModel"], "transformers"),
        (["BertLMHeadModel"], "transformers"),
        (["LlavaForConditionalGeneration"], "transformers"),
        (["BertForSequenceClassification"], "transformers"),
        ([], "transformers"),
        (None, "transformers"),
    ],
)
def test_by_architecture(architectures: Any, engine: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    assert engine_for(str(tmp_path)) == engine
    assert engine_for(str(tmp_path), "embed") == "embeddings"
    assert engine_for(str(tmp_path), "generate") == "transformers"


def test_a_model_of_sentence_transformers_embeds_whatever_its_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (tmp_path / "modules.json").write_text("[]")
    assert engine_for(str(tmp_path)) == "embeddings"


def test_what_cannot_be_read_is_left_to_the_engine_to_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "config.json").write_text("{")
    for model in (str(tmp_path), "/no/such/folder", "nobody/nothing", "some.gguf", "not a hub id!"):
        assert engine_for(model) == "transformers"


def test_a_hub_id_is_decided_by_what_the_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = tmp_path / "models--some--encoder" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit.parent.parent / "refs").mkdir()
    (commit.parent.parent / "refs" / "main").write_text("0" * 40)
    (commit / "config.json").write_text('{"architectures": ["BertModel"]}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert engine_for("some/encoder") == "embeddings"


def test_a_task_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task must be one of auto, generate, embed, not 'chat'"):
        engine_for(str(tmp_path), "chat")
