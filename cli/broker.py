"""zmq-broker: run a broker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..broker import limits
from ..broker.dispatch import DEFAULT_POLICY, POLICIES
from ..broker.ordering import DEFAULT_MODEL_ORDER, MODEL_ORDERS
from ..broker.settings import (
    DEFAULT_NAME,
    GRACE_S,
    MAX_WAITING,
    PENDING_BYTES,
    WRITE_TIMEOUT_S,
    BrokerSettings,
)
from ..protocol.liveness import EXPIRY_S, HEARTBEAT_S
from ..protocol.version import SOFTWARE
from ..transport.endpoints import DEFAULT_BACKEND, DEFAULT_FRONTEND
from . import logs
from .keys import keys
from .lifecycle import allow_many_files, end_with_supervisor, fail, on_signals
from .options import logging_options, option, settings

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
#: More than the cores of any machine, and few enough for its ports, files and heartbeats.
MOST_SHARDS = 64


def limit_options(command: CommandT) -> CommandT:
    """Add an option for each limit, in the order of their table."""
    for each in reversed(limits.OPTIONS):
        kind = click.FloatRange if isinstance(each.default, float) else click.IntRange
        command = option(
            each.name, each.field, type=kind(each.least, each.most), default=each.default, metavar=each.metavar,
            help=each.help, envvar="TOKENMQ_BROKER" + each.name.removeprefix("-").replace("-", "_").upper(),
        )(command)  # fmt: skip
    return command


@click.group(context_settings=settings("TOKENMQ_BROKER"), invoke_without_command=True)
@option(
    "--frontend", multiple=True, default=(DEFAULT_FRONTEND,), metavar="ENDPOINT",
    help="Where clients connect: tcp://HOST:PORT or ipc://PATH. Repeatable. An ipc socket is this user's alone; "
    "a folder that others can write to is refused.",
)  # fmt: skip
@option(
    "--backend", multiple=True, default=(DEFAULT_BACKEND,), metavar="ENDPOINT",
    help="Where workers connect: tcp://HOST:PORT or ipc://PATH. Repeatable.",
)  # fmt: skip
@option(
    "--name", default=DEFAULT_NAME,
    help="The broker's name in answers and logs; with --uplink also what the brokers above know it by.",
)  # fmt: skip
@option(
    "--shards", type=click.IntRange(1, MOST_SHARDS), default=1, metavar="N",
    help=f"Run N brokers that share the work, a process each, at most {MOST_SHARDS}: for more than one core can do. "
    "The k-th, from 0, is 2*k ports above the given ones, or at the ipc path with .k behind it. Workers and clients "
    "need all addresses.",
)  # fmt: skip
@option(
    "--group", default="", metavar="NAME", show_default="one made up with --shards, else none",
    help="Clients that know several brokers of one group spread over them; without a group all use the first that is "
    "there.",
)  # fmt: skip
@option("--supervised", is_flag=True, hidden=True)
@option(
    "--policy", default=DEFAULT_POLICY, metavar="NAME",
    help=f"How a worker is chosen among those with a free slot: {', '.join(POLICIES)}, or one that an installed "
    "package brings (entry point tokenmq.policies). `zmq-client set-policy` changes it while the broker runs.",
)  # fmt: skip
@option("--heartbeat-interval", type=float, default=HEARTBEAT_S, metavar="S", help="Seconds between heartbeats.")
@option(
    "--expiry", type=float, default=EXPIRY_S, metavar="S",
    help="Seconds of silence after which a peer is given up. A broken connection is noticed at once in any case.",
)  # fmt: skip
@option(
    "--max-waiting", type=click.IntRange(min=0), default=MAX_WAITING, metavar="N",
    help="Requests that may wait for one model; more are refused as `busy`.",
)  # fmt: skip
@option(
    "--client-weight", "client_weights", multiple=True, metavar="NAME=W", show_default="1 each",
    help="Clients of this name get W times the share of the workers that others get while requests wait. Repeatable.",
)  # fmt: skip
@option(
    "--grace", type=click.FloatRange(min=0), default=GRACE_S, metavar="S",
    help="Seconds that running requests get after SIGINT or SIGTERM.",
)  # fmt: skip
@option(
    "--pending-bytes", type=click.IntRange(min=0), default=PENDING_BYTES, metavar="BYTES",
    help="Bytes kept for a peer that does not take what is sent to it; with more it is cut off.",
)  # fmt: skip
@option(
    "--write-timeout", type=click.FloatRange(min=0, min_open=True), default=WRITE_TIMEOUT_S, metavar="S",
    help="Seconds after which a peer that takes nothing of what is kept for it is cut off.",
)  # fmt: skip
@option(
    "--model-order", type=click.Choice(sorted(MODEL_ORDERS)), default=DEFAULT_MODEL_ORDER,
    help="How models are listed. `internvl` is the rule of InternVL's controller.",
)  # fmt: skip
@option(
    "--uplink", multiple=True, metavar="ENDPOINT", show_default="none",
    help="The backend of a broker that this one registers at as a worker, with all that its own workers serve. "
    "Repeatable; needs a --name of its own.",
)  # fmt: skip
@option(
    "--uplink-key", default="", metavar="FILE", show_default="none",
    help="The secret key that the brokers above know this one by: one of their workers' keys.",
)  # fmt: skip
@option(
    "--uplink-server-key", "uplink_server_keys", multiple=True, metavar="KEY", show_default="none",
    help="Public key of the brokers above, as such or as a file. Repeatable: one for all, or one for each --uplink.",
)  # fmt: skip
@option(
    "--curve", default="", metavar="DIR", show_default="none",
    help="Encrypt everything, and let in only those whose keys lie in this folder, which `zmq-broker keys init` "
    "makes. It is read anew all the time: whose key is gone is cut off within a second.",
)  # fmt: skip
@limit_options
@option(
    "--insecure", is_flag=True, help="Allow endpoints that other machines can reach, unencrypted and open to all."
)
@option(
    "--insecure-admin", is_flag=True,
    help="Let all clients drain and remove workers and change the policy where other machines reach a frontend.",
)  # fmt: skip
@logging_options
def main(
    frontend: tuple[str, ...],
    backend: tuple[str, ...],
    name: str,
    shards: int,
    group: str,
    supervised: bool,
    policy: str,
    heartbeat_interval: float,
    expiry: float,
    max_waiting: int,
    client_weights: tuple[str, ...],
    grace: float,
    pending_bytes: int,
    write_timeout: float,
    model_order: str,
    uplink: tuple[str, ...],
    uplink_key: str,
    uplink_server_keys: tuple[str, ...],
    curve: str,
    insecure: bool,
    insecure_admin: bool,
    log_format: str,
    log_level: str,
    **limits_given: Any,
) -> None:
    """Run a broker: it takes requests from clients and gives them to the workers that have registered.

    The first SIGINT or SIGTERM lets running requests finish within the grace time; the second one exits at once.
    """
    context = click.get_current_context()
    if context.invoked_subcommand is not None:
        if curve:  # before `keys` it means what it does behind
            context.default_map = {"keys": {name: {"folder": curve} for name in keys.commands}}
        return  # the others are those of a broker that runs
    # Here, since --help and a mistake in the options are to be answered at once, without most of tokenmq.
    from ..broker.server import BrokerServer

    if supervised:
        end_with_supervisor()
        logs.configure(log_format, log_level, shard=name)
    else:
        logs.configure(log_format, log_level)
    files = allow_many_files()
    try:
        broker_settings = BrokerSettings(
            frontend=frontend,
            backend=backend,
            name=name,
            policy=policy,
            heartbeat_s=heartbeat_interval,
            expiry_s=expiry,
            max_waiting=max_waiting,
            client_weights=_weights(client_weights),
            grace_s=grace,
            pending_bytes=pending_bytes,
            write_timeout_s=write_timeout,
            model_order=model_order,
            uplinks=uplink,
            uplink_key=uplink_key,
            uplink_server_keys=uplink_server_keys,
            curve=curve,
            limits=limits.Limits(**limits_given).within(files),
            group=group,
            insecure=insecure,
            insecure_admin=insecure_admin,
        )
        if shards > 1:
            from .shards import supervise  # another program, as good as

            supervise(context, broker_settings, shards)
        server = BrokerServer(broker_settings, software=SOFTWARE)
    except ValueError as error:
        fail(str(error))
    on_signals(server.drain, supervised=supervised)
    server.run()


main.add_command(keys)


def _weights(pairs: tuple[str, ...]) -> dict[str, float]:
    """Return the weights of clients by name.

    Raises:
        ValueError: one is not NAME=W; the message shows it.
    """
    weights = {}
    for pair in pairs:
        name, found, weight = pair.rpartition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            found = ""
        if not (found and name):
            raise ValueError(f"--client-weight: expected NAME=W, such as batch=0.5, got {pair!r}")
    return weights


if __name__ == "__main__":
    main()
