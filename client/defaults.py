"""The numbers of a client that was told nothing, for the library and for what the command's --help shows."""

from __future__ import annotations

#: How long a request waits for a broker before it fails: a broker's restart fits in, a person's patience ends.
CONNECT_TIMEOUT_S = 5.0
#: A management answer takes a broker a millisecond; one that needs seconds is not coming.
QUERY_TIMEOUT_S = 5.0
#: Attempts that a worker had: a request that kills whoever runs it kills no more workers than this.
MAX_ATTEMPTS = 16
#: How long nobody may take a request: a restart of everything fits in, and the start of a worker's process (one that
#: is loading its model has registered, and what waits for it waits at the broker).
RECOVERY_TIMEOUT_S = 30.0
#: From the moment that a worker has the request: a long prompt on a slow device, or a resume that replays its tokens.
FIRST_TOKEN_TIMEOUT_S = 120.0
#: Between two tokens: longer than any step of a healthy engine, a first one that compiles included.
INTER_TOKEN_TIMEOUT_S = 60.0
