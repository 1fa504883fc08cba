"""What a request asks for, in vLLM's terms: sampling parameters, and the prompt that its renderer makes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from vllm.inputs import TextPrompt, TokensPrompt
from vllm.renderers import ChatParams
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from ....protocol.errors import BadRequestError
from ....protocol.payload import Generation, Sampling
from ..base import Job
from ..images import decode

#: What the engine itself gives to a chat template, or must not be given by who asks.
_OWN_TEMPLATE_ARGUMENTS = frozenset({"chat_template", "conversation", "messages", "return_dict", "tokenize", "tools"})


def sampling_params(generation: Generation) -> SamplingParams:
    """Return vLLM's parameters.

    Raises:
        ValueError: vLLM takes no such value.
    """
    sampling = generation.sampling
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        bad_words=list(sampling.bad_words),
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.logprobs if generation.echo else None,
        structured_outputs=_structured(sampling),
        output_kind=RequestOutputKind.DELTA,
    )


def _structured(sampling: Sampling) -> StructuredOutputsParams | None:
    if not (sampling.json_schema or sampling.regex or sampling.choice):
        return None
    return StructuredOutputsParams(
        json=sampling.json_schema, regex=sampling.regex, choice=list(sampling.choice) or None
    )


async def render(renderer: Any, job: Job, *, chat: bool, images: bool) -> Any:
    """Return the prompt as vLLM's engine takes it: tokenised, and images processed.

    Args:
        renderer: vLLM's, of the model.
        job: the job.
        chat: the model has a chat template.
        images: it takes images.

    Raises:
        BadRequestError: the model cannot take such a prompt.
        Exception: vLLM, the tokenizer, or the chat template rejects it; of many kinds.
    """
    generation = job.generation
    if generation.texts is not None:
        raise BadRequestError(f"model {job.model!r} generates text, it gives no embeddings")
    if job.attachments and not images:
        raise BadRequestError(f"model {job.model!r} takes text only, no images")
    # Decoding takes time that all streams would wait for.
    pictures = await asyncio.to_thread(decode, job.attachments) if job.attachments else []
    if generation.messages is not None:
        if not chat:
            raise BadRequestError(f"model {job.model!r} has no chat template: send a prompt instead of messages")
        return await _render_chat(renderer, generation, pictures)
    media = {"multi_modal_data": {"image": pictures}} if pictures else {}
    if generation.token_ids is not None:
        prompt: Any = TokensPrompt(prompt_token_ids=list(generation.token_ids), **media)
    else:
        prompt = TextPrompt(prompt=generation.prompt or "", **media)
    (rendered,) = await renderer.render_cmpl_async([prompt])
    return rendered


async def _render_chat(renderer: Any, generation: Generation, pictures: list[Image.Image]) -> Any:
    forbidden = sorted(_OWN_TEMPLATE_ARGUMENTS & generation.template.keys())
    if forbidden:
        raise BadRequestError(f"request.template: {', '.join(forbidden)} cannot be given there")
    arguments: dict[str, Any] = {"add_generation_prompt": True, **generation.template}
    if generation.tools:
        arguments["tools"] = [dict(tool) for tool in generation.tools]
    messages = _messages(generation.messages or (), pictures)
    _, (rendered,) = await renderer.render_chat_async([messages], ChatParams(chat_template_kwargs=arguments))
    return rendered


def _messages(messages: Sequence[Mapping[str, Any]], pictures: list[Image.Image]) -> list[dict[str, Any]]:
    """Put the images where the messages have their parts, and leave nothing that vLLM would fetch from anywhere."""
    left = iter(pictures)
    wanted = 0
    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str) and content is not None:
            wanted += sum(part["type"] == "image" for part in content)
            content = [
                {"type": "image_pil", "image_pil": next(left, None)}
                if part["type"] == "image"
                else {"type": "text", "text": part["text"]}
                for part in content
            ]
        found.append({**message, "content": content})
    if wanted != len(pictures):
        raise BadRequestError(f"the messages have {wanted} image parts, and {len(pictures)} images are attached")
    return found
