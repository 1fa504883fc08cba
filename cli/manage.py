"""The commands of zmq-client that ask a broker how it is, and tell it what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from ..broker.ordering import MODEL_ORDERS
from .asking import broker_option, connected, json_option
from .each import each_broker
from .options import option
from .tables import table

_MODEL_COLUMNS = ("name", "workers", "ready", "slots", "running", "waiting", "context_tokens", "can")
#: What a model may be able to do, as `models` tells it, and the command or option that asks for it.
_ABILITIES = {"generates": "generate", "chat": "chat", "images": "image", "embeds": "embed"}
_WORKER_COLUMNS = ("name", "state", "engine", "models", "slots", "in_flight", "waiting", "speed", "tokens_per_s")
_ENGINE_COLUMNS = (
    "name", "running", "tokens_per_s", "steps_per_s", "prefill", "decode", "prefix_hits", "kv_use", "memory",
)  # fmt: skip
_CANDIDATE_COLUMNS = ("worker", "load", "slots", "speed", "cost")
_GIB = 2**30
#: What `speed` may be instead of a number.
_AUTO = "auto"


@click.command()
@option(
    "--order", type=click.Choice(sorted(MODEL_ORDERS)), show_default="the broker's own",
    help="`internvl` is the rule of InternVL's controller.",
)  # fmt: skip
@json_option
@broker_option
def models(order: str | None, as_json: bool, broker: tuple[str, ...]) -> None:
    """List the models that the broker's workers serve."""
    with connected(broker) as client:
        rows = client.models(order=order)
        _print_rows(rows if as_json else list(map(_shown_model, rows)), _MODEL_COLUMNS, as_json=as_json)


def _shown_model(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "can": [command for ability, command in _ABILITIES.items() if row[ability]] or None}


@click.command()
@option("--tree", is_flag=True, help="Also those behind the brokers below this one.")
@option("--engine", is_flag=True, help="Show what their engines spend time and memory on. --json always tells it.")
@json_option
@broker_option
def workers(tree: bool, engine: bool, as_json: bool, broker: tuple[str, ...]) -> None:
    """List the broker's workers with their load."""
    columns, shown = (_ENGINE_COLUMNS, _shown_engine) if engine else (_WORKER_COLUMNS, _shown_worker)
    with connected(broker) as client:
        rows = client.workers(tree=tree)
        _print_rows(rows if as_json else list(map(shown, rows)), columns, as_json=as_json)


def _shown_worker(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the table shows it: what keeps a worker from requests stands with its state."""
    state = [row["state"]]
    state += ["held"] if row["held"] else []
    state += [f"breaker {row['breaker']}"] if row["breaker"] != "closed" else []
    state += ["does not answer"] if row.get("answered") is False else []
    return {**row, "name": _indented(row), "state": ", ".join(state), "tokens_per_s": round(row["tokens_per_s"], 1)}


def _shown_engine(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as the table of engines shows it: parts of time and of caches in percent."""
    percent = {
        "prefill": row["prefill_use"],
        "decode": row["decode_use"],
        "prefix_hits": row["prefix_hits"],
        "kv_use": row["kv_use"],
    }
    return {
        "name": _indented(row),
        "running": row["running"],
        "tokens_per_s": round(row["tokens_per_s"], 1),
        "steps_per_s": round(row["steps_per_s"], 1),
        **{name: f"{part:4.0%}" for name, part in percent.items()},
        "memory": _memory(row["memory_used_bytes"], row["memory_bytes"]),
    }


def _indented(row: Mapping[str, Any]) -> str:
    depth: int = row.get("depth", 0)
    return "  " * depth + str(row["name"])


def _memory(used: int, total: int) -> str | None:
    return f"{used / _GIB:.1f} of {total / _GIB:.1f} GiB" if total else None


@click.command()
@option("--tree", is_flag=True, help="Also the sums over this broker and all that are below it.")
@json_option
@broker_option
def status(tree: bool, as_json: bool, broker: tuple[str, ...]) -> None:
    """Show the broker's state, its waiting rooms and its counters."""
    with connected(broker) as client:
        values = client.status(tree=tree)
        if as_json:
            _print_json(values)
            return
        rooms, remembered, sums = values.pop("waiting"), values.pop("remembered"), values.pop("tree", None)
        sides = values.pop("connections", {})
        for name, value in [*values.items(), *sides.items()]:
            click.echo(f"{name:<11} {_text(value)}")
        for room in rooms:
            click.echo(f"{'waiting':<11} {_room_line(room)}")
        for gone in remembered:
            click.echo(f"{'remembered':<11} {_gone_line(gone)}")
        if sums is not None:
            _print_tree(sums)


def _room_line(room: Mapping[str, Any]) -> str:
    rate = room["rate_per_s"]
    leaving = "none has left yet" if rate is None else f"{rate:.3g} leave a second"
    clients = "1 client" if room["clients"] == 1 else f"{room['clients']} clients"
    return f"{room['model']}: {room['waiting']} of {clients}, the oldest for {room['oldest_s']:.1f} s; {leaving}"


def _gone_line(gone: Mapping[str, Any]) -> str:
    orders = ["held"] if gone["held"] else []
    orders += [] if gone["speed_set"] is None else [f"speed set to {gone['speed_set']:.4g}"]
    return f"{gone['worker']}, which is gone: {', '.join(orders)}"


def _print_tree(sums: dict[str, Any]) -> None:
    brokers = sums.pop("brokers")
    for name, value in sums.items():
        click.echo(f"{'all ' + name:<14} {_text(value)}")
    for row in brokers:
        depth = row["path"].count("/") + 1 if row["path"] else 0
        row["broker"] = "  " * depth + (row["path"] or row["broker"])
    columns = ("broker", "answered", "clients", "workers", "slots", "waiting", "running", "orphaned")
    click.echo(table(brokers, columns))


@click.command(short_help="Tell which worker a request for MODEL would go to.")
@click.argument("model")
@option("--session", show_default="none", metavar="NAME", help="For requests of this session.")
@json_option
@broker_option
def route(model: str, session: str | None, as_json: bool, broker: tuple[str, ...]) -> None:
    """Tell which worker a request for MODEL would go to now, and why."""
    with connected(broker) as client:
        values = client.route(model, session=session)
        if as_json:
            _print_json(values)
            return
        free, waiting = values["candidates"], values["waiting"]
        whom = values["worker"] or "nobody: no worker of it takes requests"
        click.echo(f"{model} -> {whom} ({values['policy']}; workers with a free slot: {free}; waiting: {waiting})")
        if values["considered"]:
            click.echo(table(values["considered"], _CANDIDATE_COLUMNS))


@click.command(short_help="Drop the workers that are gone.")
@json_option
@broker_option
def refresh(as_json: bool, broker: tuple[str, ...]) -> None:
    """Have the broker look for every worker at once, and drop those that are gone."""
    with connected(broker) as client:
        values = client.refresh()
        dropped = ", ".join(values["dropped"]) or "none"
        _print_done(values, f"workers: {values['workers']}; dropped: {dropped}", as_json=as_json)


@click.command(short_help="Send WORKER away for good.")
@click.argument("worker")
@json_option
@broker_option
def remove(worker: str, as_json: bool, broker: tuple[str, ...]) -> None:
    """End the session of WORKER and tell it not to come back; its requests go on at others.

    `drain` is the gentle way.
    """
    with connected(broker) as client:
        values = client.remove(worker)
        _print_done(values, f"{worker} is removed; requests in flight: {values['in_flight']}", as_json=as_json)


@click.command(short_help="Have WORKER finish what it holds and leave.")
@click.argument("worker")
@option(
    "--grace", type=click.FloatRange(min=0), show_default="the worker's own", metavar="S",
    help="Seconds that its running requests get; what is left then goes on at other workers.",
)  # fmt: skip
@option(
    "--wait", type=click.FloatRange(min=0), default=0.0, metavar="S",
    help="Wait so many seconds at most until it has left, or with --stay, finished; exit with 1 if it has not.",
)  # fmt: skip
@option("--stay", is_flag=True, help="Only get no new requests from this broker, until `undrain`, and do not leave.")
@json_option
@broker_option
def drain(worker: str, grace: float | None, wait: float, stay: bool, as_json: bool, broker: tuple[str, ...]) -> None:
    """Have WORKER (a name that `workers` lists) finish what it holds and leave.

    No request fails by it while others serve its model. A worker leaves all its brokers, and exits. A broker below
    this one leaves only this one, and runs on; once it has left, it comes back when it is started anew.
    """
    from .leaving import Leaver  # here: it knows messages, and the help of commands needs none

    with connected(broker) as client:
        leaver = Leaver(client, worker) if wait else None
        values = client.drain(worker, grace_s=grace, stay=stay)
        does = "gets no new requests" if stay else "drains"
        _print_done(values, f"{worker} {does}; requests in flight: {values['in_flight']}", as_json=as_json)
        if leaver:
            leaver.wait(values["in_flight"], wait, stay=stay)
            done = "has finished" if stay else "has left"
            click.echo(f"{worker} {done}", err=as_json)


@click.command()
@click.argument("worker")
@json_option
@broker_option
def undrain(worker: str, as_json: bool, broker: tuple[str, ...]) -> None:
    """Take back a drain of WORKER, also one with --stay."""
    with connected(broker) as client:
        values = client.undrain(worker)
        done = [f"{worker} may get requests again"] if values["held"] else []
        done += [f"{worker} was told not to leave"] if values["told"] else []
        _print_done(values, "; ".join(done), as_json=as_json)


@click.command("set-policy", short_help="Choose workers by POLICY from now on.")
@click.argument("policy")
@json_option
@broker_option
def set_policy(policy: str, as_json: bool, broker: tuple[str, ...]) -> None:
    """Choose workers by POLICY from now on, until the broker is started again."""
    with connected(broker) as client:
        values = client.set_policy(policy)
        _print_done(values, f"policy: {values['policy']}, before: {values['before']}", as_json=as_json)


@click.command("set-speed", short_help="Reckon with SPEED of WORKER, or `auto`.")
@click.argument("worker")
@click.argument("speed")
@json_option
@broker_option
def set_speed(worker: str, speed: str, as_json: bool, broker: tuple[str, ...]) -> None:
    """Reckon with SPEED of WORKER, tokens a second of one stream; `auto`: what it tells or what is measured."""
    try:
        wanted = None if speed == _AUTO else float(speed)
    except ValueError:
        raise click.BadParameter(f"expected a number or {_AUTO}, got {speed!r}", param_hint="SPEED") from None
    with connected(broker) as client:
        values = client.set_speed(worker, wanted)
        reckoned = values["speed"]
        done = "is gone; its speed is forgotten" if reckoned is None else f"is reckoned with {reckoned:.4g} tokens/s"
        _print_done(values, f"{worker} {done}", as_json=as_json)


COMMANDS = tuple(
    each_broker(command)
    for command in (models, workers, status, route, refresh, remove, drain, undrain, set_policy, set_speed)
)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{inner}={number}" for inner, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _print_done(values: Mapping[str, Any], line: str, *, as_json: bool) -> None:
    if as_json:
        _print_json(values)
    else:
        click.echo(line)


def _print_json(values: Mapping[str, Any]) -> None:
    click.echo(json.dumps(values, ensure_ascii=False))


def _print_rows(rows: list[dict[str, Any]], columns: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            _print_json(row)
    else:
        click.echo(table(rows, columns))
