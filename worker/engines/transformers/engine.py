"""The `transformers` engine: our own continuous batching over unmodified transformers models.

The parts: `loading` (and `gguf`) brings the model, `prompt` makes token ids of a request, `scheduler` decides who
runs, `batch` does a step with `runner` (forwards over the slot `cache`) and `sampling`, `sequence` turns tokens into
text and knows when to end.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ....protocol.errors import BadRequestError, CannotResumeError
from ....protocol.messages import ModelInfo
from ....protocol.payload import Generation
from ..base import Engine, EngineLoadError, EngineStats, Failed, Job, Output
from .batch import Batch
from .cache import LayerShape, SlotCache
from .devices import first_line, is_out_of_memory, release_memory
from .loading import LoadedModel, load
from .prompt import PromptReader
from .resume import AUTO, CHOICES, Resume, choose_way
from .runner import Runner
from .selfcheck import TOKENS as MIN_CONTEXT
from .selfcheck import check, layer_shapes
from .sequence import Sequence
from .textstream import TextStream

_log = logging.getLogger("tokenmq.worker")

#: Rows in the batch: on a small GPU they are decoded at nearly the price of one.
SLOTS = 16
#: Tokens a row may have where the user does not say, at most. Each slot's are allocated at load, so the model's own
#: limit (131,072 is common) would not fit.
MAX_CONTEXT = 4096
MAX_CONTEXT_HOST = 2048
#: Tokens to prefill in a step. It bounds the time that running rows stand still for a long prompt: about as many as
#: a device computes in the time of a few decode steps.
PREFILL_TOKENS = 2048
PREFILL_TOKENS_HOST = 128


@dataclass(frozen=True, slots=True)
class _Serving:
    """What a loaded engine serves with."""

    batch: Batch
    prompts: PromptReader
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    context: int
    way: Resume


class TransformersEngine(Engine):
    """Serves one decoder-only language model."""

    name = "transformers"

    def __init__(
        self,
        *,
        model: str | os.PathLike[str],
        name: str | None = None,
        slots: int = SLOTS,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int | None = None,
        prefill_tokens: int | None = None,
        cache_dir: str | None = None,
        resume: str = AUTO,
    ) -> None:
        """Take the settings; `load` reads the model.

        Args:
            model: a folder with config and safetensors, a `.gguf` file, or a hub id.
            name: the served name; by default the last part of `model` without its extension.
            slots: most rows in the batch, 1 or more.
            device: cuda, cuda:1, mps, cpu; `auto` takes the first of them that is there.
            dtype: float32, bfloat16, float16; `auto` takes bfloat16 on cuda and float32 elsewhere.
            max_context: tokens that prompt and completion may have together; by default the model's own limit, at
                most 4096 on cuda and 2048 elsewhere. The cache for all slots is allocated at load.
            prefill_tokens: most tokens to prefill in one step; by default 2048 on cuda and 128 elsewhere.
            cache_dir: folder for converted GGUF files; by default `$TOKENMQ_CACHE/models` or
                `~/.cache/tokenmq/models`.
            resume: how to go on behind tokens of another worker: `prefill`, `replay`, or `auto`, see `resume`.
        """
        self.served_name = name or _name_of(model)
        self._model_source = model
        self._slots = slots
        self._device = device
        self._dtype = dtype
        self._max_context = max_context
        self._prefill_tokens = prefill_tokens
        self._cache_dir = cache_dir
        self._resume = resume
        self._loaded: LoadedModel | None = None
        self._serving: _Serving | None = None

    @classmethod
    def from_loaded(cls, model: Any, tokenizer: Any, *, name: str, **settings: Any) -> TransformersEngine:
        """Make an engine of a model that is in memory already, on its device and in its dtype.

        Args:
            model: a transformers causal language model.
            tokenizer: its fast tokenizer.
            name: the served name.
            settings: `slots`, `max_context`, `prefill_tokens`, `resume` as for the constructor.
        """
        engine = cls(model=name, name=name, **settings)
        engine._loaded = LoadedModel(model.eval(), tokenizer)
        return engine

    def load(self) -> list[ModelInfo]:
        """Load the model, allocate the KV cache, and try whether the model can be served from it."""
        self._check_settings()
        if self._loaded is None:
            self._loaded = load(self._model_source, device=self._device, dtype=self._dtype, cache_dir=self._cache_dir)
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        if not tokenizer.is_fast:
            raise EngineLoadError(f"{self.served_name}: its tokenizer has no fast version, which streaming needs")
        context = self._context(model)
        runner = Runner(model, self._allocate(model, context))
        try:
            check(model, runner)
        except EngineLoadError:
            raise
        except Exception as error:
            raise EngineLoadError(
                f"{type(model).__name__} does not run over this engine's KV cache: {first_line(error)}"
            ) from error
        device: torch.device = model.device
        batch = Batch(
            runner,
            self._prefill_tokens or (PREFILL_TOKENS if device.type == "cuda" else PREFILL_TOKENS_HOST),
            device=device,
            # In half precision on a CPU a prompt's keys and values depend on the other rows of its forward, while a
            # decode's do not: prompts that go alone make the whole stream independent of its company.
            grouped=device.type != "cpu" or model.dtype == torch.float32,
        )
        way = choose_way(self._resume, device, model.dtype)
        _log.info("%s: a stream of another worker is resumed by %s", self.served_name, way.value)
        self._serving = _Serving(
            batch=batch,
            prompts=PromptReader(tokenizer, self.served_name, runner.vocabulary, context),
            tokenizer=tokenizer.backend_tokenizer,
            end_ids=_end_ids(model, tokenizer),
            context=context,
            way=way,
        )
        chat = tokenizer.chat_template is not None
        return [ModelInfo(self.served_name, context_tokens=context, chat=chat, resumes=True)]

    def submit(self, job: Job) -> list[Output]:
        """Queue a job, or answer with one Failed when it cannot run, or with the end of a prior that is complete."""
        serving, generation = self._ready(), job.generation
        try:
            if job.attachments:
                raise BadRequestError(f"model {self.served_name!r} takes text only, no attachments")
            sequence = self._sequence(serving, job.ticket, generation)
            if generation.prior is not None:
                serving.prompts.known(generation.prior.token_ids)
                ended = sequence.resume(generation.prior, replay=serving.way is Resume.REPLAY)
                if ended:
                    return ended
        except (BadRequestError, CannotResumeError) as error:
            return [Failed(job.ticket, error.code, error.message, error.retryable)]
        serving.batch.scheduler.add(sequence)
        return []

    def cancel(self, ticket: int) -> list[Output]:
        """End a job at once and free its row."""
        return self._ready().batch.cancel(ticket)

    def step(self) -> list[Output]:
        """Advance every running row by a token; let waiting ones join."""
        return self._ready().batch.step()

    def next_step_in(self) -> float | None:
        """Return 0 while there are jobs, else None."""
        stats = self.stats()
        return 0.0 if stats.running or stats.waiting else None

    def resize(self, slots: int) -> int:
        """Run as many as asked for, and no more than the cache was allocated for."""
        return self._ready().batch.scheduler.resize(slots)

    def reset(self) -> None:
        """Drop all jobs."""
        self._ready().batch.reset()

    def stats(self) -> EngineStats:
        """Return rows in the batch (one in prefill counts), jobs without a row, and the use of the cache."""
        if self._serving is None:
            return EngineStats()
        batch = self._serving.batch
        running = len(batch.scheduler.running) + (batch.scheduler.partial is not None)
        return EngineStats(running, len(batch.scheduler.waiting), batch.kv_use())

    def validate(self) -> None:
        """Check the invariants that hold between steps; for tests.

        Raises:
            AssertionError: one does not.
        """
        self._ready().batch.scheduler.validate()

    def close(self) -> None:
        """Free the model and the cache."""
        if self._loaded is not None:
            device = self._loaded.model.device
            self._loaded = self._serving = None
            release_memory(device)

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise RuntimeError("the engine is not loaded: call load first")
        return self._serving

    def _sequence(self, serving: _Serving, ticket: int, generation: Generation) -> Sequence:
        sampling = generation.sampling
        own_end = frozenset() if sampling.ignore_eos else serving.end_ids
        return Sequence(
            ticket=ticket,
            prompt=serving.prompts.read(generation),
            sampling=sampling,
            end_ids=own_end | frozenset(sampling.stop_token_ids),
            context=serving.context,
            text=TextStream(serving.tokenizer, sampling.stop),
            submitted_at=time.monotonic(),
        )

    def _check_settings(self) -> None:
        if self._slots < 1:
            raise EngineLoadError(f"slots must be 1 or more, not {self._slots}")
        if self._resume not in CHOICES:
            raise EngineLoadError(f"resume must be one of {', '.join(CHOICES)}, not {self._resume!r}")
        if self._prefill_tokens is not None and self._prefill_tokens < 1:
            raise EngineLoadError(f"prefill_tokens must be 1 or more, not {self._prefill_tokens}")
        if self._max_context is not None and self._max_context < MIN_CONTEXT:
            raise EngineLoadError(f"max_context must be {MIN_CONTEXT} or more, not {self._max_context}")

    def _context(self, model: Any) -> int:
        config = model.config.get_text_config()
        limit: int | None = getattr(config, "max_position_embeddings", None)
        if self._max_context is not None:
            if limit is not None and self._max_context > limit:
                raise EngineLoadError(
                    f"max_context={self._max_context}, but {self.served_name} has {limit} positions"
                )
            return self._max_context
        default = MAX_CONTEXT if model.device.type == "cuda" else MAX_CONTEXT_HOST
        return default if limit is None else min(limit, default)

    def _allocate(self, model: Any, context: int) -> SlotCache:
        try:
            shapes = layer_shapes(model, context)
        except EngineLoadError:
            raise
        except Exception as error:
            raise EngineLoadError(f"{type(model).__name__} cannot be served: {first_line(error)}") from error
        size = self._slots * context * sum(shape.token_bytes for shape in shapes)
        what = f"a KV cache of {size:,} bytes ({self._slots} slots of {context} tokens)"
        too_much = (
            f"{self.served_name}: no memory for {what} on {model.device}; give fewer slots or a smaller max_context"
        )
        if model.device.type == "cpu" and size > _host_memory():
            raise EngineLoadError(too_much)  # the system would promise it and kill us on the way
        try:
            cache = SlotCache(shapes, self._slots, context)
        except Exception as error:
            if is_out_of_memory(error):
                raise EngineLoadError(too_much) from error
            raise
        _log.info("%s: %s on %s, %s", self.served_name, what, model.device, _dtype_name(shapes))
        return cache


def _name_of(model: str | os.PathLike[str]) -> str:
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name


def _dtype_name(shapes: list[LayerShape]) -> str:
    return str(shapes[0].dtype).removeprefix("torch.")


def _host_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a completion, by the generation config, the config and the tokenizer."""
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        given = getattr(source, "eos_token_id", None)
        if given is not None:
            ids.update([given] if isinstance(given, int) else given)
    return frozenset(ids)
