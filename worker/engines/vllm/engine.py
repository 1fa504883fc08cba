"""The `vllm` engine: streams from vLLM's AsyncLLM, which runs in this process and its core in processes below.

It does not resume. vLLM draws a stream's noise from a generator that begins anew with each request, and takes the
tokens so far only as a part of the prompt: penalties of the completion, stop strings, a grammar, min_tokens would
begin anew with it. Nor is the greedy stream exact, since vLLM computes in bfloat16 as a rule, and a prefill rounds
otherwise than the decode that was lost. So a request whose worker died goes on elsewhere only while its reader has
nothing of it; else the client is told that it cannot be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Mapping, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

# Read by vLLM when it is imported, here and in its children: it would log to standard output, a page at each start,
# and send statistics of its use to its makers.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from ....protocol.errors import BadRequestError, BusyError, EngineFailedError
from ....protocol.limits import MAX_PRIORITY
from ....protocol.messages import ModelInfo
from ..base import EngineLoadError, EngineStats, Failed, Job, Output, Tokens
from ..bridge import AsyncEngine, Call
from ..echo import check_echo
from . import lifeline
from .options import choose_device, engine_arguments, parse_options
from .output import REASONS, Figures, details
from .request import render, sampling_params

#: Requests that run at a time: on a device that decodes many rows at the price of one, vLLM's strength.
SLOTS = 16
#: How soon the end of vLLM's core is noticed while there are no requests.
_HEALTH_S = 1.0
#: vLLM's core gets so long to end by itself; less than the worker waits for its engine.
_SHUTDOWN_S = 1.0
_OWN_CODE = (
    "it needs Python code from its own files, which is not run unless you say so: if you trust who wrote it, give "
    "--engine-option trust_remote_code=true"
)
_DEAD = "vLLM's engine core has ended; what it has logged tells why"


class VllmEngine(AsyncEngine):
    """Serves one model that vLLM can load."""

    name = "vllm"

    def __init__(
        self,
        *,
        model: str | os.PathLike[str],
        name: str | None = None,
        slots: int = SLOTS,
        device: str = "auto",
        dtype: str = "auto",
        max_context: int | None = None,
        options: Sequence[str] | Mapping[str, Any] = (),
    ) -> None:
        """Take the settings; `load` starts vLLM.

        Args:
            model: a folder with config, tokenizer and safetensors, or a hub id.
            name: the served name; by default the last part of `model`.
            slots: most requests in the batch (max_num_seqs), 1 or more.
            device: of the kind that vLLM is built for, such as cuda:1; `auto` for the first one.
            dtype: float32, bfloat16, float16; `auto` takes what vLLM takes for the model.
            max_context: tokens that prompt and completion may have together (max_model_len); by default the model's
                own limit, or what the KV cache has room for.
            options: further arguments of vLLM's AsyncEngineArgs, or as KEY=VALUE, such as
                `kv_cache_memory_bytes=2147483648` or `tensor_parallel_size=2`. They go before what is said above.

        Raises:
            EngineLoadError: an option is not of that form.
        """
        super().__init__()
        self.served_name = name or Path(model).name
        self._model = model
        self._slots = slots
        self._device = device
        self._dtype = dtype
        self._max_context = max_context
        self._options = dict(options) if isinstance(options, Mapping) else parse_options(options)
        self._llm: Any = None
        self._info = ModelInfo(self.served_name)
        self._figures = Figures()
        self._watch: asyncio.Task[None] | None = None
        self._dead = False
        self._prompt_tokens = 0
        self._cached_tokens = 0

    # --- the loop's thread ------------------------------------------------------------------------------------------

    async def open(self) -> Sequence[ModelInfo]:
        """Start vLLM; takes half a minute and more, and minutes the first time that vLLM compiles the model."""
        choose_device(self._device)
        arguments = engine_arguments(
            self._model,
            slots=self._slots,
            dtype=self._dtype,
            max_context=self._max_context,
            options=self._options,
        )
        lifeline.arm()
        # The children inherit it: Ctrl-C goes to them, too, and they would drop what the worker lets end first. The
        # tracker's start would lift it again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**arguments), stat_loggers=[lambda _config, _index: self._figures]
            )
        except Exception as error:
            if "trust_remote_code" in str(error) and not arguments.get("trust_remote_code"):
                raise EngineLoadError(f"{self.served_name}: {_OWN_CODE}") from error
            raise EngineLoadError(f"vLLM does not start with {self.served_name}: {_reason(error)}") from error
        if "generate" not in await self._llm.get_supported_tasks():
            raise EngineLoadError(f"{self.served_name}: vLLM generates no text with this model")
        self._watch = asyncio.create_task(self._watch_core())
        config = self._llm.model_config
        self._info = ModelInfo(
            self.served_name,
            context_tokens=config.max_model_len,
            # Tokenizers that are none of transformers' (Mistral's) have no template and know their chats themselves.
            chat=getattr(self._llm.get_tokenizer(), "chat_template", "") is not None,
            resumes=False,
            images=config.is_multimodal_model
            and self._llm.renderer.get_mm_processor().info.allowed_mm_limits.get("image", 0) > 0,
        )
        return [self._info]

    async def answer(self, call: Call) -> AsyncGenerator[Output, None]:
        """Stream what vLLM generates for a job."""
        prompt, params = await self._prepare(call.job)
        priority = MAX_PRIORITY - call.job.priority  # vLLM serves the smallest first
        outputs = self._llm.generate(prompt, params, str(call.job.ticket), priority=priority)
        try:
            begun = False
            async for output in outputs:
                told = self._tokens(call, output, begun)
                begun = True
                if told is not None:
                    yield told
                reason = output.outputs[0].finish_reason
                if reason in REASONS:
                    yield call.done(REASONS[reason])
                elif reason is not None:
                    text = f"vLLM ended the request: {reason}"
                    yield Failed(call.job.ticket, EngineFailedError.default_code.value, text, retryable=True)
        except VLLMClientError as error:
            raise BadRequestError(_first_line(error)) from error
        except GracefulHTTPError as error:
            raise BusyError(_first_line(error), retryable=True) from error
        except EngineDeadError as error:
            raise self._died() from error
        except EngineGenerateError as error:
            # What vLLM's checks of a request raise, besides its own errors. Nothing of it was generated.
            if isinstance(error.__cause__, (ValueError, TypeError)):
                raise BadRequestError(_first_line(error.__cause__)) from error
            raise EngineFailedError(f"vLLM failed: {_reason(error.__cause__ or error)}", retryable=True) from error
        finally:
            await outputs.aclose()

    async def shut(self) -> None:
        """End vLLM's processes."""
        if self._watch is not None:
            self._watch.cancel()
        if self._llm is not None:
            self._llm.shutdown(timeout=_SHUTDOWN_S)

    async def _prepare(self, job: Job) -> tuple[Any, SamplingParams]:
        try:
            params = sampling_params(job.generation)
            return await render(self._llm.renderer, job, chat=self._info.chat, images=self._info.images), params
        except BadRequestError:
            raise
        except Exception as error:  # vLLM's checks, tokenizers and templates fail in ways of their own
            raise BadRequestError(f"model {self.served_name!r} cannot take this: {_first_line(error)}") from error

    def _tokens(self, call: Call, output: Any, begun: bool) -> Tokens | None:
        """Return what one output of vLLM brings, if anything; the first one brings the prompt's figures and echo."""
        new = output.outputs[0]
        generation = call.job.generation
        text, before = new.text, None
        if not begun:
            call.prompt_tokens = len(output.prompt_token_ids or ())
            self._prompt_tokens += call.prompt_tokens
            self._cached_tokens += output.num_cached_tokens or 0
            if output.metrics is not None and output.metrics.scheduled_ts:
                call.started_at = max(call.submitted_at, output.metrics.scheduled_ts)
            check_echo(generation, call.prompt_tokens)
            if generation.echo:
                text = self._prompt_text(output) + text
                if output.prompt_logprobs:
                    before = output.prompt_token_ids, output.prompt_logprobs
        found = None
        if generation.sampling.logprobs is not None:
            found = details(new.token_ids, new.logprobs, generation.sampling.logprobs, before)
        return call.tokens(new.token_ids, text, found) if new.token_ids or text or found else None

    def _prompt_text(self, output: Any) -> str:
        if output.prompt is not None:
            return str(output.prompt)
        return str(self._llm.get_tokenizer().decode(output.prompt_token_ids))

    async def _watch_core(self) -> None:
        """Notice the end of vLLM's core also while there are no requests that would."""
        with contextlib.suppress(EngineDeadError):
            while True:
                await self._llm.check_health()
                await asyncio.sleep(_HEALTH_S)
        self._died()

    def _died(self) -> EngineFailedError:
        """Give the engine up; return the error for the jobs that it had."""
        self._dead = True
        error = EngineFailedError(_DEAD, retryable=True)
        self.fail(error)
        return error

    # --- the engine thread ------------------------------------------------------------------------------------------

    def resize(self, slots: int) -> int:
        """Run what comes, up to the bound that vLLM was started with."""
        return min(slots, self._slots)

    def reset(self) -> None:
        """Drop all jobs.

        Raises:
            EngineFailedError: vLLM's core has ended; a process cannot start another one.
        """
        super().reset()
        if self._dead:
            raise EngineFailedError(_DEAD)

    def stats(self) -> EngineStats:
        """Return what vLLM told with its last step; it tells no times by stage and nothing of the device's memory."""
        held = len(self._calls)
        waiting = min(held, self._figures.waiting)
        return EngineStats(
            running=held - waiting,
            waiting=waiting,
            kv_use=self._figures.kv_use if held else 0.0,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
        )


def _first_line(error: BaseException) -> str:
    # The first argument: vLLM's own errors add their fields to the text.
    lines = str(error.args[0] if error.args else error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _reason(error: BaseException) -> str:
    """Return in one line why something failed; what pydantic raises has the reasons in a list."""
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(one["msg"]) for one in errors())
    return _first_line(error)
