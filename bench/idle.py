"""What a node costs while nothing happens: CPU time of every thread. `python -m bench.idle`.

Rule: what the scheduler has charged to the threads (schedstat, ns), not what a sampler has seen.

Theory. A dataplane that polls takes a core from the workloads of every node. Penstock's worker
sleeps in epoll after `spin_us`; what is left are heartbeats, ageing, and looking for news. One node
with two pods, after it has settled; threads below 0.005 % of a core are summed up, not shown.
"""

import time
from pathlib import Path

import click

from bench.lab import Lab
from bench.scenario import Place
from bench.subjects.ours import Penstock

SETTLE_S = 15
SHOWN_PERCENT = 0.005

Thread = tuple[int, int]  # process, thread


def _charged(pids: list[int]) -> dict[Thread, int]:
    """Return what the threads of these processes have used, in nanoseconds."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                found[pid, int(task.name)] = int((task / "schedstat").read_text().split()[0])
            except OSError:
                continue  # it has ended
    return found


def _part(pid: int) -> str:
    """Return which part of Penstock a process is: run, agent, forwarder, observer."""
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[words.index("dataplane.cli.main") + 1]


@click.command()
@click.option("--seconds", default=20, show_default=True, help="How long is looked.")
def main(seconds: int) -> None:
    """Print the share of a core of every thread, and the sum."""
    with Lab() as lab:
        node = Penstock(lab, Place("same", 4)).cluster.nodes[0]
        time.sleep(SETTLE_S)
        parts = {pid: _part(pid) for pid in node.namespace.pids()}
        before = _charged(list(parts))
        time.sleep(seconds)
        after = _charged(list(parts))
    shares = {key: (ns - before.get(key, 0)) / seconds / 1e7 for key, ns in after.items()}
    for (pid, thread), share in sorted(shares.items()):
        if share >= SHOWN_PERCENT:
            click.echo(f"{share:6.3f} %  {parts[pid]:10} {'' if thread == pid else thread}")
    click.echo(f"{sum(shares.values()):6.3f} %  of a core, all")


if __name__ == "__main__":
    main()
