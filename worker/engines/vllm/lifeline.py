"""Ends vLLM's processes with the worker that started them.

vLLM's engine core does not notice that its parent was killed: it stays, idle, with the model in memory (tried with
0.32). So each of vLLM's processes that a worker starts waits, in a thread, for the end of its parent. vLLM calls
`end_with_parent` there as one of its general plugins (the entry point `vllm.general_plugins`).
"""

from __future__ import annotations

import multiprocessing
import os
import threading

#: Set by a worker for its children. Without it the plugin does nothing: every vLLM in the environment loads it.
VARIABLE = "TOKENMQ_VLLM_LIFELINE"
#: The plugin's name.
PLUGIN = "tokenmq"
_PLUGINS_VARIABLE = "VLLM_PLUGINS"
_EXIT_CODE = 1


def arm() -> None:
    """Let the processes that vLLM starts from now on end with this one."""
    os.environ[VARIABLE] = "1"
    chosen = os.environ.get(_PLUGINS_VARIABLE)
    if chosen is not None and PLUGIN not in chosen.split(","):
        os.environ[_PLUGINS_VARIABLE] = ",".join(filter(None, (chosen, PLUGIN)))


def end_with_parent() -> None:
    """End this process as soon as its parent has ended; the plugin. vLLM may call it more than once."""
    parent = multiprocessing.parent_process()
    if (
        parent is None
        or VARIABLE not in os.environ
        or any(thread.name == VARIABLE for thread in threading.enumerate())
    ):
        return

    def wait() -> None:
        parent.join()
        os._exit(_EXIT_CODE)

    threading.Thread(target=wait, name=VARIABLE, daemon=True).start()
