"""penstock profile.

Rule: what a machine cannot tell is said, not left out.

Theory. One window is shown as tables or JSON; a flame graph goes to a file. Everything comes from
shared memory and perf: the agent and the forwarder are not asked, and pay nothing.
"""

import time
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option, output_option, show

SECONDS_LEAST, SECONDS_MOST = 0.5, 600.0
COLUMNS = (
    "worker", "pps", "packets_per_vector", "cpu", "ns_per_packet", "rx_waiting", "tx_waiting",
    "sleeps_per_s", "system_calls_per_packet", "kick_errors", "free_frames",
)  # fmt: skip


@click.command()
@config_option
@output_option
@click.option(
    "--seconds",
    type=click.FloatRange(SECONDS_LEAST, SECONDS_MOST),
    default=3.0,
    show_default=True,
    help="The window; the flow table's counters are collected once a second.",
)
@click.option(
    "--flame",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also a flame graph: FILE.svg, or FILE.json for speedscope. Needs root and perf.",
)
@click.option("--watch", is_flag=True, help="Window after window, until interrupted.")
def profile(
    config: Any, path: Path | None, output: str, seconds: float, flame: Path | None, watch: bool
) -> None:
    """Where a packet's time goes: vectors, stages, rings, system calls, flow table.

    Examples:

      penstock profile --seconds 5

      penstock profile --flame profile.svg; penstock profile -o json --flame profile.json
    """
    from dataplane.tables.shm import Shm

    if flame is not None and flame.suffix not in (".svg", ".json"):
        raise click.BadParameter(f"{flame}: must end in .svg or .json", param_hint="--flame")
    with Shm.open(config.run_dir) as shm:
        while True:
            found = _one(shm, seconds, flame)
            if output == "json":
                show(found, output)
            else:
                if watch:
                    click.clear()
                _print(found)
            if not watch:
                return


def _one(shm: Any, seconds: float, flame: Path | None) -> dict[str, Any]:
    from dataplane.profiling import flame as graph
    from dataplane.profiling import hardware, stacks, window

    before = window.moment(shm)
    tids = [int(tid) for tid in before.workers["tid"] if tid]
    counting = hardware.start(tids, seconds)
    recording = stacks.Recording(seconds) if flame is not None else None
    time.sleep(seconds)
    found = window.between(before, window.moment(shm))
    counts, why = hardware.finish(counting)
    found["hardware"] = {"counts": counts, "note": why}
    if recording is not None and flame is not None:
        samples = recording.samples()
        title = f"penstock, {seconds:g} s"
        graph.write(stacks.folded(samples, found), flame, title)
        found["flame"] = {"file": str(flame), "samples": len(samples), "note": recording.why}
    return found


def _print(found: dict[str, Any]) -> None:
    workers = found["workers"]
    show(workers, "table", COLUMNS, f"workers, {found['seconds']:g} s")
    stages: dict[str, float] = next((row["stages"] for row in workers if row["stages"]), {})
    if stages:
        rows = [{"worker": row["worker"], **row["stages"]} for row in workers]
        show(rows, "table", ("worker", *stages), "ns a packet by stage")
    else:
        click.echo("stages: no packet has passed a worker in this window")
    calls = [{"worker": row["worker"], **row["system_calls"]} for row in workers]
    titles = "system calls (polls: epoll_wait, kicks: sendto, yields: sched_yield)"
    show(calls, "table", ("worker", "polls", "kicks", "yields"), titles)
    table, rate = found["flow_table"], found["flow_table"]["hit_rate"]
    share = "no packets" if rate is None else f"{100 * rate:.1f} % of all packets"
    click.echo(f"flow table: {table['pps']:,} packets a second, {share}")
    known = [f"{name} {n:,}" for name, n in found["hardware"]["counts"].items() if n is not None]
    click.echo(f"hardware: {', '.join(known) or 'nothing counted'}")
    if note := found["hardware"]["note"]:
        click.echo(f"hardware: {note}")
    if flame := found.get("flame"):
        click.echo(f"flame graph: {flame['file']}, {flame['samples']} samples")
        if flame["note"]:
            click.echo(f"flame graph: the kernel's part is missing: {flame['note']}")
