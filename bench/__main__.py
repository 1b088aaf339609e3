"""`penstock bench`: measure, show, compare.

Rule: what a command prints for people goes to stderr where stdout has data; files are results.

Theory. `penstock bench` runs this module in a process of its own, since the harness is not part of
the product's layers. Without a command it runs scenarios: all, the quick ones, or those that are
named. Everything else works on files of results, needs no root and nothing of the machine.
"""

import os
import signal
import sys
import time
from pathlib import Path

import click
from rich.console import Console

from bench import claims, machine, report, results, searches
from bench import compare as comparison
from bench.drivers import DRIVERS, driver
from bench.lab import LabError
from bench.measure import How
from bench.run import Options, Run, stamp
from bench.scenario import cases, choose, load_all
from bench.subjects import NAMES

RESULTS = Path(__file__).parent / "results"


class Main(click.Group):
    """Runs scenarios when no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LabError as error:
            click.echo(f"penstock bench: {error}", err=True)
            sys.exit(1)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measure Penstock beside its peers, on one machine, turn by turn.

    Examples:

      penstock bench --quick

      penstock bench same vxlan --runs 3 --subject penstock --subject "linux + nft"

      penstock bench compare before.json after.json
    """


@main.command()
@click.argument("names", nargs=-1)
@click.option(
    "--quick", is_flag=True, help="Short: two turns, one case a list, fewer peers: two minutes."
)
@click.option("--runs", type=click.IntRange(1), help="Turns.  [default: 5, quick: 2]")
@click.option("--seconds", type=float, help="A measurement's window.  [default: 1, quick: 0.4]")
@click.option("--subject", "subjects", multiple=True, help="Only these, by name.")
@click.option("--driver", "driver_name", default="frames", type=click.Choice(list(DRIVERS)))
@click.option("--server", help="Of a remote driver: host name or address.")
@click.option("--pcap", type=Path, help="Of the driver pcap: the file to send.")
@click.option("--csit", is_flag=True, help="Search as exactly as CSIT does: minutes a subject.")
@click.option("-o", "--output", type=Path, help="Where the results go (JSON).")
@click.option("--html/--no-html", default=True, help="Also a page with plots beside it.")
def run(
    names: tuple[str, ...],
    quick: bool,
    runs: int | None,
    seconds: float | None,
    subjects: tuple[str, ...],
    driver_name: str,
    server: str | None,
    pcap: Path | None,
    csit: bool,
    output: Path | None,
    html: bool,
) -> None:
    """Run scenarios by name or file (default: all). Needs root."""
    if os.geteuid():
        raise LabError("network namespaces and XDP need root: sudo penstock bench")
    for name in subjects:
        if name not in NAMES:
            raise LabError(f"no subject {name!r}: {', '.join(NAMES)}")
    chosen = choose(names, quick)
    options = {"server": server, "pcap": str(pcap) if pcap else None}
    how = How(
        seconds if seconds is not None else (0.4 if quick else 1.0),
        driver_name,
        {name: text for name, text in options.items() if text},
        searches.CSIT if csit else searches.QUICK,
    )
    driver(driver_name)
    asked = Options(runs or (2 if quick else 5), quick, how, subjects)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work, started = Run(chosen, asked, console), time.time()
    about = {"machine": machine.facts(), "versions": machine.versions()}
    problem: BaseException | None = None
    try:
        work.go()
    except (KeyboardInterrupt, Exception) as error:
        problem = error
        console.print("ended early: what has been found is kept", style="yellow")
    about["run"] = {
        "started": round(started),
        "took_s": round(time.time() - started, 1),
        "turns": asked.runs,
        "seconds": how.seconds,
        "driver": driver_name,
        "command": " ".join(["penstock", "bench", *sys.argv[1:]]),
    }
    path = output or RESULTS / f"{stamp()}.json"
    whole = work.results.plain(about)
    results.dump(path, whole)
    report.show(results.read(path), report.terminal())
    console.print(f"written to {path}", highlight=False)
    if html:
        write_page(path)
    if problem is not None and not isinstance(problem, KeyboardInterrupt):
        raise problem
    sys.exit(130 if problem else 0 if whole["rows"] else 1)


def write_page(path: Path) -> None:
    """Write the page and the plots beside a file of results."""
    from bench import page

    files = page.write(results.read(path), path.with_suffix(".html"))
    click.echo(f"written to {files[0]}, {len(files) - 1} pictures in {path.with_suffix('')}")


@main.command("list")
def list_() -> None:
    """List scenarios, subjects and drivers."""
    console = Console()
    for name, one in load_all().items():
        marks = ", quick" if one.quick else ""
        csit = f"  [dim]{one.csit}[/dim]" if one.csit else ""
        console.print(f"[bold]{name}[/bold]  {one.title} ({len(cases(one))} cases{marks}){csit}")
    console.print("\nsubjects: " + ", ".join(NAMES), markup=False, highlight=False)
    for name, text in DRIVERS.items():
        console.print(f"driver {name}: {text}", highlight=False)


@main.command()
@click.argument("path", type=Path)
@click.option("--markdown", is_flag=True, help="As the README's table.")
def show(path: Path, markdown: bool) -> None:
    """Print the table of a file of results."""
    whole = results.read(path)
    if markdown:
        click.echo(claims.markdown(whole))
        click.echo(report.markdown(whole), nl=False)
    else:
        report.show(whole, report.terminal())


@main.command()
@click.argument("before", type=Path)
@click.argument("after", type=Path)
@click.option("--all", "everybody", is_flag=True, help="Peers too: how steady the machine was.")
def compare(before: Path, after: Path, everybody: bool) -> None:
    """Compare two files of results. Exit status 1 when a number of ours is worse for certain."""
    one, two = results.read(before), results.read(after)
    sys.exit(bool(comparison.show(one, two, report.terminal(), everybody)))


@main.command()
@click.argument("devices", nargs=-1, required=True, metavar="DEVICE[@NAMESPACE][=MAC]...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--sync-port", default=4501, show_default=True, help="Of requests.")
@click.option("--async-port", default=4500, show_default=True, help="Of the publisher.")
@click.option("--cpu", "cpus", multiple=True, type=int, help="Of the generators, port by port.")
def trex(
    devices: tuple[str, ...], host: str, sync_port: int, async_port: int, cpus: tuple[int, ...]
) -> None:
    """Be a stateless TRex server whose ports are these devices. Needs root.

    MAC: where streams go that leave their target to the port.
    """
    from bench.trex.ports import Device
    from bench.trex.server import serve

    serve([Device.parse(text) for text in devices], host, sync_port, async_port, cpus)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def engine(words: tuple[str, ...]) -> None:
    """The engine alone, packets from memory: ns a packet and stage (--quick, --flows, --json)."""
    from bench.engine import main as measure

    sys.exit(measure(list(words)))


@main.command("report")
@click.argument("path", type=Path)
def report_(path: Path) -> None:
    """Write page and pictures of a file of results again."""
    write_page(path)


if __name__ == "__main__":
    main()
