"""Tensor parallel in one process: what is told, that a follower ends with the same cache, and what is refused."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from tokenmq.worker.engines.base import EngineLoadError
from tokenmq.worker.engines.transformers.cache import SlotCache
from tokenmq.worker.engines.transformers.division import refuse_indivisible
from tokenmq.worker.engines.transformers.group import Group
from tokenmq.worker.engines.transformers.parallel import LeadingRunner, OutOfStepError, follow
from tokenmq.worker.engines.transformers.runner import Runner
from tokenmq.worker.engines.transformers.selfcheck import layer_shapes
from tokenmq.worker.engines.transformers.space import Space

PATIENCE_S = 60.0


class Wire(Group):
    """A group of two in one process: bytes that rank 0 broadcasts wait for rank 1."""

    def __init__(self, rank: int, frames: queue.SimpleQueue[bytes]) -> None:
        self.rank, self.size, self.device = rank, 2, torch.device("cpu")
        self.frames = frames
        self.broken = False
        self.left = False

    def _broadcast(self, data: bytearray) -> bytearray:
        if self.broken:
            raise RuntimeError("Connection closed by peer")
        if self.rank == 0:
            self.frames.put(bytes(data))
        else:
            frame = self.frames.get(timeout=PATIENCE_S)
            assert len(frame) == len(data)
            data[:] = frame
        return data

    def leave(self) -> None:
        self.left = True


@pytest.fixture
def wires() -> tuple[Wire, Wire]:
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    return Wire(0, frames), Wire(1, frames)


@pytest.fixture
def make_cache(tiny: Callable[[str], Any]) -> Callable[[], SlotCache]:
    shapes = layer_shapes(tiny("llama"), 32)
    return lambda: SlotCache(shapes, Space(128, 4, 32), blocks=4, block_tokens=4)


@pytest.fixture
def leader(
    tiny: Callable[[str], Any], make_cache: Callable[[], SlotCache], wires: tuple[Wire, Wire]
) -> LeadingRunner:
    return LeadingRunner(tiny("llama"), make_cache(), wires[0])


# --- what goes over the wire ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        ["decode", [[1, 2], [3, 4]], {}],
        ["extend", [0, [0], [list(range(5000))]], {"all_logits": True}],
        ["x", ["y" * 8184], {}],
        [],
    ],
)
def test_a_message_arrives_as_it_was_sent(wires: tuple[Wire, Wire], message: Any) -> None:
    wires[0].tell(message)
    assert wires[1].hear() == message
    assert wires[1].frames.empty()


@pytest.mark.parametrize("length", range(8170, 8200))
def test_every_length_about_that_of_the_first_broadcast_arrives(wires: tuple[Wire, Wire], length: int) -> None:
    wires[0].tell(b"x" * length)
    assert wires[1].hear() == b"x" * length
    assert wires[1].frames.empty()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, 5),
        torch.randn(7).to(torch.bfloat16),
        torch.tensor([[True, False]]),
        torch.tensor(5),
        torch.empty(0, 3, dtype=torch.float16),
        torch.randn(60, 70).t(),
    ],
)
def test_a_tensor_arrives_bit_for_bit(wires: tuple[Wire, Wire], tensor: torch.Tensor) -> None:
    wires[0].tell({"pixels": tensor})
    found = wires[1].hear()["pixels"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)


def test_what_is_no_data_is_not_sent(wires: tuple[Wire, Wire]) -> None:
    with pytest.raises(TypeError, match="a Wire cannot be sent"):
        wires[0].tell([wires[0]])


# --- the calls ------------------------------------------------------------------------------------------------------


def test_all_that_a_runner_can_be_told_is_repeated() -> None:
    public = {name for name, _ in inspect.getmembers(Runner, inspect.isfunction) if not name.startswith("_")}
    repeated = {name for name in public if getattr(LeadingRunner, name) is not getattr(Runner, name)}
    assert repeated == public


def test_a_follower_ends_with_the_leaders_cache(
    tiny: Callable[[str], Any],
    make_cache: Callable[[], SlotCache],
    wires: tuple[Wire, Wire],
    leader: LeadingRunner,
) -> None:
    cache = make_cache()
    thread = threading.Thread(target=follow, args=(Runner(tiny("llama"), cache), wires[1]))
    thread.start()
    leader.extend(0, [0, 0], [[5, 6, 7, 8, 9], [3, 4]])
    leader.decode([11, 12], [5, 2])
    leader.store(0, [0], [2])
    leader.recall(2, [2])
    leader.extend(2, [4], [[1, 2]])
    leader.replay(1, 3, [7, 8, 9])
    leader.restride(42, 3, 6)
    leader.move(2, 0, 6)
    leader.clear(1)
    leader.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert wires[1].left
    assert wires[0].left
    assert cache.space.stride == leader.cache.space.stride == 42
    for ours, theirs in zip(cache.layers, leader.cache.layers, strict=True):
        for name in ("_key_memory", "_value_memory", "stored_keys", "stored_values"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert bool(ours.keys.any())


def test_a_call_that_failed_is_the_last_one(leader: LeadingRunner, wires: tuple[Wire, Wire]) -> None:
    with pytest.raises(OutOfStepError, match="rank 0 of 2"):
        leader.decode([1], [2, 3])
    wires[1].hear()
    with pytest.raises(OutOfStepError, match="out of step"):
        leader.clear()
    leader.close()
    assert wires[0].frames.empty()
    assert wires[0].left


def test_a_follower_that_is_gone_is_told_at_the_next_call(leader: LeadingRunner, wires: tuple[Wire, Wire]) -> None:
    wires[0].broken = True
    with pytest.raises(OutOfStepError, match="a process of this worker is gone: Connection closed by peer"):
        leader.clear()


def test_a_follower_does_nothing_that_is_no_call(
    tiny: Callable[[str], Any], make_cache: Callable[[], SlotCache], wires: tuple[Wire, Wire]
) -> None:
    wires[0].tell(["_forward", [], {}])
    with pytest.raises(KeyError, match="_forward"):
        follow(Runner(tiny("llama"), make_cache()), wires[1])


def test_nothing_is_unpickled() -> None:
    """Bytes from another process are data: an unknown kind of msgpack extension stays what it is."""
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    leader, follower = Wire(0, frames), Wire(1, frames)
    leader.tell(msgpack.ExtType(7, b"cos\nsystem\n"))
    with pytest.raises(ValueError, match="7"):
        follower.hear()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "key_heads", "size", "words"),
    [
        (9, 3, 2, "9 attention heads and 3 key/value heads divides by 3"),
        (12, 12, 5, "12 attention heads and 12 key/value heads divides by 2 or 3 or 4 or 6 or 12"),
        (8, 1, 2, "8 attention heads and 1 key/value heads cannot be divided at all"),
    ],
)
def test_heads_that_do_not_divide_are_refused(heads: int, key_heads: int, size: int, words: str) -> None:
    config = LlamaConfig(hidden_size=heads * 4, num_attention_heads=heads, num_key_value_heads=key_heads)
    with pytest.raises(EngineLoadError, match=f"--tensor-parallel {size}: a model with {words}"):
        refuse_indivisible(config, size)


def test_heads_that_divide_are_not() -> None:
    refuse_indivisible(LlamaConfig(hidden_size=36, num_attention_heads=9, num_key_value_heads=3), 3)


def test_a_model_without_a_plan_is_refused() -> None:
    with pytest.raises(EngineLoadError, match="no tensor parallel plan for gpt2 models"):
        refuse_indivisible(GPT2Config(), 2)
