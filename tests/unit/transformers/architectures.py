"""Tiny random models of many architectures, whose windows are shorter than the tests' contexts."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from .conftest import CONTEXT, VOCABULARY

#: Tokens that a sliding window of these models sees.
WINDOW = 12
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_ALL_SLIDE: dict[str, Any] = {**_SHAPE, "sliding_window": WINDOW}
_SOME_SLIDE: dict[str, Any] = {
    **_ALL_SLIDE,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
#: Untied: the embeddings, scaled up, would make these models repeat the newest token for ever.
_GEMMA: dict[str, Any] = {**_SOME_SLIDE, "head_dim": 8, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}
_OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_FEW_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
#: The first part of transformers' class names, and what the config takes.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE),
    "phi3-longrope": (
        "Phi3",
        {
            **_SHAPE,
            "original_max_position_embeddings": CONTEXT,
            "max_position_embeddings": 4 * CONTEXT,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
            },
        },
    ),
    "llama-dynamic": (
        "Llama",
        {**_SHAPE, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "qwen2": ("Qwen2", _SHAPE),
    "qwen2-window": (
        "Qwen2",
        {**_SHAPE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_SHAPE, "head_dim": 8}),
    "mistral": ("Mistral", _ALL_SLIDE),
    "gemma": ("Gemma", {**_SHAPE, "head_dim": 8}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA),
    "phi3": ("Phi3", _ALL_SLIDE),
    "cohere2": ("Cohere2", _SOME_SLIDE),
    "olmo2": ("Olmo2", _SHAPE),
    "smollm3": ("SmolLM3", {**_SHAPE, "no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2", _OLD),
    "gptj": ("GPTJ", {**_OLD, "rotary_dim": 4}),
    "gpt-neox": ("GPTNeoX", {**_SHAPE, "num_key_value_heads": 4}),
    "phi": ("Phi", _SHAPE),
    "opt": ("OPT", {**_SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("Falcon", {**_SHAPE, "alibi": False, "new_decoder_architecture": False}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "mixtral": ("Mixtral", {**_ALL_SLIDE, **_FEW_EXPERTS}),
    "qwen2-moe": ("Qwen2Moe", {**_SHAPE, **_EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3Moe", {**_SHAPE, **_EXPERTS, "head_dim": 8}),
    "gpt-oss": (
        "GptOss",
        {
            **_SOME_SLIDE,
            **_FEW_EXPERTS,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "deepseek-v3": ("DeepseekV3", {**_SHAPE, **_LATENT}),
    "llama4": ("Llama4", {**_SHAPE, **_FEW_EXPERTS}),
}
#: What none of the engine's forwards can be right for, and a part of what is said of it.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "LinearAttentionLayer"),
    "jamba": ("Jamba", {**_SHAPE, "num_hidden_layers": 8, "mamba_d_state": 8}, "LinearAttentionLayer"),
    "qwen3-next": ("Qwen3Next", {**_SHAPE, **_EXPERTS, "num_hidden_layers": 4}, "LinearAttentionLayer"),
    "lfm2": ("Lfm2", {**_SHAPE, "layer_types": ["conv", "full_attention"]}, "LinearAttentionLayer"),
    "rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2}, "keys and values"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "does not run over this engine's KV cache"),
    "gpt-neo": (
        "GPTNeo",
        {
            **_SHAPE,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "num_heads": 4,
            "window_size": WINDOW,
        },
        f"window_size={WINDOW}), which this engine can serve only with a max_context of at most {WINDOW}",
    ),
    "llama4-chunks": (
        "Llama4",
        {**_SHAPE, **_FEW_EXPERTS, "attention_chunk_size": WINDOW},
        f"max_context of at most {WINDOW}",
    ),
}


def make_tiny(kind: str, **more: Any) -> Any:
    """Return a small random model in float32 whose next token depends on all that it sees.

    Args:
        kind: a name of SERVED or REFUSED.
        more: for its config.
    """
    torch.manual_seed(7)
    prefix, shape = {**SERVED, **REFUSED}[kind][:2]
    names = [prefix + end for end in ("ForCausalLM", "LMHeadModel") if hasattr(transformers, prefix + end)]
    maker = getattr(transformers, names[0])
    ids = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": None}
    # Far from uniform attention, so that a wrong mask or position shows.
    return maker(maker.config_class(vocab_size=VOCABULARY, initializer_range=0.4, **{**ids, **shape, **more})).eval()
