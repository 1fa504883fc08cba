"""The `vllm` engine: vLLM in the worker's own process, and vLLM's engine core in processes below it.

`engine` starts vLLM and streams from it, `request` says in vLLM's terms what a request asks for, `output` says in
ours what comes back, `options` are the settings, and `lifeline` ends vLLM's processes with the worker.
"""
