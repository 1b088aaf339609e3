"""What all subcommands share: finding the node, and printing.

Rule: -o json prints the data as it is; the table is for people only.

Theory. The configuration says where the run directory is; PENSTOCK_CONFIG or --config names it,
and --run-dir overrides it. rich is imported when a table is printed.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

DEGRADED = 3


class ListGroup(click.Group):
    """A group that lists unless told otherwise: `penstock node` is `penstock node list`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["list", *args]
        return super().parse_args(ctx, args)


def config_option(function: Callable) -> Callable:
    """Add --config and --run-dir; pass the loaded Config as the first argument."""

    @click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="PENSTOCK_CONFIG",
        help="Configuration file [default: /etc/penstock/config.yaml, or the defaults].",
    )
    @click.option(
        "--run-dir",
        type=click.Path(path_type=Path, file_okay=False),
        envvar="PENSTOCK_RUN_DIR",
        help="Sockets and shared memory, instead of node.run_dir.",
    )
    @functools.wraps(function)
    def wrapper(path: Path | None, run_dir: Path | None, **arguments: Any) -> Any:
        from dataplane.control.config import ConfigError, load
        from dataplane.daemon.notify import EX_CONFIG

        try:
            config = load(path)
        except ConfigError as error:
            click.echo(f"penstock: {error}", err=True)
            sys.exit(EX_CONFIG)
        if run_dir is not None:
            node = config.node.model_copy(update={"run_dir": run_dir.absolute()})
            config = config.model_copy(update={"node": node})
        return function(config, path=path, **arguments)

    return wrapper


def output_option(function: Callable) -> Callable:
    """Add -o/--output."""
    return click.option(
        "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True
    )(function)


def show(rows: Any, output: str, columns: Sequence[str] = (), title: str = "") -> None:
    """Print rows (dicts) as a table with these columns, or anything as JSON."""
    if output == "json":
        click.echo(json.dumps(rows, indent=1, default=str))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name in columns:
        numeric = bool(rows) and isinstance(rows[0].get(name), int | float)
        table.add_column(name.upper().replace("_", " "), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in columns))
    wide = None if sys.stdout.isatty() else 200
    Console(width=wide, highlight=False, markup=False).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def ask(config: Any, op: str, **arguments: Any) -> Any:
    """Ask the agent. Raises Unreachable with what to do."""
    from dataplane.control.jsonl import Unreachable, call

    try:
        return call(config.run_dir / "api.sock", op, **arguments)
    except Unreachable as error:
        raise Unreachable(f"the agent does not answer ({error}): is `penstock run` up?") from error
