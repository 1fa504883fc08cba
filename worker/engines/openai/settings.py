"""Defaults of the openai engine that its command shows; here, so that no HTTP library is imported for them."""

from __future__ import annotations

from .dialects import DIALECTS

#: The environment variable with the server's API key: a command line can be read by everybody on the machine.
API_KEY_VARIABLE = "TOKENMQ_OPENAI_API_KEY"
#: A large model takes a server minutes to load.
SERVER_WAIT_S = 600.0
AUTO = "auto"
#: What `--dialect` may be.
DIALECT_NAMES = (AUTO, *DIALECTS)
