"""The `transformers` engine: continuous batching of any Hugging Face decoder model over a slot KV cache.

`engine.TransformersEngine` is the entrance. This file imports neither torch nor transformers, so that a command that
only lists engines does not pay for them.
"""

import os

# Two torch processes on one machine (several workers, or a worker beside its tests) collapse to a fiftieth of their
# speed when OpenMP's threads spin at its barriers. The runtime reads the variable when torch is imported, so it is
# set here, before any module of this package can do that. A user's own value stands.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
