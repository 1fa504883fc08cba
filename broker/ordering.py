"""The orders in which models can be listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_INTERNVL = re.compile(r"InternVL2-(\d+)B", re.ASCII)


def _by_internvl_rule(name: str) -> tuple[int, int, str]:
    """Return what InternVL's controller sorts by: `Pro`, then InternVL2 by size, the largest first, then the rest.

    Names that the rule does not tell apart (it leaves them as they come) go by name.
    """
    if "Pro" in name:
        return 0, 0, name
    sized = _INTERNVL.match(name)
    return (1, -int(sized[1]), name) if sized else (2, 0, name)


#: By the names that `--model-order` takes: what a model's name is sorted by.
MODEL_ORDERS: Mapping[str, Callable[[str], tuple[int, int, str]]] = {
    "name": lambda name: (0, 0, name),
    "internvl": _by_internvl_rule,
}
DEFAULT_MODEL_ORDER = "name"
