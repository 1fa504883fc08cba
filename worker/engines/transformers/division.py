"""Among how many processes can a model be divided? Asked of its config, before anything is read."""

from __future__ import annotations

import math
from typing import Any

from ..base import EngineLoadError

#: Projections whose rows are the heads' numbers: where a plan divides them, heads are divided.
_BY_HEAD = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


def refuse_indivisible(config: Any, size: int) -> None:
    """Raise where a model cannot be divided among so many processes.

    Args:
        config: the model's, as transformers has it.
        size: processes.

    Raises:
        EngineLoadError: transformers has no plan for the model, or its heads do not divide; the message tells by how
            many they do.
    """
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise EngineLoadError(
            f"--tensor-parallel {size}: transformers has no tensor parallel plan for {text.model_type} models"
        )
    if not any(style == "colwise" and name.endswith(_BY_HEAD) for name, style in plan.items()):
        return
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    common = math.gcd(heads, key_heads)
    if common % size:
        possible = [str(number) for number in range(2, common + 1) if common % number == 0]
        ways = f"divides by {' or '.join(possible)}" if possible else "cannot be divided at all"
        raise EngineLoadError(
            f"--tensor-parallel {size}: a model with {heads} attention heads and {key_heads} key/value heads {ways}"
        )
