"""The `embeddings` engine: vectors of texts, from any encoder or decoder of transformers, batched over all requests.

The parts: `loading` brings the model, `sentence` reads how it makes a vector, `embedding_queue` decides which texts
go into a forward together, `encoder` does it with `pooling`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from transformers import AutoModel

from ....protocol.errors import BadRequestError, ErrorCode, TokenmqError
from ....protocol.messages import Details, FinishReason, ModelInfo
from ..base import Done, Engine, EngineLoadError, EngineStats, Failed, Job, Output, Tokens
from .devices import Memory, first_line, is_out_of_memory, release_memory
from .embedding_queue import EmbeddingQueue, Text, TextsJob
from .embedding_texts import TextReader
from .encoder import Encoder
from .loading import LoadedModel, load
from .preparation import Preparation, refusal, takes_long
from .sentence import Recipe, read_recipe, resolved

_log = logging.getLogger("tokenmq.worker")

#: Requests whose texts share the forwards.
SLOTS = 64
#: Padded tokens of a forward. A CPU is busy with some hundred; more would only make a cancelled request and one that
#: has just come wait longer for the end of the step.
STEP_TOKENS = 16_384
STEP_TOKENS_HOST = 1024
#: Tokens of a text where neither the model nor its tokenizer sets a bound.
MAX_UNBOUNDED = 8192
#: What a text came to: its vector, or an end of its request.
_Result: TypeAlias = bytes | Failed
#: The token ids of a request's texts.
_Ids: TypeAlias = tuple[tuple[int, ...], ...]


class EmbeddingEngine(Engine):
    """Serves one embedding model."""

    name = "embeddings"

    def __init__(
        self,
        *,
        model: str | os.PathLike[str],
        name: str | None = None,
        slots: int = SLOTS,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int | None = None,
        step_tokens: int | None = None,
    ) -> None:
        """Take the settings; `load` reads the model.

        Args:
            model: a folder with config and safetensors, or a hub id.
            name: the served name; by default the last part of `model`.
            slots: most requests whose texts share the forwards, 1 or more.
            device: cuda, cuda:1, mps, cpu; `auto` takes the first of them that is there.
            dtype: float32, bfloat16, float16; `auto` takes bfloat16 on cuda and float32 elsewhere. Vectors are
                float32 in any case.
            max_context: tokens that one text may have; by default what the model's files say.
            step_tokens: most tokens of a forward, padding included; by default 16,384 on cuda and 1024 elsewhere.
        """
        self.served_name = name or os.path.basename(os.fspath(model).rstrip("/"))
        self._source = os.fspath(model)
        self._slots = slots
        self._device = device
        self._dtype = dtype
        self._max_context = max_context
        self._step_tokens = step_tokens
        self._recipe: Recipe | None = None
        self._loaded: LoadedModel | None = None
        self._encoder: Encoder | None = None
        self._texts: TextReader | None = None
        self._queue = EmbeddingQueue(1, 1)
        self._preparation = Preparation(self._read, self._wake_up)
        self._prompt_tokens = 0
        self._busy_s = 0.0
        self._memory = Memory()

    @classmethod
    def from_loaded(
        cls, model: Any, tokenizer: Any, *, name: str, recipe: Recipe | None = None, **settings: Any
    ) -> EmbeddingEngine:
        """Make an engine of a model that is in memory already, on its device and in its dtype.

        Args:
            model: a transformers model without a head.
            tokenizer: its fast tokenizer.
            name: the served name.
            recipe: how it makes vectors.
            settings: `slots`, `max_context`, `step_tokens` as for the constructor.
        """
        engine = cls(model=name, name=name, **settings)
        engine._loaded = LoadedModel(model.eval(), tokenizer)
        engine._recipe = recipe or Recipe()
        return engine

    def load(self) -> list[ModelInfo]:
        """Load the model, and try whether a text's vector is independent of its company."""
        self._check_settings()
        recipe = self._read_recipe()
        if self._loaded is None:
            self._loaded = load(
                resolved(self._source, recipe), device=self._device, dtype=self._dtype, cache_dir=None, kind=AutoModel
            )
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        self._texts = TextReader(tokenizer, self.served_name, recipe)
        pad = tokenizer.pad_token_id
        try:
            encoder = Encoder(model, recipe, pad_id=0 if pad is None else pad, skip=self._texts.skip)
            encoder.check()
        except EngineLoadError:
            raise
        except Exception as error:
            raise EngineLoadError(f"{type(model).__name__} does not embed: {first_line(error)}") from error
        self._texts.limit = self._limit(recipe, encoder.limit, tokenizer.model_max_length)
        self._encoder = encoder
        self._memory = Memory(encoder.device)
        default = STEP_TOKENS if encoder.device.type == "cuda" else STEP_TOKENS_HOST
        self._queue = EmbeddingQueue(self._slots, self._step_tokens or default)
        _log.info(
            "%s: vectors of %d numbers, pooling %s%s, texts up to %d tokens on %s%s%s",
            self.served_name, encoder.width, " and ".join(encoder.modes),
            "".join(f", then {type(module).__name__}" for module in recipe.then), self._texts.limit, encoder.device,
            f"; put before each text: {recipe.prompt!r}" if recipe.prompt else "",
            f"; prompts that it knows: {dict(recipe.prompts)}" if recipe.prompts else "",
        )  # fmt: skip
        return [ModelInfo(self.served_name, context_tokens=self._texts.limit, generates=False, embeds=True)]

    def submit(self, job: Job) -> list[Output]:
        """Queue a request's texts, or answer with one Failed when it cannot run.

        Many or long ones are tokenised in another thread, where a worker can be woken when that is done.
        """
        self._ready()
        came_at = time.monotonic()
        if self.wake is not Engine.wake and takes_long(job):
            self._preparation.put(job)
            return []
        try:
            read: _Ids | BaseException = self._read(job)
        except TokenmqError as error:
            read = error
        return self._enter(job, read, came_at)

    def cancel(self, ticket: int) -> list[Output]:
        """End a job at once; what it has been given stands."""
        if self._preparation.drop(ticket):
            return [Done(ticket, FinishReason.CANCELLED, 0, 0)]
        job = self._queue.find(ticket)
        if job is None:
            return []
        self._queue.remove(job)
        return [self._done(job, FinishReason.CANCELLED)]

    def step(self) -> list[Output]:
        """Do one forward; give what is done."""
        encoder, _ = self._ready()
        began = time.monotonic()
        outputs: list[Output] = []
        for ready, read, came_at in self._preparation.take():
            outputs += self._enter(ready, read, came_at)
        texts = self._queue.take()
        for text in texts:
            if text.job.begun_at is None:
                text.job.begun_at = began
                self._prompt_tokens += text.job.prompt_tokens
        failed: set[int] = set()
        for text, result in zip(texts, self._embed(encoder, texts), strict=True):
            job = text.job
            if job.ticket in failed:
                continue
            if isinstance(result, Failed):
                failed.add(job.ticket)
                self._queue.remove(job)
                outputs.append(result)
                continue
            outputs.append(Tokens(job.ticket, (), "", text.number, Details(vector=result)))
            job.left -= 1
            if not job.left:
                self._queue.remove(job)
                outputs.append(self._done(job, FinishReason.STOP))
        self._busy_s += time.monotonic() - began
        return outputs

    def next_step_in(self) -> float | None:
        """Return 0 while there are jobs that are not being read, else None."""
        return 0.0 if self._queue.running or self._queue.waiting or self._preparation.ready else None

    def resize(self, slots: int) -> int:
        """Let as many requests share the forwards as asked for."""
        self._queue.slots = slots
        return slots

    def reset(self) -> None:
        """Drop all jobs."""
        self._preparation.clear()
        self._queue.clear()

    def stats(self) -> EngineStats:
        """Return how many requests have texts in the forwards, how many wait for that, and what was done so far."""
        used, there = self._memory()
        return EngineStats(
            running=len(self._queue.running),
            waiting=len(self._queue.waiting) + len(self._preparation),
            prefill_s=self._busy_s,
            prompt_tokens=self._prompt_tokens,
            memory_used_bytes=used,
            memory_bytes=there,
        )

    def validate(self) -> None:
        """Check the invariants that hold between steps; for tests.

        Raises:
            AssertionError: one does not.
        """
        self._queue.validate()

    def close(self) -> None:
        """Free the model."""
        self._preparation.close()
        if self._loaded is not None:
            device = self._loaded.model.device
            self._loaded = self._encoder = self._texts = None
            release_memory(device)

    def _wake_up(self) -> None:
        self.wake()  # by then the worker has put its own there

    def _read(self, job: Job) -> _Ids:
        """Tokenise a request's texts; in the engine's thread or in that of the preparation.

        Raises:
            BadRequestError: it cannot run.
        """
        if job.generation.texts is None:
            raise BadRequestError(
                f"model {self.served_name!r} embeds texts and generates none: send texts, or ask another model"
            )
        if job.attachments:
            raise BadRequestError(f"model {self.served_name!r} embeds texts only, no attachments")
        return self._ready()[1].read(job.generation.texts)

    def _enter(self, job: Job, read: _Ids | BaseException, came_at: float) -> list[Output]:
        """Queue a request that was read, or say why it cannot run."""
        if isinstance(read, BaseException):
            return [refusal(job, read)]
        self._queue.add(TextsJob(job.ticket, job.priority, read, came_at))
        return []

    def _ready(self) -> tuple[Encoder, TextReader]:
        if self._encoder is None or self._texts is None:
            raise RuntimeError("the engine is not loaded: call load first")
        return self._encoder, self._texts

    def _embed(self, encoder: Encoder, texts: Sequence[Text]) -> list[_Result]:
        """Return what each text came to. A forward that fails is tried again in halves: what one text does to it, or
        the size of all, costs nobody else his vector."""
        if not texts:
            return []
        try:
            vectors = encoder.vectors([text.ids for text in texts])
        except Exception as error:  # noqa: BLE001 (the model's and the device's, of many kinds: told to whom they befell)
            if is_out_of_memory(error):
                self._shrink(encoder.device, texts)
            if len(texts) == 1:
                return [self._failed(texts[0], error)]
            problem = first_line(error)
        else:
            return self._results(texts, vectors)
        # Outside of the handler, whose error would keep the forward's tensors alive.
        _log.warning("%s: %d texts together failed, in halves again: %s", self.served_name, len(texts), problem)
        middle = len(texts) // 2
        return [*self._embed(encoder, texts[:middle]), *self._embed(encoder, texts[middle:])]

    def _results(self, texts: Sequence[Text], vectors: torch.Tensor) -> list[_Result]:
        sound = torch.isfinite(vectors).all(1).tolist()
        rows = vectors.numpy().astype("<f4", copy=False)
        return [
            row.tobytes() if fine else self._failed(text, ArithmeticError("the model gave no numbers (NaN)"))
            for text, row, fine in zip(texts, rows, sound, strict=True)
        ]

    def _shrink(self, device: torch.device, texts: Sequence[Text]) -> None:
        """Let steps be half as large as the one that had no memory, from now on."""
        release_memory(device)
        tokens = len(texts) * max(len(text.ids) for text in texts)
        if len(texts) > 1 and tokens // 2 < self._queue.budget:
            self._queue.budget = max(1, tokens // 2)
            _log.warning(
                "%s: no memory for a step of %d tokens; %d from now on", self.served_name, tokens, tokens // 2
            )

    def _failed(self, text: Text, error: Exception) -> Failed:
        what = f"text {text.number} of {len(text.ids)} tokens"
        if is_out_of_memory(error):
            message = f"no memory on the device for {what}"
            return Failed(text.job.ticket, ErrorCode.OUT_OF_MEMORY.value, message, retryable=True)
        return Failed(text.job.ticket, ErrorCode.ENGINE_FAILED.value, f"{what}: {first_line(error)}")

    def _done(self, job: TextsJob, reason: FinishReason) -> Done:
        now = time.monotonic()
        begun = now if job.begun_at is None else job.begun_at
        return Done(job.ticket, reason, job.prompt_tokens, 0, queue_s=begun - job.submitted_at, prefill_s=now - begun)

    def _read_recipe(self) -> Recipe:
        if self._recipe is not None:
            return self._recipe
        if self._source.endswith(".gguf"):
            raise EngineLoadError(f"{self._source}: texts are embedded by models of safetensors, not by GGUF files")
        try:
            return read_recipe(self._source)
        except EngineLoadError:
            raise
        except Exception as error:
            raise EngineLoadError(
                f"{self._source}: what it says of its embeddings is damaged: {first_line(error)}"
            ) from error

    def _limit(self, recipe: Recipe, positions: int | None, tokenizer_limit: int) -> int:
        if self._max_context is not None:
            if positions is not None and self._max_context > positions:
                raise EngineLoadError(
                    f"max_context={self._max_context}, but {self.served_name} has {positions} positions"
                )
            return self._max_context
        wish = recipe.max_tokens or tokenizer_limit  # the latter is astronomical where the tokenizer has no limit
        if positions is None and wish > MAX_UNBOUNDED:
            return MAX_UNBOUNDED
        return wish if positions is None else min(wish, positions)

    def _check_settings(self) -> None:
        for what, value in (
            ("slots", self._slots), ("max_context", self._max_context), ("step_tokens", self._step_tokens),
        ):  # fmt: skip
            if value is not None and value < 1:
                raise EngineLoadError(f"{what} must be 1 or more, not {value}")
