"""The difference between what should stand and what does, as printable actions.

Rule: pure; applying the actions and planning again gives none.

Theory. Kernel actions name a method of kernel/netlink.py and its arguments, so applying is dumb.
Table actions are for people: the table writer computes the difference itself, row by row. Resolving
a neighbour changes nothing that should stand; it is not an action but `Desired.provoke`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dataplane.control import ports
from dataplane.control.model import (
    HOST,
    HOST_MTU,
    HOST_PEER,
    NUD_PERMANENT,
    PROTOCOL,
    Actual,
    Desired,
    HostRoute,
    Route,
    Tables,
)


@dataclass(frozen=True)
class Action:
    """One step. method: of Kernel, empty for a table action."""

    text: str
    method: str = ""
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.text


def plan(desired: Desired, actual: Actual, stands: Tables | None) -> list[Action]:
    """Return what to do; stands: the tables as last written, None when not known."""
    return [
        *_kernel(desired, actual),
        *_reservation(desired, actual),
        *_tables(desired.tables, stands),
    ]


def _kernel(desired: Desired, actual: Actual) -> list[Action]:
    host, peer = actual.links.get(HOST), actual.links.get(HOST_PEER)
    usable = (
        host is not None
        and peer is not None
        and host.kind == peer.kind == "veth"
        and host.queues == peer.queues == desired.queues
        and host.mtu == peer.mtu == HOST_MTU
    )
    if not usable:
        mac = b"\x02" + desired.gateway_mac[1:5] + bytes([desired.gateway_mac[5] ^ 0xFF])
        text = f"make {HOST} and {HOST_PEER} with {desired.queues} queues"
        return [Action(text, "make_host_pair", (desired.queues, mac))]
    actions = [
        Action(f"set {link.name} up", "set_up", (link.name,))
        for link in (host, peer)
        if link is not None and not link.up
    ]
    assert host is not None
    have = actual.addresses.get(host.index, frozenset())
    for address, length in sorted(desired.host_addresses - have, key=str):
        text = f"add {address}/{length} to {HOST}"
        actions.append(Action(text, "add_address", (HOST, address, length)))
    for address, length in sorted(have - desired.host_addresses, key=str):
        if not address.is_link_local:
            text = f"remove {address}/{length} from {HOST}"
            actions.append(Action(text, "remove_address", (HOST, address, length)))
    for address, mac in desired.host_neighbours.items():
        found = actual.neighbours.get((host.index, address))
        if found is None or found.mac != mac or found.state != NUD_PERMANENT:
            text = f"neighbour {address} is {mac.hex(':')} on {HOST}"
            actions.append(Action(text, "set_neighbour", (HOST, address, mac)))
    return actions + _routes(desired, actual)


def _reservation(desired: Desired, actual: Actual) -> list[Action]:
    wanted, have = desired.reserved, actual.reserved_ports
    if wanted is None or have is None:
        return []
    missing = ports.without(wanted.ports, have)
    if not missing:
        return []
    text = f"keep ports {ports.shown(missing)} from the node's own sockets"
    return [Action(text, "reserve_ports", (wanted,))]


def _same(wanted: HostRoute, found: Route, device: int) -> bool:
    have = (found.gateway, found.device, found.mtu, found.source)
    return have == (wanted.gateway, device, wanted.mtu, wanted.source)


def _routes(desired: Desired, actual: Actual) -> list[Action]:
    actions = []
    ours = {route.network: route for route in actual.routes if route.protocol == PROTOCOL}
    wanted = {route.network: route for route in desired.host_routes}
    for network, route in wanted.items():
        found, link = ours.get(network), actual.links.get(route.device)
        if link is not None and (found is None or not _same(route, found, link.index)):
            text = f"route {network} via {route.gateway} dev {route.device}"
            actions.append(Action(text, "replace_route", (route,)))
    for network, found in ours.items():
        if network not in wanted:
            actions.append(Action(f"remove route {network}", "remove_route", (found,)))
    return actions


def _tables(wanted: Tables, stands: Tables | None) -> list[Action]:
    if stands is None:
        return [Action("write all tables")]
    lines = []
    if wanted.node != stands.node:
        lines.append("node row")
    lines += _differences("port", wanted.ports, stands.ports)
    lines += _differences("table route", wanted.routes, stands.routes)
    if _steering(wanted) != _steering(stands):
        lines.append("steering of the uplinks")
    return [Action(f"write {line}") for line in lines]


def _steering(tables: Tables) -> tuple:
    return tables.tunnel_port, tables.locals, tables.prefixes, tables.nat


def _differences(what: str, wanted: Mapping, stands: Mapping) -> list[str]:
    changed = [f"{what} {key}" for key, item in wanted.items() if stands.get(key) != item]
    return changed + [f"{what} {key} away" for key in stands if key not in wanted]
