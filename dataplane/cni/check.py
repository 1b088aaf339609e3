"""CHECK: does the kernel still have what ADD told the runtime?

Rule: looks, never mends.

Theory. prevResult is the result of the whole chain, so what later plugins changed and said (a MAC,
an MTU) is expected as they said it. Of interfaces, addresses and routes only ours are looked at, in
any routing table, since a later plugin may have moved routes. Beyond the result: the router's
permanent neighbour, and the checksum offload, without which packets leave with wrong checksums.
"""

from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute

from dataplane.cni import namespaces
from dataplane.cni.model import Attachment
from xdp import device

_IFF_UP = 1
_NUD_PERMANENT = 0x80


@dataclass(frozen=True)
class Link:
    """One end of the pair as the kernel has it."""

    mac: str
    mtu: int
    up: bool


@dataclass(frozen=True)
class Pod:
    """The pod's end: addresses "10.0.0.5/32", routes (destination, gateway) -> MTU or 0."""

    link: Link
    addresses: frozenset[str]
    routes: dict[tuple[str, str], int]
    neighbours: dict[str, str]  # permanent ones: address -> MAC
    checksum_offload: bool


def look(attachment: Attachment) -> tuple[Link | None, Pod | None]:
    """The host end and the pod's end. Raises CniError when the namespace cannot be entered."""
    with namespaces.opened(attachment.netns) as netns, IPRoute() as ip:
        host = _link(ip, attachment.host_ifname)
        return host, namespaces.call_in(netns, lambda: _pod(attachment.ifname))


def differences(
    attachment: Attachment, previous: dict[str, Any], host: Link | None, pod: Pod | None
) -> list[str]:
    """What is not as prevResult and the attachment say, one sentence each; [] when all is well."""
    if host is None:
        return [f"{attachment.host_ifname} is missing on the node"]
    if pod is None:
        return [f"{attachment.ifname} is missing in {attachment.netns}"]
    found: list[str] = []
    interfaces = {i.get("name"): i for i in previous.get("interfaces") or []}
    for name, link in ((attachment.host_ifname, host), (attachment.ifname, pod.link)):
        if name not in interfaces:
            found.append(f"prevResult does not have the interface {name}")
            continue
        found += _compare_link(name, link, interfaces[name])
    found += _compare_addresses(attachment, previous, pod)
    found += _compare_routes(attachment, previous, pod)
    for router in attachment.routers:
        mac = pod.neighbours.get(str(router))
        if mac != attachment.router_mac:
            found.append(
                f"the neighbour {router} is {mac or 'missing'}, not {attachment.router_mac}"
            )
    if pod.checksum_offload and attachment.hook == "xdp":
        found.append(f"transmit checksum offload of {attachment.ifname} is on")
    return found


def _compare_link(name: str, link: Link, expected: dict[str, Any]) -> list[str]:
    found = [] if link.up else [f"{name} is down"]
    if expected.get("mac") and str(expected["mac"]).lower() != link.mac:
        found.append(f"{name} has the MAC {link.mac}, not {expected['mac']}")
    if expected.get("mtu") and expected["mtu"] != link.mtu:
        found.append(f"{name} has the MTU {link.mtu}, not {expected['mtu']}")
    return found


def _compare_addresses(attachment: Attachment, previous: dict[str, Any], pod: Pod) -> list[str]:
    told = {entry.get("address") for entry in previous.get("ips") or []}
    found = []
    for address in attachment.addresses:
        text = f"{address}/{address.max_prefixlen}"
        if text not in told:
            found.append(f"prevResult does not have the address {text}, which is reserved for it")
        if text not in pod.addresses:
            found.append(f"{attachment.ifname} has not the address {text}")
    return found


def _compare_routes(attachment: Attachment, previous: dict[str, Any], pod: Pod) -> list[str]:
    gateways = {str(router) for router in attachment.routers}
    found = []
    for route in previous.get("routes") or []:
        pair = (route.get("dst", ""), route.get("gw", ""))
        if pair[1] not in gateways:
            continue
        if pair not in pod.routes:
            found.append(f"the route to {pair[0]} through {pair[1]} is missing")
        elif route.get("mtu") and pod.routes[pair] != route["mtu"]:
            found.append(
                f"the route to {pair[0]} has the MTU {pod.routes[pair]}, not {route['mtu']}"
            )
    return found


def _link(ip: IPRoute, ifname: str) -> Link | None:
    index = ip.link_lookup(ifname=ifname)
    if not index:
        return None
    link = ip.get_links(index[0])[0]
    return Link(link.get("address"), link.get("mtu"), bool(link["flags"] & _IFF_UP))


def _pod(ifname: str) -> Pod | None:
    """Runs in the pod's namespace."""
    with IPRoute() as ip:
        link = _link(ip, ifname)
        if link is None:
            return None
        index = ip.link_lookup(ifname=ifname)[0]
        addresses = frozenset(
            f"{a.get('local') or a.get('address')}/{a['prefixlen']}"
            for a in ip.get_addr(index=index)
        )
        neighbours = {
            n.get("dst"): n.get("lladdr")
            for n in ip.get_neighbours(ifindex=index)
            if n["state"] & _NUD_PERMANENT
        }
        routes = dict(_route(r) for family in (2, 10) for r in ip.get_routes(family=family))
    return Pod(link, addresses, routes, neighbours, device.checksum_is_on(ifname))


def _route(route) -> tuple[tuple[str, str], int]:
    default = "0.0.0.0" if route["family"] == 2 else "::"
    destination = f"{route.get('dst') or default}/{route['dst_len']}"
    metrics = route.get("metrics")
    mtu = metrics.get("mtu") if metrics is not None else None
    return (destination, route.get("gateway") or ""), mtu or 0
