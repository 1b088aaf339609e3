"""penstock lb.

Rule: what stands in shared memory is shown without the agent; names come from the file beside it.

Theory. A row of the service table knows no name; the engine keeps them in a file. Where that has
none, the row's number is shown, never a guess.
"""

import sys
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import ListGroup, config_option, output_option, show

BACKENDS_SHOWN = 4  # in a cell of the table; -o json has all


@click.group(cls=ListGroup)
def lb() -> None:
    """Services: frontends, backends, Maglev tables."""


@lb.command("list")
@config_option
@output_option
@click.option("--frontends", "what", flag_value="frontends", help="Frontends with their rows.")
@click.option("--backends", "what", flag_value="backends", help="Backends with their state.")
@click.option("--maglev", metavar="SERVICE", help="Shares in the Maglev tables of NAMESPACE/NAME.")
def lb_list(
    config: Any, path: Path | None, output: str, what: str | None, maglev: str | None
) -> None:
    """Frontends and the backends that clients inside the cluster get, or what an option says."""
    from dataplane.services import names
    from dataplane.tables.shm import Shm

    with Shm.open(config.run_dir) as shm:
        called = names.read(shm.folder / names.FILE)
        if maglev is not None:
            _maglev(shm, called, maglev, output)
        elif what == "backends":
            _backends(shm, called, output)
        elif what == "frontends":
            _frontends(shm, called, output)
        else:
            _services(shm, called, output)


def _named(row: int, called: dict[int, str]) -> dict[str, str]:
    from dataplane.services.names import split

    service, kind = split(called.get(row, ""))
    return {"service": service or ("" if kind else f"row {row}"), "kind": kind}


def _shown(address: str, port: int, protocol: str) -> str:
    if protocol == "any":
        return address
    return f"[{address}]:{port}/{protocol}" if ":" in address else f"{address}:{port}/{protocol}"


def _services(shm: Any, called: dict[int, str], output: str) -> None:
    from dataplane.tables import service_view

    rows = []
    lists: dict[int, dict[str, Any]] = {}
    for entry in service_view.frontends(shm):
        number = entry["service"]
        if number not in lists:
            lists[number] = {
                f"{side}_backends": service_view.listed(shm, number, side)
                for side in service_view.SIDES
            }
        rows.append(
            {
                "frontend": _shown(entry["address"], entry["port"], entry["protocol"]),
                **entry,
                **_named(number, called),
                "row": number,
                **lists[number],
            }
        )
    if output == "table":
        for row in rows:
            row["backends"], row["from outside"] = _both_sides(row)
    show(rows, output, ("frontend", "service", "kind", "backends", "from outside", "flags"))


def _both_sides(row: dict[str, Any]) -> tuple[str, str]:
    """What clients inside the cluster get, and others."""
    inside, outside = row["inside_backends"], row["outside_backends"]
    if "address" in row["flags"]:
        return "", ""
    if "cluster ip" in row["flags"]:
        return _cell(inside), "refused"
    return _cell(inside), "the same" if inside == outside else _cell(outside)


def _cell(backends: list[dict[str, Any]]) -> str:
    texts = [
        _shown(one["address"], one["port"], one["protocol"]).rpartition("/")[0]
        + ("" if one["state"] == "active" else f" ({one['state']})")
        for one in backends
    ]
    more = len(texts) - BACKENDS_SHOWN
    shown = texts[:BACKENDS_SHOWN] + ([f"{more} more"] if more > 0 else [])
    return ", ".join(shown) or "none"


def _frontends(shm: Any, called: dict[int, str], output: str) -> None:
    from dataplane.tables import service_view

    rows = [
        {**entry, "row": entry["service"], **_named(entry["service"], called)}
        for entry in service_view.frontends(shm)
    ]
    _plain_ports(rows, output)
    columns = ("address", "port", "protocol", "service", "kind", "row", "inside", "outside")
    rest = ("inside_maglev", "outside_maglev", "affinity_s", "sources", "flags")
    show(rows, output, (*columns, *rest))


def _plain_ports(rows: list[dict[str, Any]], output: str) -> None:
    """In the table a port is no number to be grouped by thousands."""
    if output == "table":
        for row in rows:
            row["port"] = str(row["port"])


def _backends(shm: Any, called: dict[int, str], output: str) -> None:
    from dataplane.tables import service_view

    rows = service_view.backends(shm)
    for row in rows:
        found = {_named(number, called)["service"]: None for number in row["services"]}
        row["rows"], row["services"] = row["services"], list(found)
    _plain_ports(rows, output)
    show(rows, output, ("backend", "address", "port", "protocol", "state", "services"))


def _maglev(shm: Any, called: dict[int, str], wanted: str, output: str) -> None:
    from dataplane.tables import service_view

    rows = []
    known = False
    for number in sorted(called, key=called.__getitem__):
        named = _named(number, called)
        if wanted in (named["service"], named["service"].rpartition(":")[0]):
            known = True
            rows += [{**named, **share} for share in service_view.maglev(shm, number)]
    if not rows:
        why = "has no Maglev table" if known else "is not known: `penstock lb list` shows all"
        click.echo(f"service {wanted} {why}", err=True)
        sys.exit(1)
    _plain_ports(rows, output)
    columns = ("service", "kind", "side", "address", "port", "state", "entries", "size", "share")
    show(rows, output, columns)
