"""LoRA adapters: each row by its own, in one batch; what is no adapter for this model is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmq.protocol.messages import FinishReason
from tokenmq.worker.engines.base import EngineLoadError, Job
from tokenmq.worker.engines.transformers.adapters import attach, parse
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.packed import PackedLinear, pack

from .conftest import Record, batch_of, job, make_model, reference, resumed, run

# peft asks transformers by a name that transformers will drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NAMES = ["", "first", "second"]
LENGTHS = [1, 9, 20, 37, 64]
MOST = 12


def prompt_of(number: int) -> list[int]:
    """Return a prompt; all begin alike."""
    return [1 + (7 * step + step * step) % 300 for step in range(LENGTHS[number])]


def save_adapter(model: Any, folder: Path, seed: int, **config: Any) -> Path:
    """Write a random adapter of a copy of `model`, one that matters."""
    torch.manual_seed(seed)
    wishes = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], **config}
    made = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**wishes))
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return two saved adapters of the tiny Llama; the second one changes other layers."""
    at = tmp_path_factory.mktemp("adapters")
    model = make_model("llama")
    return {
        "first": save_adapter(model, at / "first", 1),
        "second": save_adapter(model, at / "second", 2, r=2, target_modules=["q_proj", "k_proj", "up_proj"]),
    }


class Known:
    """What each adapter's own model says, alone and without this engine."""

    def __init__(self, folders: dict[str, Path]) -> None:
        """Load a model for each."""
        self.models = {"": make_model("llama")}
        for name, folder in folders.items():
            self.models[name] = peft.PeftModel.from_pretrained(make_model("llama"), folder).eval()
        self._made: dict[tuple[str, int], list[int]] = {}

    def __call__(self, name: str, number: int) -> list[int]:
        """Return what follows a prompt."""
        if (name, number) not in self._made:
            self._made[name, number] = reference(self.models[name], prompt_of(number), MOST, [0])
        return self._made[name, number]


@pytest.fixture(scope="module")
def known(folders: dict[str, Path]) -> Known:
    return Known(folders)


def options(folders: dict[str, Path]) -> list[str]:
    return [f"{name}={folder}" for name, folder in folders.items()]


@pytest.fixture
def make(folders: dict[str, Path], tokenizer: Any) -> Callable[..., TransformersEngine]:
    """Return a maker of engines with both adapters."""

    def engine(**wishes: Any) -> TransformersEngine:
        wishes = {"slots": 4, "prefill_tokens": 16, "adapters": options(folders), **wishes}
        made = TransformersEngine.from_loaded(make_model("llama"), tokenizer, name="tiny", **wishes)
        assert [model.name for model in made.load()] == ["tiny", "tiny:first", "tiny:second"]
        return made

    return engine


def ask(ticket: int, name: str, number: int, most: int = MOST) -> Job:
    """Return a greedy job for a model's adapter."""
    return replace(job(ticket, prompt_of(number), max_tokens=most), model=f"tiny:{name}" if name else "tiny")


Make = Callable[..., TransformersEngine]


def test_adapters_matter(known: Known) -> None:
    for number in range(len(LENGTHS)):
        assert len({tuple(known(name, number)) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("budget", [16, 256])
def test_rows_with_different_adapters_run_in_one_batch(budget: int, make: Make, known: Known) -> None:
    engine = make(slots=6, prefill_tokens=budget)
    asked = [(name, number) for number in range(len(LENGTHS)) for name in NAMES]
    for ticket, (name, number) in enumerate(asked):
        assert engine.submit(ask(ticket, name, number)) == []
    record, most = Record(), 0
    while engine.next_step_in() is not None:
        record.take(engine.step())
        engine.validate()
        most = max(most, len({row.adapter for row in batch_of(engine).scheduler.running}))
    assert most == len(NAMES), "all of them ran in one batch"
    for ticket, (name, number) in enumerate(asked):
        assert record.ids[ticket] == known(name, number), (name, number)


def test_packed_layers_keep_adapters_right(folders: dict[str, Path], known: Known, tokenizer: Any) -> None:
    model = make_model("llama")
    engine = TransformersEngine.from_loaded(model, tokenizer, name="tiny", adapters=options(folders))
    engine.load()
    pack(model)
    if not any(isinstance(module, PackedLinear) for module in model.modules()):
        pytest.skip("this processor has no packed layers")
    for ticket, name in enumerate(NAMES):
        engine.submit(ask(ticket, name, 3))
    record = run(engine)
    assert [record.ids[ticket] for ticket in range(3)] == [known(name, 3) for name in NAMES]


def test_the_same_beginning_is_kept_for_each_adapter_apart(make: Make, known: Known) -> None:
    engine = make(prefix_tokens=256)
    found = []
    for ticket, name in enumerate([*NAMES, *NAMES]):
        before = engine.stats().cached_tokens
        engine.submit(ask(ticket, name, 4))
        assert run(engine).ids[ticket] == known(name, 4)
        found.append(engine.stats().cached_tokens - before)
    assert found[:3] == [0, 0, 0], "nobody takes what another one computed"
    assert min(found[3:]) >= 32, "but what was its own"


@pytest.mark.parametrize("way", ["prefill", "replay"])
def test_a_stream_is_resumed_with_its_adapter(way: str, make: Make, known: Known) -> None:
    engine = make(resume=way)
    for ticket, name in enumerate(NAMES):
        assert engine.submit(resumed(ticket, ask(ticket, name, 2), known(name, 2)[:5])) == []
    record = run(engine)
    for ticket, name in enumerate(NAMES):
        assert record.ids[ticket] == known(name, 2)[5:]


_action = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(NAMES), st.integers(0, len(LENGTHS) - 1)),
    st.tuples(st.just("cancel"), st.just(""), st.integers(0, 5)),
    st.tuples(st.just("step"), st.just(""), st.integers(1, 4)),
)


def test_any_schedule_equals_each_model_alone(make: Make, known: Known) -> None:
    engine = make(cache_tokens=200, prefix_tokens=64)
    ended = {"stop": 0, "length": 0, "cancelled": 0}
    tickets = iter(range(10_000))

    @settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(actions=st.lists(_action, min_size=8, max_size=24))
    def schedule(actions: list[tuple[str, str, int]]) -> None:
        record = Record()
        asked: dict[int, tuple[str, int]] = {}
        for what, name, number in actions:
            if what == "submit":
                ticket = next(tickets)
                asked[ticket] = name, number
                engine.submit(ask(ticket, name, number))
            elif what == "cancel":
                record.take(engine.cancel(max(asked, default=0) - number))
            else:
                for _ in range(number):
                    record.take(engine.step())
                    engine.validate()
        run(engine, record)
        for ticket, (name, number) in asked.items():
            done, got, want = record.done(ticket), record.ids.get(ticket, []), known(name, number)
            ended[done.reason.value] += 1
            assert got == (want[: len(got)] if done.reason is FinishReason.CANCELLED else want)

    schedule()
    assert ended["length"] > 20
    assert ended["cancelled"] > 2


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["first"], "adapter 'first': give it as NAME=PATH"),
        (["=x"], "adapter '=x': give it as NAME=PATH"),
        (["a:b=x"], "adapter 'a:b': its name must not contain ':'"),
        (["a=x", "a=y"], "adapter 'a' is given twice"),
        ([f"{'a' * 300}=x"], "is too long, at most 256 characters"),
    ],
)
def test_names_are_checked(given: list[str], says: str) -> None:
    with pytest.raises(EngineLoadError) as refused:
        parse(given, "tiny")
    assert says in str(refused.value)


def refusal(folder: Path) -> str:
    """Return why an adapter is not taken, in one line that names it."""
    with pytest.raises(EngineLoadError) as refused:
        attach(make_model("llama"), parse([f"mine={folder}"], "tiny"))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(f"adapter 'mine': {folder}")
    return message


def test_what_is_no_adapter_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "has no adapter_config.json" in refusal(tmp_path / "empty")
    shutil.copytree(folders["first"], tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"no weights")
    assert "does not fit" in refusal(tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    assert "its adapter_config.json is damaged" in refusal(tmp_path / "damaged")


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    made = peft.get_peft_model(make_model("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    made.save_pretrained(tmp_path)
    assert "an adapter of the kind IA3; only LORA can be served" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["norm"]}, "modules_to_save=['norm']"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_would_change_other_rows_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    refused = refusal(save_adapter(make_model("llama"), tmp_path, 1, **config))
    assert f"was made with {says}, which cannot be served beside others" in refused


def test_an_adapter_of_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(make_model("llama"), tmp_path, 1, target_modules=["embed_tokens"])
    assert "changes the embeddings" in refusal(folder)


def test_layers_of_other_kinds_are_mixed_too(tmp_path: Path, tokenizer: Any) -> None:
    """Those of GPT-2, which are no linear layers of torch's; and in half precision."""
    folder = save_adapter(make_model("gpt2"), tmp_path, 1, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    engine = TransformersEngine.from_loaded(make_model("gpt2"), tokenizer, name="tiny", adapters=[f"first={folder}"])
    engine.load()
    for ticket, name in enumerate(["", "first"]):
        engine.submit(ask(ticket, name, 3))
    record = run(engine)
    changed = peft.PeftModel.from_pretrained(make_model("gpt2"), folder).eval()
    assert record.ids[0] == reference(make_model("gpt2"), prompt_of(3), MOST, [0])
    assert record.ids[1] == reference(changed, prompt_of(3), MOST, [0])
    assert record.ids[0] != record.ids[1]
    half = attach(make_model("gpt2").to(torch.bfloat16), parse([f"first={folder}"], "tiny"))
    assert half.names == ("first",), "and the trial at load finds them alike"


def test_an_adapter_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wider = type(make_model("llama"))(type(make_model("llama").config)(**{**sizes(), "hidden_size": 64})).eval()
    assert "does not fit LlamaForCausalLM: size mismatch" in refusal(save_adapter(wider, tmp_path / "wider", 1))
    deeper = type(wider)(type(wider.config)(**{**sizes(), "num_hidden_layers": 3})).eval()
    assert "was made for another model" in refusal(save_adapter(deeper, tmp_path / "deeper", 1))
    shutil.copytree(folders["first"], tmp_path / "elsewhere")
    config = json.loads((tmp_path / "elsewhere" / "adapter_config.json").read_text())
    config["target_modules"] = ["c_attn"]
    (tmp_path / "elsewhere" / "adapter_config.json").write_text(json.dumps(config))
    assert "does not fit LlamaForCausalLM: Target modules" in refusal(tmp_path / "elsewhere")


def sizes() -> dict[str, Any]:
    """Return the tiny Llama's config."""
    config: dict[str, Any] = make_model("llama").config.to_dict()
    return config


@pytest.mark.parametrize(("wish", "value"), [("compile_decode", True), ("tensor_parallel", 2)])
def test_what_does_not_go_with_adapters_is_refused(
    wish: str, value: object, folders: dict[str, Path], tokenizer: Any
) -> None:
    wishes: dict[str, Any] = {wish: value, "adapters": options(folders)}
    engine = TransformersEngine.from_loaded(make_model("llama"), tokenizer, name="tiny", **wishes)
    with pytest.raises(EngineLoadError, match=f"adapters do not go with {wish}"):
        engine.load()
