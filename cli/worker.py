"""zmq-worker: run a worker, one engine on one device."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import click

from ..transport.curves import curves
from ..transport.endpoints import DEFAULT_BACKEND, EndpointError
from ..worker.engines.openai.settings import API_KEY_VARIABLE, DIALECT_NAMES, SERVER_WAIT_S
from ..worker.engines.transformers.task import AUTO, TASKS, engine_for
from ..worker.settings import (
    GRACE_S,
    READER_TIMEOUT_S,
    RESTART_AFTER_S,
    SLOTS,
    STALL_AFTER_S,
    WorkerSettings,
    default_name,
)
from . import logs
from .engine_options import refuse_foreign
from .lifecycle import allow_many_files, end_with_supervisor, fail, leave, on_signals
from .options import logging_options, option, settings

# Set before torch is imported: its OpenMP threads spin at their barriers by default, and two torch processes on one
# machine then nearly stop each other (measured on 2 cores: 27 tokens/s alone, below 0.5 each together, 16 with this).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when they are imported: each would print on its own, and say again what the one line about a failure tells.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")


@click.command(context_settings=settings("TOKENMQ_WORKER"))
@option(
    "--model", required=True, metavar="PATH_OR_ID",
    help="What to serve: a folder with a transformers model, a .gguf file, or a hub id. For the synthetic engine "
    "just a name.",
)  # fmt: skip
@option("--name", show_default="the end of --model", metavar="SERVED_NAME", help="What clients ask for.")
@option(
    "--engine", default="transformers", metavar="NAME",
    help="transformers, vllm, openai, synthetic, one of another package, or package.module:Class.",
)  # fmt: skip
@option(
    "--task", type=click.Choice(TASKS), default=AUTO,
    help="What the transformers engine does with the model: generate text, or embed texts; auto: what the model's "
    "files say. See docs/embeddings.md.",
)  # fmt: skip
@option(
    "--broker", multiple=True, default=(DEFAULT_BACKEND,), metavar="ENDPOINT",
    help="A broker's backend. Repeatable: the worker registers with all of them.",
)  # fmt: skip
@option(
    "--server-key", multiple=True, show_default="none", metavar="KEY",
    help="The broker's public key, as text or as the path of its file: then the connection is encrypted. Repeatable: "
    "one for all brokers, or one for each in the order of --broker.",
)  # fmt: skip
@option(
    "--key", default="", show_default="none", metavar="FILE",
    help="This worker's secret key, made by `zmq-broker keys new`; goes with --server-key.",
)  # fmt: skip
@option(
    "--direct", default="", metavar="ENDPOINT", show_default="none",
    help="An endpoint of this worker's own, such as tcp://10.0.0.7:6000 (port *: a free one), where clients that ask "
    "for it take their tokens past the broker. See docs/direct.md.",
)  # fmt: skip
@option(
    "--insecure", is_flag=True,
    help="Allow a --direct that other machines can reach, without keys: unencrypted and open to all.",
)  # fmt: skip
@option("--worker-name", show_default="HOST-PID", metavar="NAME", help="This worker's own name.")
@option("--slots", type=int, default=SLOTS, metavar="N", help="Requests to run at a time.")
@option(
    "--speed", type=float, show_default="measured by the broker", metavar="X",
    help="Tokens a second of one stream, for the broker's policies. Only relations between workers count: give it to "
    "all of them, or to none.",
)  # fmt: skip
@option("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto: the first of them that is there.")
@option(
    "--devices", metavar="LIST", show_default="one worker, on --device",
    help="One worker process for each, kept running by a supervisor: all, or a list such as 0,1 (CUDA devices) or "
    "cpu,cpu. See docs/devices.md.",
)  # fmt: skip
@option(
    "--threads", type=click.IntRange(min=1), metavar="N", show_default="OMP_NUM_THREADS, else the cores, shared "
    "among --devices",
    help="CPU threads that the model's computations use in each process.",
)  # fmt: skip
@option(
    "--tensor-parallel", type=click.IntRange(min=1), default=1, metavar="N",
    help="Divide the model among N processes, each on a CUDA device of its own or all on cpu; for models that do not "
    "fit one device. See docs/devices.md.",
)  # fmt: skip
@option("--supervised", is_flag=True, hidden=True, help="Started by a supervisor, which holds standard input.")
@option("--dtype", default="auto", help="float32, bfloat16, float16; auto: bfloat16 on cuda, else float32.")
@option(
    "--max-context", type=int, show_default="the model's, at most 32768 on cuda, else 8192", metavar="TOKENS",
    help="Prompt and completion of a request together.",
)  # fmt: skip
@option(
    "--cache-tokens", type=int, show_default="4096 for each slot on cuda, else 2048", metavar="TOKENS",
    help="The KV cache, which all running requests share: as many run as fit beside one another with the length of "
    "the longest.",
)  # fmt: skip
@option(
    "--prefix-cache", type=int, show_default="a fourth of --cache-tokens", metavar="TOKENS",
    help="For beginnings of prompts, so that those that share one do not compute it twice; 0: none.",
)  # fmt: skip
@option(
    "--prefill-tokens", type=int, show_default="2048 on cuda, else 128", metavar="TOKENS",
    help="Of prompts that are computed in one step: the longest time that running requests wait for others' prompts.",
)  # fmt: skip
@option(
    "--compile/--no-compile", "compile_decode", default=False,
    help="Put decodes through torch.compile: loading takes minutes longer, then steps are shorter; "
    "needs a C++ compiler. See docs/engine.md.",
)  # fmt: skip
@option(
    "--cache-dir", show_default="$TOKENMQ_CACHE/models or ~/.cache/tokenmq/models", metavar="DIR",
    help="For converted GGUF files.",
)  # fmt: skip
@option(
    "--resume", type=click.Choice(["auto", "prefill", "replay"]), default="auto",
    help="How to go on behind another worker's tokens: prefill is quick, replay exact; see docs/numerics.md.",
)  # fmt: skip
@option(
    "--adapter", multiple=True, metavar="NAME=PATH", show_default="none",
    help="A LoRA adapter that peft wrote, repeatable: clients ask for SERVED_NAME:NAME; see docs/models.md.",
)  # fmt: skip
@option(
    "--engine-option", multiple=True, metavar="KEY=VALUE", show_default="none",
    help="For the vllm engine, repeatable: an argument of vLLM's AsyncEngineArgs, such as "
    "gpu_memory_utilization=0.8.",
)  # fmt: skip
@option(
    "--base-url", metavar="URL", show_default="none",
    help="For the openai engine: where the server's API is, such as http://host:8000/v1. See docs/openai-engine.md.",
)  # fmt: skip
@option(
    "--api-key-env", default=API_KEY_VARIABLE, metavar="VARIABLE",
    help="For the openai engine: the environment variable that holds the server's API key, if it wants one.",
)  # fmt: skip
@option(
    "--dialect", type=click.Choice(DIALECT_NAMES), default=DIALECT_NAMES[0],
    help="For the openai engine: what kind of server it is; auto: by what it says of itself.",
)  # fmt: skip
@option(
    "--server-wait", type=click.FloatRange(min=0), default=SERVER_WAIT_S, metavar="S",
    help="For the openai engine: seconds that the server may take until it answers.",
)  # fmt: skip
@option(
    "--tokens-per-second", type=click.FloatRange(min=0), default=0.0, metavar="RATE",
    help="Pace of each stream of the synthetic engine; 0: as fast as it goes.",
)  # fmt: skip
@option(
    "--heartbeat-interval", type=float, show_default="the broker's", metavar="S",
    help="Ask brokers for a longer interval in seconds.",
)  # fmt: skip
@option(
    "--stall-after", type=float, default=STALL_AFTER_S, metavar="S",
    help="Seconds after which an engine step that does not end keeps new requests away.",
)  # fmt: skip
@option(
    "--restart-after", type=click.FloatRange(min=0), default=RESTART_AFTER_S, metavar="S",
    help="Seconds after which a worker whose engine step does not end exits with code 1, so that its supervisor "
    "starts it again; 0: never.",
)  # fmt: skip
@option(
    "--reader-timeout", type=float, default=READER_TIMEOUT_S, metavar="S",
    help="Seconds that tokens wait for a reader that takes none before its request is given up.",
)  # fmt: skip
@option(
    "--grace", type=click.FloatRange(min=0), default=GRACE_S, metavar="S",
    help="Seconds that running requests get after SIGINT or SIGTERM, or when a broker asks the worker to leave.",
)  # fmt: skip
@option(
    "--log-prompts", is_flag=True, show_default="off",
    help="Log the first 1,000 characters of each prompt, with its request's id. Else no prompt is logged.",
)  # fmt: skip
@logging_options
def main(
    model: str,
    name: str | None,
    engine: str,
    task: str,
    broker: tuple[str, ...],
    server_key: tuple[str, ...],
    key: str,
    direct: str,
    insecure: bool,
    worker_name: str | None,
    slots: int,
    speed: float | None,
    device: str,
    devices: str | None,
    threads: int | None,
    tensor_parallel: int,
    supervised: bool,
    dtype: str,
    max_context: int | None,
    cache_tokens: int | None,
    prefix_cache: int | None,
    prefill_tokens: int | None,
    compile_decode: bool,
    cache_dir: str | None,
    resume: str,
    adapter: tuple[str, ...],
    engine_option: tuple[str, ...],
    base_url: str | None,
    api_key_env: str,
    dialect: str,
    server_wait: float,
    tokens_per_second: float,
    heartbeat_interval: float | None,
    stall_after: float,
    restart_after: float,
    reader_timeout: float,
    grace: float,
    log_prompts: bool,
    log_format: str,
    log_level: str,
) -> None:
    """Run a worker: it loads a model, registers with its brokers and serves their requests.

    The first SIGINT or SIGTERM lets running requests finish within the grace time; the second one exits at once.
    Exit codes: 0 after a drain, 1 when something broke, 2 when it could not start as it was told.
    """
    # Here, since --help and a mistake in the options are to be answered at once, without most of tokenmq.
    from ..worker.engines.base import EngineLoadError
    from ..worker.engines.registry import make_engine
    from ..worker.events import EXIT_CANNOT_START
    from ..worker.server import WorkerServer

    rank = int(os.environ.get("RANK", "0")) if supervised and tensor_parallel > 1 else 0
    if supervised:
        end_with_supervisor()
        logs.configure(log_format, log_level, worker=worker_name, **({"rank": rank} if rank else {}))
    else:
        logs.configure(log_format, log_level)
    served = name or _served_name(model)
    if not served:
        fail("--model: it must not be empty", EXIT_CANNOT_START)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported
    own: dict[str, dict[str, Any]] = {
        "transformers": {
            "model": model,
            "device": device,
            "dtype": dtype,
            "max_context": max_context,
            "cache_tokens": cache_tokens,
            "prefix_tokens": prefix_cache,
            "prefill_tokens": prefill_tokens,
            "compile_decode": compile_decode,
            "cache_dir": cache_dir,
            "resume": resume,
            "tensor_parallel": tensor_parallel,
            "adapters": adapter,
        },
        "embeddings": {"model": model, "device": device, "dtype": dtype, "max_context": max_context},
        "synthetic": {"tokens_per_second": tokens_per_second},
        "vllm": {
            "model": model,
            "device": device,
            "dtype": dtype,
            "max_context": max_context,
            "options": engine_option,
        },
    }
    if insecure and not direct:
        fail("--insecure is about --direct, and none is given")
    if direct:
        allow_many_files()  # clients come, too
    try:
        worker_settings = WorkerSettings(
            brokers=broker,
            models=(served,),
            name=worker_name or default_name(),
            slots=slots,
            speed=speed,
            heartbeat_s=heartbeat_interval,
            grace_s=grace,
            log_prompts=log_prompts,
            stall_after_s=stall_after,
            restart_after_s=restart_after,
            reader_timeout_s=reader_timeout,
            direct=direct,
            insecure=insecure,
            curves=curves(server_key, key, broker),
        )
        refuse_parallel(engine, tensor_parallel)
        refuse_foreign(click.get_current_context(), engine)
        if (devices or tensor_parallel > 1) and not supervised:
            from .supervise import supervise  # another program, as good as

            supervise(worker_settings, devices, device, tensor_parallel, worker_name)
        if engine == "transformers":
            engine = engine_for(model, task)
            refuse_parallel(engine, tensor_parallel)
            refuse_foreign(click.get_current_context(), engine)
        elif task != AUTO:
            raise ValueError(f"--task {task}: it is for the transformers engine, not for {engine}")
        if engine == "openai":
            server_options = _server_options(base_url, api_key_env)
            own[engine] = {"model": model, "dialect": dialect, "server_wait_s": server_wait, **server_options}
        options: dict[str, Any] = {"name": served, "slots": slots, **own.get(engine, {"model": model})}
        if rank:
            from .follow import follow

            follow(make_engine(engine, **options))
        server = WorkerServer(make_engine(engine, **options), worker_settings)
    except (ValueError, EngineLoadError) as error:
        fail(str(error), EXIT_CANNOT_START)
    on_signals(server.drain, supervised=supervised)
    try:
        exit_code = server.run()
    except EndpointError as error:
        fail(str(error), EXIT_CANNOT_START)
    if server.engine_abandoned:
        leave(exit_code)
    raise SystemExit(exit_code)


def refuse_parallel(engine: str, size: int) -> None:
    """Raise ValueError where one worker is to be several processes, and its engine knows nothing of that."""
    if size > 1 and engine != "transformers":
        raise ValueError(f"--tensor-parallel: it is for the transformers engine, not for {engine}")


def _server_options(base_url: str | None, api_key_env: str) -> dict[str, Any]:
    """Return what the openai engine is told of its server; raises ValueError where something is missing."""
    if not base_url:
        raise ValueError("--base-url: the openai engine needs it, such as http://127.0.0.1:8000/v1")
    api_key = os.environ.get(api_key_env) or None
    if api_key is None and api_key_env != API_KEY_VARIABLE:
        raise ValueError(f"--api-key-env: the environment has no variable {api_key_env!r}")
    return {"base_url": base_url, "api_key": api_key}


def _served_name(model: str) -> str:
    """Return the last part of a path or hub id, without the ending of a GGUF file."""
    last = PurePath(model.rstrip("/")).name or model
    return last[: -len(".gguf")] if last.lower().endswith(".gguf") else last


if __name__ == "__main__":
    main(prog_name="zmq-worker")
