"""penstock ipam: pools, leases, history.

Rule: reads the state file itself, so it works while the agent is down.

Theory. SQLite's WAL lets a reader look while the agent writes.
"""

import time
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option, output_option, show


def _ipam(config: Any) -> Any:
    from ipam.service import Ipam

    path = config.state_dir / "ipam.db"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the agent has not run here")
    return Ipam.open(path)


@click.group()
def ipam() -> None:
    """Addresses of this node's pods."""


@ipam.command()
@config_option
@output_option
def pools(config: Any, path: Path | None, output: str) -> None:
    """Pools and their use."""
    show(_ipam(config).usage(), output, ("cidr", "size", "used", "resting", "free"))


@ipam.command("list")
@config_option
@output_option
def leases(config: Any, path: Path | None, output: str) -> None:
    """Leases, oldest first."""
    rows = [
        {
            "addresses": [str(address) for _, address in sorted(lease.addresses.items())],
            "owner": lease.owner.get("pod", ""),
            "network": lease.key[0],
            "container": lease.key[1],
            "ifname": lease.key[2],
            "age_s": int(time.time() - lease.created),
        }
        for lease in _ipam(config).leases()
    ]
    show(rows, output, ("addresses", "owner", "network", "container", "ifname", "age_s"))


@ipam.command()
@config_option
@output_option
@click.option("--last", default=50, show_default=True, help="How many events.")
def history(config: Any, path: Path | None, output: str, last: int) -> None:
    """What happened, newest first."""
    rows = _ipam(config).history(last)
    for row in rows:
        row["when"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(row["time"]))
    show(rows, output, ("when", "event", "addresses", "network", "container", "ifname"))
