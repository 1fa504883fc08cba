"""zmq-client: talk to a broker from the terminal."""

from __future__ import annotations

import click

from ..client.defaults import (
    CONNECT_TIMEOUT_S,
    FIRST_TOKEN_TIMEOUT_S,
    INTER_TOKEN_TIMEOUT_S,
    MAX_ATTEMPTS,
    RECOVERY_TIMEOUT_S,
)
from ..transport.endpoints import DEFAULT_FRONTEND
from .embed import embed
from .generation import chat, generate
from .manage import COMMANDS
from .options import option, settings, version_option


@click.group(context_settings=settings("TOKENMQ_CLIENT"))
@option(
    "--broker", multiple=True, default=(DEFAULT_FRONTEND,), metavar="ENDPOINT",
    help="The broker's frontend. Repeatable: requests go to the first that is there, and over to the next; of those "
    "that share the work (zmq-broker --shards), to one taken at random.",
)  # fmt: skip
@option(
    "--server-key", multiple=True, show_default="none", metavar="KEY",
    help="The broker's public key, as text or as the path of its file: then the connection is encrypted. Repeatable: "
    "one for all brokers, or one for each in the order of --broker.",
)  # fmt: skip
@option(
    "--key", default="", show_default="none", metavar="FILE",
    help="This client's secret key, made by `zmq-broker keys new`; goes with --server-key.",
)  # fmt: skip
@option(
    "--connect-timeout", type=click.FloatRange(min=0, min_open=True), default=CONNECT_TIMEOUT_S, metavar="S",
    help="Seconds to wait for a broker to answer.",
)  # fmt: skip
@option(
    "--queue-timeout", type=click.FloatRange(min=0, min_open=True), show_default="none", metavar="S",
    help="Seconds to wait at the broker for a worker.",
)  # fmt: skip
@option(
    "--first-token-timeout", type=click.FloatRange(min=0, min_open=True), default=FIRST_TOKEN_TIMEOUT_S, metavar="S",
    help="Seconds that a worker may take for the first token; then another one is asked.",
)  # fmt: skip
@option(
    "--inter-token-timeout", type=click.FloatRange(min=0, min_open=True), default=INTER_TOKEN_TIMEOUT_S, metavar="S",
    help="The same for each further token.",
)  # fmt: skip
@option(
    "--max-attempts", type=click.IntRange(min=1), default=MAX_ATTEMPTS, metavar="N",
    help="How many attempts of one request may fail at workers.",
)  # fmt: skip
@option(
    "--recovery-timeout", type=click.FloatRange(min=0, min_open=True), default=RECOVERY_TIMEOUT_S, metavar="S",
    help="Seconds that a request may be without a worker after a failure.",
)  # fmt: skip
@version_option
@click.pass_context
def main(
    context: click.Context,
    broker: tuple[str, ...],
    server_key: tuple[str, ...],
    key: str,
    connect_timeout: float,
    queue_timeout: float | None,
    first_token_timeout: float,
    inter_token_timeout: float,
    max_attempts: int,
    recovery_timeout: float,
) -> None:
    """Ask the models behind a broker, or the broker itself."""
    context.obj = {
        "endpoints": list(broker),
        "server_key": list(server_key),
        "key": key,
        "connect_timeout_s": connect_timeout,
        "queue_timeout_s": queue_timeout,
        "first_token_timeout_s": first_token_timeout,
        "inter_token_timeout_s": inter_token_timeout,
        "max_attempts": max_attempts,
        "recovery_timeout_s": recovery_timeout,
    }


for command in (generate, chat, embed, *COMMANDS):
    main.add_command(command)


if __name__ == "__main__":
    main()
