"""penstock ct, nat.

Rule: lists come from shared memory and need no daemon; only `flush` asks the forwarder.

Theory. Columns are the original direction as it came in, an arrow, and the translated side where it
differs; -o json has every field of the record.
"""

import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import ListGroup, config_option, output_option, show

COLUMNS = ("protocol", "state", "from", "to", "translated", "packets", "reply_packets", "idle_s")


def _select(address: str, port: int | None, protocol: str, nat: bool) -> Any:
    from dataplane.tables.connection_view import NUMBERS, Select

    try:
        parsed = ip_address(address) if address else None
    except ValueError as error:
        raise click.BadParameter(f"{address!r} is no IPv4 or IPv6 address") from error
    if protocol and protocol not in NUMBERS and not protocol.isdigit():
        raise click.BadParameter(f"{protocol!r} is none of {', '.join(NUMBERS)}, nor a number")
    number = NUMBERS.get(protocol, int(protocol) if protocol.isdigit() else None)
    return Select(parsed, port, number, nat)


def _selection(function: Any) -> Any:
    """Add the options that select connections."""
    options = [
        click.option("--ip", "address", default="", help="An end's address, before or after NAT."),
        click.option("--port", type=click.IntRange(0, 65535), help="And its port."),
        click.option("--protocol", default="", help="tcp, udp, sctp, icmp, icmp6 or a number."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _list(config: Any, select: Any, limit: int, output: str) -> None:
    from dataplane.tables.connection_view import connections
    from dataplane.tables.shm import Shm

    rows = connections(Shm.open(config.run_dir), select, limit)
    show(rows if output == "json" else [_line(row) for row in rows], output, COLUMNS)


def _end(address: str, port: int) -> str:
    text = f"[{address}]" if ":" in address else address
    return f"{text}:{port}" if port else address


def _line(row: dict[str, Any]) -> dict[str, Any]:
    source = _end(row["source"], row["source_port"])
    target = _end(row["destination"], row["destination_port"])
    new_source = _end(row["reply_destination"], row["reply_destination_port"])
    new_target = _end(row["reply_source"], row["reply_source_port"])
    if row["protocol"] in ("icmp", "icmp6"):  # the identifier, whichever way it stands
        target, new_target = row["destination"], row["reply_source"]
    changed = []
    if new_source != source:
        changed.append(f"from {new_source}")
    if new_target != target:
        changed.append(f"to {new_target}")
    return {**row, "from": source, "to": target, "translated": ", ".join(changed)}


@click.group(cls=ListGroup)
def ct() -> None:
    """Connections: list, status, flush."""


@ct.command("list")
@_selection
@click.option("--last", default=100, show_default=True, help="How many, newest first.")
@config_option
@output_option
def ct_list(
    config: Any, path: Path | None, output: str, last: int, address: str, port: int | None,
    protocol: str,
) -> None:  # fmt: skip
    """Connections with state, translation and counters, newest first."""
    _list(config, _select(address, port, protocol, False), last, output)


@ct.command("status")
@config_option
@output_option
def ct_status(config: Any, path: Path | None, output: str) -> None:
    """How full the table is, and what was done about connections."""
    from dataplane.tables.connection_view import Select, numbers, totals
    from dataplane.tables.shm import Shm

    shm = Shm.open(config.run_dir)
    found = totals(shm)
    live = sum(len(part) for part in numbers(shm, Select()))
    state = {"live": live, "pressure_percent": round(100 * live / max(1, found["capacity"]), 1)}
    state.update(found)
    show(state if output == "json" else [state], output, tuple(state))


@ct.command("flush")
@_selection
@config_option
def ct_flush(
    config: Any, path: Path | None, address: str, port: int | None, protocol: str
) -> None:  # fmt: skip
    """Forget connections: all, or those that fit. Live ones are judged and made anew."""
    from dataplane.control.jsonl import Unreachable, call

    _select(address, port, protocol, False)
    wanted: dict[str, Any] = {"address": address, "port": port, "protocol": protocol}
    try:
        answer = call(config.run_dir / "forwarder.sock", "flush", **wanted)
    except Unreachable as error:
        click.echo(f"penstock: the forwarder does not answer ({error})", err=True)
        sys.exit(1)
    click.echo(f"{answer['forgotten']} connections forgotten", err=True)


@click.group(cls=ListGroup)
def nat() -> None:
    """Translated connections, and destinations that have run out of source ports."""


@nat.command("list")
@_selection
@click.option("--last", default=100, show_default=True, help="How many, newest first.")
@config_option
@output_option
def nat_list(
    config: Any, path: Path | None, output: str, last: int, address: str, port: int | None,
    protocol: str,
) -> None:  # fmt: skip
    """Connections whose addresses or ports are rewritten."""
    _list(config, _select(address, port, protocol, True), last, output)


@nat.command("exhausted")
@config_option
@output_option
def nat_exhausted(config: Any, path: Path | None, output: str) -> None:
    """Destinations for which no source port was left, with the packets refused."""
    from dataplane.tables.connection_view import exhausted
    from dataplane.tables.shm import Shm

    columns = ("destination", "port", "protocol", "refused", "last_s")
    show(exhausted(Shm.open(config.run_dir)), output, columns)
