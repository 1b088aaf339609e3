"""The result of ADD in the shape of each specification version.

Rule: the kernel's state is told once, in the newest shape; older shapes are that with less.

Theory. 1.1.0 has the MTU of interfaces and routes and the scope of routes; before it they are left
out, and with them the on-link route to the router, which means nothing without its scope. Before
1.0.0 each address also says its IP version. See the CNI specification, "Result Types", of each
version. A prevResult (we are chained behind another plugin) is kept and ours appended.
"""

from ipaddress import ip_interface
from typing import Any

from dataplane.cni.model import Attachment, PodRoute
from dataplane.cni.protocol import VERSIONS

_SCOPE_LINK = 253


def build(
    version: str, attachment: Attachment, previous: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The success result of an ADD, for the given cniVersion."""
    newest = VERSIONS.index(version) >= VERSIONS.index("1.1.0")
    with_ip_version = VERSIONS.index(version) < VERSIONS.index("1.0.0")
    previous = previous or {}
    interfaces = [*(previous.get("interfaces") or []), *_interfaces(attachment, newest)]
    ips = [
        {
            **({"version": str(address.version)} if with_ip_version else {}),
            "address": str(ip_interface(address)),
            "gateway": str(router),
            "interface": len(interfaces) - 1,
        }
        for address, router in zip(attachment.addresses, attachment.routers, strict=True)
    ]
    routes = [_route(route, newest) for route in attachment.routes if newest or route.gateway]
    return {
        "cniVersion": version,
        "interfaces": interfaces,
        "ips": [*(previous.get("ips") or []), *ips],
        "routes": [*(previous.get("routes") or []), *routes],
        "dns": previous.get("dns") or {},
    }


def _interfaces(attachment: Attachment, newest: bool) -> list[dict[str, Any]]:
    mtu = {"mtu": attachment.mtu} if newest else {}
    host = {"name": attachment.host_ifname, "mac": attachment.host_mac, **mtu}
    pod = {
        "name": attachment.ifname,
        "mac": attachment.mac,
        **mtu,
        "sandbox": attachment.netns,
    }
    return [host, pod]


def _route(route: PodRoute, newest: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"dst": str(route.destination)}
    if route.gateway is not None:
        shown["gw"] = str(route.gateway)
    elif route.destination.version == 4:
        shown["scope"] = _SCOPE_LINK
    if newest and route.mtu:
        shown["mtu"] = route.mtu
    return shown
