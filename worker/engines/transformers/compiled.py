"""A model's forward through torch.compile, for decodes and replays: an option, since compiling takes minutes.

Rows and width change from step to step, so they are symbols in the graph that is made of each. Where the compiler
fails, at the first decode or at a later one, the plain forward takes over for good: it stores the same tokens in the
same columns again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental import _config as config

from .devices import first_line, is_out_of_memory

_log = logging.getLogger("tokenmq.worker")


def compiled(model: Any) -> Callable[..., Any]:
    """Return what computes as `model(...)` does, compiled when it is first called.

    Args:
        model: a transformers model in eval mode.
    """
    quick: Callable[..., Any] | None = torch.compile(model.forward, dynamic=True)

    def forward(**inputs: Any) -> Any:
        nonlocal quick
        if quick is None:
            return model(**inputs)
        try:
            # Sizes that happen to be equal, such as the rows of the cache and the width, are not taken for one.
            with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return quick(**inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            _log.warning("%s cannot be compiled, and runs as it is: %s", type(model).__name__, first_line(error))
            quick = None
            return model(**inputs)

    return forward
