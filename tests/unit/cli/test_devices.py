"""`--devices`: what it names, how devices are divided among workers, and what their processes are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenmq.cli import devices
from tokenmq.cli.devices import (
    device_environment,
    found_devices,
    loopback_environment,
    parallel_devices,
    parse_devices,
    teams,
    threads_environment,
)

NO_CUDA = "class cuda:\n def device_count(): return 0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,1", ["cuda:0", "cuda:1"]),
        (" 3 , cuda:1", ["cuda:3", "cuda:1"]),
        ("cpu,cpu", ["cpu", "cpu"]),
        ("cuda", ["cuda:0"]),
        ("xpu:1,mps", ["xpu:1", "mps"]),
    ],
)
def test_a_list_names_devices(text: str, expected: list[str]) -> None:
    assert parse_devices(text) == expected


@pytest.mark.parametrize("text", ["", "0,,1", "GPU", "0-3", "cuda:", "cpu,all", "-1"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected all, or a list such as"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        ("class cuda:\n def device_count(): return 2", ["cuda:0", "cuda:1"]),
        (NO_CUDA + "class backends:\n class mps:\n  def is_available(): return True", ["mps"]),
        (NO_CUDA + "class backends:\n class mps:\n  def is_available(): return False", ["cpu"]),
        ("raise ImportError('no torch here')", ["cpu"]),
    ],
)
def test_all_is_what_torch_finds(
    torch: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert found_devices() == expected
    assert parse_devices("all") == expected


def test_each_worker_has_a_device_or_as_many_as_its_processes() -> None:
    assert teams(["cuda:0", "cpu", "cpu"], 1) == [("cuda:0",), ("cpu",), ("cpu",)]
    assert teams(["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 2) == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]
    assert teams(["cpu"], 3) == [("cpu", "cpu", "cpu")]


@pytest.mark.parametrize(("names", "size", "words"), [(["cuda:0"], 2, "1 CUDA devices"), (["mps"], 2, "not mps")])
def test_devices_that_cannot_be_divided_are_refused(names: list[str], size: int, words: str) -> None:
    with pytest.raises(ValueError, match=rf"--tensor-parallel {size}: .*{words}"):
        teams(names, size)


@pytest.mark.parametrize(
    ("device", "found", "expected"),
    [
        ("auto", ["cuda:0", "cuda:1", "cuda:2"], ["cuda:0", "cuda:1"]),
        ("cuda", ["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
        ("auto", ["cpu"], ["cpu"]),
        ("cpu", ["cuda:0", "cuda:1"], ["cpu"]),
    ],
)
def test_one_worker_takes_the_first_devices(
    device: str, found: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "found_devices", lambda: found)
    assert parallel_devices(device, 2) == expected


@pytest.mark.parametrize(("device", "found"), [("auto", ["cuda:0"]), ("cuda", ["cpu"])])
def test_one_worker_needs_a_device_for_each_process(
    device: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "found_devices", lambda: found)
    with pytest.raises(ValueError, match=f"CUDA devices here: {sum('cuda' in name for name in found)};"):
        parallel_devices(device, 2)


def test_processes_of_a_worker_talk_over_the_loopback_interface() -> None:
    names = set(loopback_environment({}).values())
    assert names == {"lo"} or names == {"lo0"}
    assert list(loopback_environment({"GLOO_SOCKET_IFNAME": "eth0"})) == ["NCCL_SOCKET_IFNAME"]


def test_a_cuda_device_is_the_only_one_that_its_process_sees() -> None:
    assert device_environment(["cpu"], {}) == ("cpu", {})
    assert device_environment(["cpu", "cpu"], {}) == ("cpu", {"CUDA_VISIBLE_DEVICES": ""})
    assert device_environment(["cuda:3"], {}) == ("cuda", {"CUDA_VISIBLE_DEVICES": "3"})
    assert device_environment(["cuda:1"], {"CUDA_VISIBLE_DEVICES": "4, GPU-f00"}) == (
        "cuda", {"CUDA_VISIBLE_DEVICES": "GPU-f00"}
    )  # fmt: skip
    assert device_environment(["cuda:0", "cuda:1"], {"CUDA_VISIBLE_DEVICES": "7,6"}) == (
        "cuda", {"CUDA_VISIBLE_DEVICES": "7,6"}
    )  # fmt: skip
    with pytest.raises(ValueError, match="cuda:2: CUDA_VISIBLE_DEVICES=7,6 shows 2 devices"):
        device_environment(["cuda:2"], {"CUDA_VISIBLE_DEVICES": "7,6"})


def test_processes_share_the_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 8)
    assert threads_environment(3, {}) == {"OMP_NUM_THREADS": "2"}
    assert threads_environment(16, {}) == {"OMP_NUM_THREADS": "1"}
    assert threads_environment(1, {}) == {}
    assert threads_environment(3, {"OMP_NUM_THREADS": "8"}) == {}
