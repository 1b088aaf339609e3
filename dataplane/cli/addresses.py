"""penstock ipam: pools, leases, history; node CIDRs out of the cluster's pools.

Rule: reads the state file itself, so it works while the agent is down.

Theory. SQLite's WAL lets a reader look while the agent writes. Node CIDRs are carved by one hand:
agents that each carved for themselves would disagree about nodes that come and go. Whoever writes
the Node objects asks `penstock ipam carve` on one machine and puts the answer into them.
"""

import time
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import ListGroup, config_option, output_option, show


def _ipam(config: Any) -> Any:
    from ipam.service import Ipam

    path = config.state_dir / "ipam.db"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the agent has not run here")
    return Ipam.open(path)


def _cluster(config: Any) -> Any:
    from ipaddress import ip_network

    from ipam.cluster import ClusterPools

    if not config.network.pools:
        raise ValueError("network.pools is empty: name the cluster's pools in the configuration")
    pools: dict[int, Any] = {
        ip_network(pool.cidr).version: (ip_network(pool.cidr), pool.mask_size)
        for pool in config.network.pools
    }
    config.state_dir.mkdir(parents=True, exist_ok=True)
    return ClusterPools.open(config.state_dir / "cluster.db", pools)


@click.group(cls=ListGroup)
def ipam() -> None:
    """Addresses of this node's pods; node CIDRs of the cluster."""


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
            "owner": _owner(lease.owner),
            "network": lease.key[0],
            "container": lease.key[1],
            "ifname": lease.key[2],
            "age_s": int(time.time() - lease.created),
        }
        for lease in _ipam(config).leases()
    ]
    show(rows, output, ("addresses", "owner", "network", "container", "ifname", "age_s"))


def _owner(owner: Any) -> str:
    return f"{owner['namespace']}/{owner['name']}" if owner.get("name") else ""


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


@ipam.command()
@click.argument("nodes", nargs=-1, required=True)
@config_option
@output_option
def carve(config: Any, path: Path | None, nodes: tuple[str, ...], output: str) -> None:
    """Give NODES their CIDRs of network.pools, the same ones each time; for spec.podCIDRs."""
    cluster = _cluster(config)
    show([_node_row(name, cluster.carve(name)) for name in nodes], output, ("node", "podCIDRs"))


@ipam.command()
@click.argument("node")
@config_option
@output_option
def reclaim(config: Any, path: Path | None, node: str, output: str) -> None:
    """Take back the CIDRs of a NODE that has left."""
    show([_node_row(node, _cluster(config).release(node))], output, ("node", "podCIDRs"))


@ipam.command()
@config_option
@output_option
def cluster(config: Any, path: Path | None, output: str) -> None:
    """The cluster's pools, in node CIDRs, and the nodes that have some."""
    found = _cluster(config)
    nodes = [_node_row(name, cidrs) for name, cidrs in found.nodes().items()]
    if output == "json":
        show({"pools": found.usage(), "nodes": nodes}, output)
        return
    show(found.usage(), output, ("cidr", "mask_size", "size", "used", "free"))
    show(nodes, output, ("node", "podCIDRs"))


def _node_row(name: str, cidrs: Any) -> dict[str, Any]:
    return {"node": name, "podCIDRs": [str(cidr) for _, cidr in sorted(cidrs.items())]}
