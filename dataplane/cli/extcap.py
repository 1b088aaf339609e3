"""penstock extcap: pods as interfaces in Wireshark.

Rule: stdout says what doc/extcap.4 of Wireshark asks for, and nothing else.

Theory. Wireshark runs every program of its extcap folder, asks for interfaces and options, and
starts one with a fifo when a person chooses it. deploy/extcap/penstock is such a program: it hands
its arguments on to here. `penstock` stands for all devices, `penstock-DEVICE` for one pod.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option

ALL = "penstock"
ARGUMENTS = (
    "arg {number=0}{call=--verdict}{display=Verdict}{type=selector}{default=any}",
    "value {arg=0}{value=any}{display=any}{default=true}",
    "value {arg=0}{value=forwarded}{display=forwarded}",
    "value {arg=0}{value=dropped}{display=dropped}",
    "arg {number=1}{call=--reason}{display=Drop reason}{type=string}"
    "{tooltip=number or text, such as Policy denied}",
)


@click.command()
@click.option("--extcap-interfaces", "interfaces", is_flag=True, help="List them.")
@click.option("--extcap-version", "version", default="", help="Wireshark's version; not used.")
@click.option("--extcap-interface", "interface", default="", help="One of them.")
@click.option("--extcap-dlts", "dlts", is_flag=True, help="Its link type.")
@click.option("--extcap-config", "options", is_flag=True, help="Its options.")
@click.option("--extcap-capture-filter", "filter", default="", help="pcap filter.")
@click.option("--capture", "start", is_flag=True, help="Capture into the fifo.")
@click.option("--fifo", default="", help="Where to.")
@click.option("--verdict", default="any", help="As of penstock capture.")
@click.option("--reason", default="", help="As of penstock capture.")
@config_option
def extcap(
    config: Any, path: Path | None, interfaces: bool, version: str, interface: str, dlts: bool,
    options: bool, filter: str, start: bool, fifo: str, verdict: str, reason: str,
) -> None:  # fmt: skip
    """What Wireshark's extcap interface asks for (deploy/extcap/penstock)."""
    if interfaces:
        _list(config)
    elif not interface:
        raise click.UsageError("--extcap-interfaces or --extcap-interface NAME is needed")
    elif dlts:
        click.echo("dlt {number=1}{name=EN10MB}{display=Ethernet}")
    elif options:
        for line in ARGUMENTS:
            click.echo(line)
    elif start:
        if not fifo:
            raise click.UsageError("--capture needs --fifo")
        _capture(config, interface, filter, fifo, verdict, reason)
    elif filter:
        _check(filter)


def _list(config: Any) -> None:
    from dataplane.cli.capture import owners
    from dataplane.tables import view
    from dataplane.tables.errors import TableError
    from dataplane.tables.shm import Shm

    click.echo("extcap {version=1.0}{display=Penstock}")
    try:
        rows = view.ports(Shm.open(config.run_dir))
    except (TableError, OSError):
        return  # no daemon here: no interfaces, and no complaint in Wireshark's list
    names = owners(config)
    click.echo(f"interface {{value={ALL}}}{{display=Penstock: all packets, with verdicts}}")
    for row in rows:
        said = names.get(row["name"]) or f"{row['kind']} {row['name']}"
        click.echo(f"interface {{value={ALL}-{row['name']}}}{{display=Penstock: {said}}}")


def _check(filter: str) -> None:
    """Say nothing of a good filter; anything that is said makes it a bad one."""
    from dataplane.capture.filters import FilterError, compile_filter

    try:
        compile_filter(filter)
    except FilterError as error:
        click.echo(str(error))


def _capture(
    config: Any, interface: str, filter: str, fifo: str, verdict: str, reason: str
) -> None:  # fmt: skip
    from dataplane.cli.capture import asked, session, write_packets

    device = interface.removeprefix(ALL).removeprefix("-")
    reasons = (reason,) if reason else ()
    wanted = asked(config, (filter,), device, 0, verdict, reasons)
    with suppress(BrokenPipeError):  # the capture was stopped; closing the fifo says it once more
        with open(fifo, "wb") as file, session(config, wanted) as one:
            write_packets(one, file)
