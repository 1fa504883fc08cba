"""vLLM as a child of engine.py, in .venv-vllm: reads prompts as JSON lines, writes what it took to answer them.

Arguments: the model's folder, dtype, most requests at a time, tokens of a row.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

CACHE_BYTES = 1 << 30


async def answer(llm: AsyncLLM, number: str, prompt: list[int], tokens: int) -> int:
    """Generate for one prompt; return the number of tokens that came."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
    made = 0
    async for output in llm.generate({"prompt_token_ids": prompt}, params, number):
        made += len(output.outputs[0].token_ids)
    return made


async def main(model: str, dtype: str, slots: int, context: int) -> None:
    """Serve until standard input ends."""
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=slots,
            enable_prefix_caching=False,
            disable_log_stats=True,
            kv_cache_memory_bytes=CACHE_BYTES,
        )
    )
    await answer(llm, "warm", [1, 2, 3], 4)
    print(json.dumps({"ready": True}), flush=True)
    for turn, line in enumerate(iter(sys.stdin.readline, "")):
        asked = json.loads(line)
        begun = time.perf_counter()
        made = await asyncio.gather(
            *(answer(llm, f"{turn}-{at}", ids, asked["tokens"]) for at, ids in enumerate(asked["prompts"]))
        )
        print(json.dumps({"tokens": sum(made), "wall_s": time.perf_counter() - begun}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
