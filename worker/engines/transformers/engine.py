"""The `transformers` engine: our own continuous batching over unmodified transformers models.

The parts: `loading` (and `gguf`) brings the model, `prompt` makes token ids of a request, `scheduler` decides who
runs, `batch` does a step with `runner` (forwards over the slot `cache`) and `sampling`, `sequence` turns tokens into
text and knows when to end.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ....protocol.errors import BadRequestError, TokenmqError
from ....protocol.messages import FinishReason, ModelInfo
from ..base import Done, Engine, EngineLoadError, EngineStats, Job, Output
from ..echo import check_echo
from .adapters import SEPARATOR, attach, parse
from .batch import Batch, Manner
from .cache import LayerShape
from .devices import Memory, choose_device, first_line, release_memory
from .group import Group, join
from .loading import LoadedModel, load
from .packed import pack
from .parallel import LeadingRunner, follow
from .prefix import PrefixIndex
from .preparation import Preparation, refusal, takes_long
from .prompt import PromptReader
from .resume import AUTO, CHOICES, Resume, choose_way
from .rules import RuleBook
from .runner import PROMPT_ROWS, Runner, compile_all
from .scheduler import Scheduler
from .selfcheck import check, check_images, is_steady, layer_shapes
from .sequence import Sequence
from .sizing import BLOCK_TOKENS, Wishes, choose_context, make_cache, positions
from .textstream import TextStream
from .tokentexts import TokenTexts
from .vision import Vision

_log = logging.getLogger("tokenmq.worker")

#: Rows in the batch: on a small GPU they are decoded at nearly the price of one.
SLOTS = 16
#: Tokens to prefill in a step. It bounds the time that running rows stand still for a long prompt: about as many as
#: a device computes in the time of a few decode steps.
PREFILL_TOKENS = 2048
PREFILL_TOKENS_HOST = 128


@dataclass(frozen=True, slots=True)
class _Serving:
    """What a loaded engine serves with."""

    batch: Batch
    preparation: Preparation[Sequence]
    prompts: PromptReader
    tokenizer: Tokenizer
    rules: RuleBook
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
        cache_tokens: int | None = None,
        prefix_tokens: int | None = None,
        prefill_tokens: int | None = None,
        cache_dir: str | None = None,
        resume: str = AUTO,
        compile_decode: bool = False,
        tensor_parallel: int = 1,
        adapters: Collection[str] = (),
    ) -> None:
        """Take the settings; `load` reads the model.

        Args:
            model: a folder with config and safetensors, a `.gguf` file, or a hub id.
            name: the served name; by default the last part of `model` without its extension.
            slots: most rows in the batch, 1 or more.
            device: cuda, cuda:1, mps, cpu; `auto` takes the first of them that is there.
            dtype: float32, bfloat16, float16; `auto` takes bfloat16 on cuda and float32 elsewhere.
            max_context: tokens that prompt and completion may have together; by default the model's own limit, at
                most 32,768 on cuda and 8,192 elsewhere.
            cache_tokens: tokens of the KV cache, which is allocated at load and which all rows share: as many rows
                run as fit beside one another with the length of the longest. By default 4,096 for each slot on cuda
                and 2,048 elsewhere, or what there is room for.
            prefix_tokens: tokens of the prefix store, which keeps beginnings of prompts; 0 for none. By default a
                fourth of the cache's.
            prefill_tokens: most tokens to prefill in one step; by default 2048 on cuda and 128 elsewhere.
            cache_dir: folder for converted GGUF files; by default `$TOKENMQ_CACHE/models` or
                `~/.cache/tokenmq/models`.
            resume: how to go on behind tokens of another worker: `prefill`, `replay`, or `auto`, see `resume`.
            compile_decode: put decodes and replays through torch.compile: minutes at load, then fewer and larger
                operations. Not with `tensor_parallel`.
            tensor_parallel: processes that compute the model together, of which this is one, see `group`; the one of
                rank 0 serves, the others `follow`.
            adapters: LoRA adapters as NAME=PATH; each is served as a model of its own, `name:NAME`. Not with
                `tensor_parallel` or `compile_decode`.
        """
        self.served_name = name or _name_of(model)
        self._model_source = model
        self._wishes = Wishes(slots, max_context, cache_tokens, prefix_tokens)
        self._device = device
        self._dtype = dtype
        self._prefill_tokens = prefill_tokens
        self._cache_dir = cache_dir
        self._resume = resume
        self._compile = compile_decode
        self._processes = tensor_parallel
        self._adapters = tuple(adapters)
        self._group: Group | None = None
        self._runner: Runner | None = None
        self._loaded: LoadedModel | None = None
        self._serving: _Serving | None = None
        self._memory = Memory()
        #: By served names.
        self._adapter_of: dict[str, str] = {}

    @classmethod
    def from_loaded(
        cls, model: Any, tokenizer: Any, *, name: str, processor: Any = None, **settings: Any
    ) -> TransformersEngine:
        """Make an engine of a model that is in memory already, on its device and in its dtype.

        Args:
            model: a transformers causal language model.
            tokenizer: its fast tokenizer.
            name: the served name.
            processor: of a model that looks at images, its processor.
            settings: all but `device`, `dtype` and `cache_dir`, as for the constructor.
        """
        engine = cls(model=name, name=name, **settings)
        engine._loaded = LoadedModel(model.eval(), tokenizer, processor)
        return engine

    def load(self) -> list[ModelInfo]:
        """Load the model, allocate the KV cache, and try whether the model can be served from it."""
        self._check_settings()
        sources = parse(self._adapters, self.served_name)
        if self._processes > 1 and self._group is None:
            self._group = join(choose_device(self._device), self._processes)
        given = self._loaded is not None
        if self._loaded is None:
            self._loaded = load(
                self._model_source,
                device=self._device,
                dtype=self._dtype,
                cache_dir=self._cache_dir,
                processes=self._processes,
            )
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        adapters = attach(model, sources) if sources else None
        # In float32 many rows were no faster packed, and one alone took twice as long.
        if not given and model.dtype != torch.float32:
            pack(model)
        if not tokenizer.is_fast:
            raise EngineLoadError(f"{self.served_name}: its tokenizer has no fast version, which streaming needs")
        device: torch.device = model.device
        if device.type == "cpu":
            # transformers repeats keys and values for each query head unless it is told not to; the CPU's masked
            # kernel takes them as they are, four to ten times as fast. CUDA's would fall back to plain arithmetic.
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        budget = self._prefill_tokens or (PREFILL_TOKENS if device.type == "cuda" else PREFILL_TOKENS_HOST)
        way = choose_way(self._resume, device, model.dtype)
        _log.info("%s: a stream of another worker is resumed by %s", self.served_name, way.value)
        # In half precision on a CPU a prompt's keys and values depend on the other rows of its forward, while a
        # decode's do not. Where a replay is to be exact, prompts are cut at the same places with a prefix found or
        # without, and go alone unless short ones are found to get the same bits in company: then the whole stream
        # is independent of it.
        steady = device.type == "cpu" and model.dtype != torch.float32 and way is Resume.REPLAY
        block_tokens = budget if steady else min(BLOCK_TOKENS, budget)
        limit = positions(model.config.get_text_config())
        context = choose_context(self._wishes, limit, device, self.served_name)
        agree = int if self._group is None else self._group.least  # what all processes of the worker can do
        cache, blocks = make_cache(
            self._wishes,
            self._shapes(model, context),
            context,
            block_tokens,
            self.served_name,
            agree=agree,
        )
        runner = Runner(model, cache, compile_decode=self._compile, adapters=adapters, steady=steady)
        self._memory = Memory(device)
        processor = self._loaded.processor
        if processor is not None and processor.chat_template is not None:
            tokenizer.chat_template = processor.chat_template  # the tokenizer's own may know text only
        vision = None if processor is None else Vision(processor, model, self.served_name)
        try:
            check(model, runner)
            compile_all(runner)
            runner.steady = bool(agree(int(steady and is_steady(runner))))
            if vision is not None:
                check_images(model, runner, vision)
        except EngineLoadError:
            raise
        except Exception as error:
            raise EngineLoadError(
                f"{type(model).__name__} does not run over this engine's KV cache: {first_line(error)}"
            ) from error
        if self._group is not None and self._group.rank == 0:
            runner = LeadingRunner(model, cache, self._group, steady=runner.steady)
        self._runner = runner
        prefixes = PrefixIndex(blocks, block_tokens) if blocks else None
        texts = TokenTexts(tokenizer.backend_tokenizer)
        manner = Manner(
            device,
            group_rows=(PROMPT_ROWS if runner.steady else 0) if steady else None,
            keeps_decoded=not steady,
            ahead=device.type == "cuda",
            replay=way is Resume.REPLAY,
        )
        batch = Batch(runner, Scheduler(cache.space, budget, prefixes), prefixes, texts, manner)
        end_ids = _end_ids(model, tokenizer)
        self._serving = _Serving(
            batch=batch,
            preparation=Preparation(self._sequence, self.wake),
            prompts=PromptReader(tokenizer, self.served_name, runner.vocabulary, context, vision),
            tokenizer=tokenizer.backend_tokenizer,
            rules=RuleBook(tokenizer, runner.vocabulary, end_ids),
            end_ids=end_ids,
            context=context,
            way=way,
        )
        chat = tokenizer.chat_template is not None
        sees = vision is not None
        self._adapter_of = {self.served_name: ""}
        self._adapter_of |= {f"{self.served_name}{SEPARATOR}{source.name}": source.name for source in sources}
        return [
            ModelInfo(name, context_tokens=context, chat=chat, resumes=True, images=sees) for name in self._adapter_of
        ]

    def follow(self) -> None:
        """Load this process's part of the model, and compute it until the process of rank 0 closes its engine.

        Raises:
            EngineLoadError: as `load`.
            Exception: this process, or the one of rank 0, failed; of many kinds.
        """
        self.load()
        if self._runner is not None and self._group is not None:
            follow(self._runner, self._group)

    def submit(self, job: Job) -> list[Output]:
        """Queue a job, or answer with one Failed when it cannot run, or with the end of a prior that is complete.

        One that takes long to read is read in another thread, where a worker can be woken when that is done.
        """
        serving = self._ready()
        if self.wake is not Engine.wake and takes_long(job):
            serving.preparation.put(job)
            return []
        try:
            read: Sequence | BaseException = self._sequence(job)
        except TokenmqError as error:
            read = error
        return self._enter(serving, job, read)

    def cancel(self, ticket: int) -> list[Output]:
        """End a job at once and free its row."""
        serving = self._ready()
        if serving.preparation.drop(ticket):
            return [Done(ticket, FinishReason.CANCELLED, 0, 0)]
        return serving.batch.cancel(ticket)

    def step(self) -> list[Output]:
        """Advance every running row by a token; let waiting ones join."""
        serving = self._ready()
        outputs: list[Output] = []
        for job, read, came_at in serving.preparation.take():
            if isinstance(read, Sequence):
                read.submitted_at = came_at
            outputs += self._enter(serving, job, read)
        if serving.batch.busy:
            outputs += serving.batch.step()
        return outputs

    def next_step_in(self) -> float | None:
        """Return 0 while there are jobs that are not being read, else None."""
        serving = self._serving
        return 0.0 if serving is not None and (serving.batch.busy or serving.preparation.ready) else None

    def resize(self, slots: int) -> int:
        """Run as many as asked for, and no more than the cache was allocated for."""
        return self._ready().batch.scheduler.resize(slots)

    def reset(self) -> None:
        """Drop all jobs."""
        self._ready().preparation.clear()
        self._ready().batch.reset()

    def stats(self) -> EngineStats:
        """Return rows in the batch (one in prefill counts), jobs without a row, and the use of the cache."""
        if self._serving is None:
            return EngineStats()
        batch = self._serving.batch
        spent, scheduler = batch.spent, batch.scheduler
        used, there = self._memory()
        return EngineStats(
            len(scheduler.rows),
            len(scheduler.waiting) + len(self._serving.preparation),
            batch.kv_use(),
            prefill_s=spent.prefill_s,
            decode_s=spent.decode_s,
            prompt_tokens=spent.prompt_tokens,
            cached_tokens=spent.cached_tokens,
            memory_used_bytes=used,
            memory_bytes=there,
        )

    def validate(self) -> None:
        """Check the invariants that hold between steps; for tests.

        Raises:
            AssertionError: one does not.
        """
        self._ready().batch.scheduler.validate()

    def close(self) -> None:
        """Free the model and the cache; let the other processes end."""
        if isinstance(self._runner, LeadingRunner):
            self._runner.close()
        self._runner = None
        if self._serving is not None:
            self._serving.preparation.close()
            self._serving.rules.close()
        if self._loaded is not None:
            device = self._loaded.model.device
            self._loaded = self._serving = None
            release_memory(device)

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise RuntimeError("the engine is not loaded: call load first")
        return self._serving

    def _sequence(self, job: Job) -> Sequence:
        """Read a job; in the engine's thread or in that of the preparation.

        Raises:
            BadRequestError: it cannot run.
        """
        began = time.monotonic()
        serving, generation = self._ready(), job.generation
        sampling = generation.sampling
        if generation.texts is not None:
            raise BadRequestError(f"model {self.served_name!r} generates: give it a prompt, not texts to embed")
        given = serving.prompts.read(generation, job.attachments)
        check_echo(generation, len(given.token_ids))
        own_end = frozenset() if sampling.ignore_eos else serving.end_ids
        end_ids = own_end | frozenset(sampling.stop_token_ids)
        return Sequence(
            ticket=job.ticket,
            given=given,
            sampling=sampling,
            end_ids=end_ids,
            context=serving.context,
            text=TextStream(serving.tokenizer, sampling.stop),
            submitted_at=began,
            priority=job.priority,
            adapter=self._adapter_of.get(job.model, ""),
            rules=serving.rules.make(sampling, end_ids),
            echo=generation.echo,
        )

    @staticmethod
    def _enter(serving: _Serving, job: Job, read: Sequence | BaseException) -> list[Output]:
        """Queue a job that was read, or say why it cannot run; return what `submit` does."""
        if isinstance(read, BaseException):
            return [refusal(job, read)]
        prior = job.generation.prior
        if prior is not None:
            try:
                serving.prompts.known(prior.token_ids)
                ended = read.resume(prior, replay=serving.way is Resume.REPLAY)
            except TokenmqError as error:
                return [refusal(job, error)]
            if ended:
                return ended
        serving.batch.scheduler.add(read)
        return []

    def _check_settings(self) -> None:
        self._wishes.check()
        if self._compile and self._processes > 1:
            raise EngineLoadError(
                "compile_decode does not go with tensor_parallel: its parts cannot be compiled apart"
            )
        if self._adapters and (self._compile or self._processes > 1):
            other = "compile_decode" if self._compile else "tensor_parallel"
            raise EngineLoadError(f"adapters do not go with {other}: serve the model without one of them")
        if self._resume not in CHOICES:
            raise EngineLoadError(f"resume must be one of {', '.join(CHOICES)}, not {self._resume!r}")
        if self._prefill_tokens is not None and self._prefill_tokens < 1:
            raise EngineLoadError(f"prefill_tokens must be 1 or more, not {self._prefill_tokens}")

    def _shapes(self, model: Any, context: int) -> list[LayerShape]:
        try:
            return layer_shapes(model, context)
        except EngineLoadError:
            raise
        except Exception as error:
            raise EngineLoadError(f"{type(model).__name__} cannot be served: {first_line(error)}") from error


def _name_of(model: str | os.PathLike[str]) -> str:
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.name


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a completion, by the generation config, the config and the tokenizer."""
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        given = getattr(source, "eos_token_id", None)
        if given is not None:
            ids.update([given] if isinstance(given, int) else given)
    return frozenset(ids)
