"""Engines by name, and the worker's settings."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from tokenmq.worker.engines import registry
from tokenmq.worker.engines.base import EngineLoadError
from tokenmq.worker.engines.registry import engine_class, engine_names, make_engine
from tokenmq.worker.engines.synthetic import SyntheticEngine
from tokenmq.worker.settings import WorkerSettings, default_name


def test_names() -> None:
    assert set(engine_names()) >= {"synthetic", "transformers"}
    assert engine_class("synthetic") is SyntheticEngine
    assert engine_class("tokenmq.worker.engines.synthetic:SyntheticEngine") is SyntheticEngine
    assert isinstance(make_engine("synthetic", name="toy", slots=3), SyntheticEngine)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nonsense", "no engine is named 'nonsense'; there are .*synthetic.*package.module:Class"),
        ("no.such.module:Engine", "engine 'no.such.module:Engine' cannot be imported: No module named 'no'"),
        ("json:nothing", "engine 'json:nothing' cannot be found: "),
        ("json:dumps", "is not a subclass of Engine"),
        (":Engine", "engine ':Engine' cannot be found"),
    ],
)
def test_what_is_no_engine_is_told_in_one_line(name: str, told: str) -> None:
    with pytest.raises(EngineLoadError, match=told) as caught:
        engine_class(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"colour": "red"}, {"slots": 0}])
def test_wrong_options_are_load_errors(options: Any) -> None:
    with pytest.raises(EngineLoadError, match="engine 'synthetic': "):
        make_engine("synthetic", **options)


@pytest.mark.parametrize("engine", ["transformers", "embeddings"])
def test_torch_missing_names_the_command_that_installs_it(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_torch(name: str, package: str | None = None) -> Any:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(registry, "import_module", without_torch)
    with pytest.raises(EngineLoadError, match=r'needs torch, .* pip install "tokenmq\[transformers\]"'):
        engine_class(engine)


def test_entry_points_register_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "tokenmq.worker.engines.synthetic:SyntheticEngine", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])
    assert "mine" in engine_names()
    assert engine_class("mine") is SyntheticEngine


def test_the_core_and_the_synthetic_engine_need_neither_torch_nor_zmq() -> None:
    program = """
import sys
sys.modules["torch"] = sys.modules["zmq"] = None
import tokenmq.worker.core, tokenmq.worker.engine_thread
from tokenmq.worker.engines.registry import make_engine
make_engine("synthetic").load()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_settings_have_defaults_and_a_name_of_their_own() -> None:
    settings = WorkerSettings(brokers=("tcp://127.0.0.1:1",))
    assert settings.name == default_name()
    assert settings.most_held == 2 * settings.slots + 8


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"brokers": ()}, "brokers"),
        ({"brokers": ("tcp://a:1", "tcp://a:1")}, "brokers"),
        ({"models": ("",)}, "models"),
        ({"name": ""}, "name"),
        ({"slots": 0}, "slots"),
        ({"speed": 0.0}, "speed"),
        ({"heartbeat_s": 0.0}, "heartbeat_s"),
        ({"grace_s": -1.0}, "grace_s"),
        ({"stall_after_s": 0.0}, "stall_after_s"),
        ({"restart_after_s": -1.0}, "restart_after_s"),
    ],
)
def test_settings_that_a_broker_would_refuse_are_refused_here(values: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}: "):
        WorkerSettings(**{"brokers": ("tcp://a:1",), **values})
