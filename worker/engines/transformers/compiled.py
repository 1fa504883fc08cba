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


class Compiled:
    """Computes as `model(...)` does, compiled when it is first called.

    Attributes:
        works: False once the compiler has failed.
    """

    def __init__(self, model: Any) -> None:
        """Compile `model`, a transformers model in eval mode, later."""
        self.works = True
        self._model = model
        self._quick: Callable[..., Any] = torch.compile(model.forward, dynamic=True)

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model does; raises what it raises."""
        if not self.works:
            return self._model(**inputs)
        try:
            # Sizes that happen to be equal, such as the rows of the cache and the width, are not taken for one.
            with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                return self._quick(**inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            name = type(self._model).__name__
            _log.warning("%s cannot be compiled, and runs as it is: %s", name, first_line(error))
            self.works = False
            return self._model(**inputs)
