"""penstock status, endpoint, node, route, port, counters, flows, plan.

Rule: what stands in shared memory is shown without the agent.

Theory. Counters, ports, flows and routes are read from shared memory; names and plans need the
agent.
"""

import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import (
    DEGRADED,
    ListGroup,
    ask,
    config_option,
    output_option,
    show,
)


def _shm(config: Any) -> Any:
    from dataplane.tables.shm import Shm

    return Shm.open(config.run_dir)


@click.command()
@config_option
@output_option
def status(config: Any, path: Path | None, output: str) -> None:
    """What this node is doing, and what is wrong. Exit status 3 when degraded."""
    from dataplane.control.jsonl import Unreachable

    try:
        state = ask(config, "status")
    except Unreachable as error:
        state = {"ready": False, "agent": None, "errors": [str(error)], **_without_agent(config)}
    state["observer"] = _observer(config)
    if output == "json":
        show(state, output)
    else:
        _print(state)
    sys.exit(0 if state["ready"] else DEGRADED)


def _without_agent(config: Any) -> dict[str, Any]:
    from dataplane.control.jsonl import RemoteError, Unreachable, call

    try:
        forwarder = call(config.run_dir / "forwarder.sock", "status", 2.0)
    except (Unreachable, RemoteError):
        forwarder = None
    return {"forwarder": forwarder, "node": {}, "endpoints": None}


def _observer(config: Any) -> dict[str, Any] | None:
    """What the observer reported; {}: it is switched off."""
    from dataplane.observe import report

    return report.read(config.run_dir / report.FILE) if config.observe.enabled else {}


def _seen(observer: dict[str, Any] | None) -> str:
    if not observer:
        return "down" if observer is None else "off"
    text = f"Ok  pid {observer['pid']}, {observer['flows']:,} flows, {observer['rate']:,} a second"
    names = ("lost", "left_out", "not_written")
    more = [f"{observer.get(name, 0):,} {name.replace('_', ' ')}" for name in names]
    return ", ".join([text, *(one for one in more if not one.startswith("0 "))])


def _print(state: dict[str, Any]) -> None:
    forwarder, node = state["forwarder"], state.get("node") or {}
    rows = [
        ("Agent", f"Ok  pid {state['agent']['pid']}" if state["agent"] else "down"),
        ("Forwarder", "down"),
        ("Node", f"{node.get('node', '?')}  {', '.join(node.get('pod_cidrs', []))}"),
    ]
    if forwarder:
        ready = sum(port["ready"] for port in forwarder["ports"])
        text = f"Ok  pid {forwarder['pid']}, {forwarder['workers']} workers, "
        rows[1] = ("Forwarder", f"{text}{ready}/{len(forwarder['ports'])} ports ready")
        if forwarder.get("captures"):
            many = f"{forwarder['captures']} open"
            resting = "" if forwarder["flow_table"]["on"] else "; XDP's flow table rests meanwhile"
            rows.append(("Captures", many + resting))
    if node.get("mode"):
        mode = node["tunnel"] or "direct"
        text = f"{mode} from {node['underlay']} on {', '.join(node['uplinks'])}"
        rows.append(("Network", f"{text}, path MTU {node['path_mtu']}"))
        rows.append(("Remote nodes", ", ".join(node["remote_nodes"]) or "none"))
    rows.append(("Observer", _seen(state["observer"])))
    rows.append(("Endpoints", "?" if state["endpoints"] is None else str(state["endpoints"])))
    for name, text in rows:
        click.echo(f"{name + ':':<14}{text}")
    for error in state["errors"]:
        click.echo(f"{'Error:':<14}{error}")


ENDPOINT_COLUMNS = ("number", "pod", "ipv4", "ipv6", "host_ifname", "mac", "container")


@click.group(cls=ListGroup)
def endpoint() -> None:
    """Pods attached to this node."""


@endpoint.command("list")
@config_option
@output_option
def endpoint_list(config: Any, path: Path | None, output: str) -> None:
    """All of them."""
    show(ask(config, "endpoints"), output, ENDPOINT_COLUMNS)


@endpoint.command("get")
@click.argument("name")
@config_option
@output_option
def endpoint_get(config: Any, path: Path | None, name: str, output: str) -> None:
    """Those that NAME fits: number, namespace/pod, address, device or start of a container id."""
    keys = ("number", "pod", "ipv4", "ipv6", "host_ifname")
    rows = [
        row
        for row in ask(config, "endpoints")
        if name in [str(row[key]) for key in keys] or (name and row["container"].startswith(name))
    ]
    if not rows:
        click.echo(f"no endpoint {name}: `penstock endpoint list` shows all", err=True)
        sys.exit(1)
    show(rows, output, ENDPOINT_COLUMNS)


@click.group(cls=ListGroup)
def node() -> None:
    """Nodes of the cluster."""


@node.command("list")
@config_option
@output_option
def node_list(config: Any, path: Path | None, output: str) -> None:
    """All of them."""
    show(ask(config, "nodes"), output, ("name", "internal_ips", "pod_cidrs"))


@click.command()
@config_option
@output_option
def plan(config: Any, path: Path | None, output: str) -> None:
    """What the agent would change now, without changing it."""
    actions = ask(config, "plan")
    if output == "json":
        show(actions, output)
        return
    for action in actions:
        click.echo(action)
    if not actions:
        click.echo("nothing to do", err=True)


@click.group(cls=ListGroup)
def port() -> None:
    """Devices of the dataplane and their counters."""


@port.command("list")
@config_option
@output_option
def port_list(config: Any, path: Path | None, output: str) -> None:
    """All of them."""
    from dataplane.tables import view

    columns = ("index", "name", "kind", "ipv4", "ipv6", "mtu", "rx_packets", "tx_packets")
    show(view.ports(_shm(config)), output, (*columns, "rx_drops", "tx_drops"))


@click.command()
@config_option
@output_option
def counters(config: Any, path: Path | None, output: str) -> None:
    """Packets by reason; workers and their time by stage."""
    from dataplane.tables import view

    shm = _shm(config)
    reasons, workers = view.counters(shm), view.workers(shm)
    if output == "json":
        show({"reasons": reasons, "workers": workers}, output)
        return
    show(reasons, output, ("direction", "reason", "text", "packets", "bytes"))
    rows = [{**row, **row["stage_ns"]} for row in workers]
    stages = tuple(workers[0]["stage_ns"]) if workers else ()
    show(
        rows,
        output,
        ("worker", "packets", "polls", "kicks", *stages),
        "ns a packet by stage, sampled",
    )


@click.command()
@config_option
@output_option
@click.option("--last", default=30, show_default=True, help="How many flows.")
def flows(config: Any, path: Path | None, output: str, last: int) -> None:
    """Recent flows with verdict, newest first."""
    from dataplane.daemon.engines import RULES
    from dataplane.policy.view import rule_names
    from dataplane.tables import view

    shm = _shm(config)
    rows = view.flows(shm, last)
    names = rule_names(shm.folder / RULES, {row["refusal"] for row in rows})
    rows = [{**row, "policy": names.get(row["refusal"], "")} for row in rows]
    columns = ("source", "source_port", "destination", "destination_port", "protocol", "verdict")
    rest = ("reason", "policy", "ingress", "packets", "bytes", "age_ms")
    show(rows, output, (*columns, *rest))


def _routes(config: Any) -> list[dict[str, Any]]:
    from dataplane.tables.writer import TableWriter
    from xdp.abi import ENUM

    shm = _shm(config)
    kinds = {
        number: name.removeprefix("ADJACENCY_").lower()
        for name, number in ENUM["adjacency_kind"].items()
    }
    names = {int(i): row["name"].decode() for i, row in enumerate(shm.ports) if row["state"]}
    found = []
    for network, index in TableWriter(shm).routes().items():
        row = shm.adjacencies[index]
        remote = int(row["remote_hi"]) << 64 | int(row["remote_lo"])
        width = 16 if row["tunnel_family"] == 6 else 4
        found.append(
            {
                "network": str(network),
                "kind": kinds[int(row["kind"])],
                "port": names.get(int(row["port"]), ""),
                "mtu": int(row["mtu"]),
                "tunnel": str(ip_address(remote.to_bytes(width, "big")))
                if row["tunnel_family"]
                else "",
                "adjacency": index,
                "_order": (network.version, int(network.network_address), network.prefixlen),
            }
        )
    return sorted(found, key=lambda row: row["_order"])


ROUTE_COLUMNS = ("network", "kind", "port", "mtu", "tunnel", "adjacency")


@click.group(cls=ListGroup)
def route() -> None:
    """Routes of the dataplane."""


@route.command("list")
@config_option
@output_option
def route_list(config: Any, path: Path | None, output: str) -> None:
    """All routes."""
    rows = [{name: row[name] for name in ROUTE_COLUMNS} for row in _routes(config)]
    show(rows, output, ROUTE_COLUMNS)


@route.command("get")
@click.argument("address")
@config_option
@output_option
def route_get(config: Any, path: Path | None, address: str, output: str) -> None:
    """The route that a packet to ADDRESS takes."""
    from ipaddress import ip_network

    try:
        target = ip_address(address)
    except ValueError as error:
        raise click.BadParameter(f"{address!r} is no IPv4 or IPv6 address") from error
    rows = [row for row in _routes(config) if target in ip_network(row["network"])]
    if not rows:
        click.echo(f"no route to {address}", err=True)
        sys.exit(1)
    best = max(rows, key=lambda row: row["_order"][2])
    show([{name: best[name] for name in ROUTE_COLUMNS}], output, ROUTE_COLUMNS)
