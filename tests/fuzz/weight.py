"""How much hangs on an object: what grows with each hostile message is found by it."""

from __future__ import annotations

import gc
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

_NOT_OURS = (type, ModuleType, FunctionType, BuiltinFunctionType, CodeType)


def weight(*roots: Any) -> int:
    """Return how many containers can be reached from these objects: lists, maps, records and the like."""
    seen: set[int] = set()
    left: list[Any] = list(roots)
    count = 0
    while left:
        each = left.pop()
        if id(each) in seen or isinstance(each, _NOT_OURS):
            continue
        seen.add(id(each))
        if gc.is_tracked(each):
            count += 1
            left.extend(gc.get_referents(each))
    return count
