"""The veth pair of a pod: made, configured, removed.

Rule: attach() leaves either the whole attachment or nothing; detach() succeeds on what is gone.

Theory. One netlink message makes both ends, the pod's end in its namespace under its final name, so
no half-moved interface is ever seen. The pair has the vector's large MTU, since packets between
pods of a node meet no smaller link, while the routes carry the true path MTU; addresses are /32 and
/128, so that all traffic goes to the router address, whose MAC is a permanent neighbour. Both ends
have the same number of queues: the host end's native XDP needs a receive queue for each transmit
queue of its peer (drivers/net/veth.c, veth_xdp_set). The host end gets no IPv6 address: it is a
port of the forwarder, not an interface of the node's stack. Removing it removes the pod's end.

A pod's packets are taken by XDP or at tc ingress (`hook`, for the pod's life). XDP sees raw bytes,
so checksums must be complete when they leave the pod; at tc the kernel keeps track of them. There
the host end has NAPI, so that the pod may send frames as well (AF_XDP, XDP_REDIRECT).
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from dataplane.cni import namespaces
from dataplane.cni.errors import CniError, Code
from dataplane.cni.model import PREFIX, Address, Attachment, PodRoute
from xdp import device

_HOST_END = re.compile(PREFIX + "[0-9a-f]{8}")
_IFA_F_NODAD = 0x02
_NUD_PERMANENT = 0x80
_ADDR_GEN_MODE_NONE = 1
_SCOPE_LINK = 253
_AF = {4: 2, 6: 10}
_BITS = {4: 32, 6: 128}


def attach(attachment: Attachment) -> int:
    """Make the interface in the pod; returns the host end's ifindex.

    Raises CniError: INTERFACE_EXISTS when the pod has such an interface, INVALID_ENVIRONMENT for a
    namespace that cannot be entered, KERNEL_REFUSED with the call that failed.
    """
    with namespaces.opened(attachment.netns) as netns, IPRoute() as host:
        if namespaces.call_in(netns, lambda: _index(attachment.ifname)) is not None:
            raise CniError(
                Code.INTERFACE_EXISTS,
                f"CNI_IFNAME={attachment.ifname} exists already in {attachment.netns}: run DEL "
                "first, or ask for another name",
            )
        # A pair of this key that is not in this namespace is what an interrupted ADD left.
        detach(attachment.host_ifname)
        with _refusal(f"make the veth pair {attachment.host_ifname} - {attachment.ifname}"):
            _create(host, attachment, netns)
        try:
            with _refusal(f"configure {attachment.host_ifname}"):
                index = _configure_host(host, attachment.host_ifname)
                if attachment.hook == "tc":
                    device.coalescing_on(attachment.host_ifname)
            with _refusal(f"configure {attachment.ifname} in {attachment.netns}"):
                namespaces.call_in(netns, lambda: _configure_pod(attachment))
        except BaseException:
            detach(attachment.host_ifname)
            raise
        return index


def detach(host_ifname: str) -> bool:
    """Remove the pair; False when it was gone. Raises CniError KERNEL_REFUSED."""
    with IPRoute() as ip, _refusal(f"remove {host_ifname}"):
        found = ip.link_lookup(ifname=host_ifname)
        try:
            for index in found:
                ip.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise
            return False
        return bool(found)


def host_ends() -> dict[str, int]:
    """The host ends of pods in this process's namespace: name -> ifindex."""
    with IPRoute() as ip, _refusal("list the interfaces"):
        links = {link.get("ifname"): link["index"] for link in ip.get_links(kind="veth")}
        return {name: index for name, index in links.items() if _HOST_END.fullmatch(name)}


@contextmanager
def _refusal(doing: str) -> Iterator[None]:
    try:
        yield
    except (NetlinkError, OSError) as error:
        reason = error.args[1] if len(error.args) > 1 else str(error)
        message = f"the kernel refused to {doing}: {reason}"
        raise CniError(Code.KERNEL_REFUSED, message) from error


def _index(ifname: str) -> int | None:
    with IPRoute() as ip:
        found = ip.link_lookup(ifname=ifname)
        return found[0] if found else None


def _create(host: IPRoute, attachment: Attachment, netns: int) -> None:
    queues = {
        "num_tx_queues": attachment.queue_count,
        "num_rx_queues": attachment.queue_count,
        "mtu": attachment.mtu,
    }
    peer = {"ifname": attachment.ifname, "address": attachment.mac, "net_ns_fd": netns, **queues}
    host.link(
        "add",
        ifname=attachment.host_ifname,
        kind="veth",
        address=attachment.host_mac,
        peer=peer,
        **queues,
    )


def _configure_host(host: IPRoute, ifname: str) -> int:
    index = host.link_lookup(ifname=ifname)[0]
    if Path("/proc/sys/net/ipv6").exists():
        mode = ["IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_MODE_NONE]
        families = {"attrs": [["AF_INET6", {"attrs": [mode]}]]}
        host.link("set", index=index, IFLA_AF_SPEC=families)
    host.link("set", index=index, state="up")
    return index


def _configure_pod(attachment: Attachment) -> None:
    """Runs in the pod's namespace."""
    if any(address.version == 6 for address in attachment.addresses):
        _prepare_ipv6(attachment.ifname)
    if attachment.hook == "xdp":
        device.checksum_off(attachment.ifname)
    with IPRoute() as ip:
        ip.link("set", index=ip.link_lookup(ifname="lo")[0], state="up")
        index = ip.link_lookup(ifname=attachment.ifname)[0]
        for address in attachment.addresses:
            _add_address(ip, index, address)
        ip.link("set", index=index, state="up")
        device.coalescing_on(attachment.ifname)  # veth tells its peer only while it is up
        for router in attachment.routers:
            ip.neigh(
                "replace",
                dst=str(router),
                lladdr=attachment.router_mac,
                ifindex=index,
                family=_AF[router.version],
                state=_NUD_PERMANENT,
            )
        for route in attachment.routes:
            _add_route(ip, index, route)


def _prepare_ipv6(ifname: str) -> None:
    # Runtimes start some namespaces with IPv6 off. Addresses are ours alone, so duplicate address
    # detection would only delay them, and there is no router that advertises.
    folder = Path("/proc/sys/net/ipv6/conf") / ifname
    for name, value in (("disable_ipv6", "0"), ("accept_dad", "0"), ("accept_ra", "0")):
        (folder / name).write_text(value)


def _add_address(ip: IPRoute, index: int, address: Address) -> None:
    options = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
    ip.addr(
        "add",
        index=index,
        address=str(address),
        prefixlen=_BITS[address.version],
        family=_AF[address.version],
        **options,
    )


def _add_route(ip: IPRoute, index: int, route: PodRoute) -> None:
    options: dict = {"metrics": {"mtu": route.mtu}} if route.mtu else {}
    if route.gateway is not None:
        options["gateway"] = str(route.gateway)
    elif route.destination.version == 4:
        options["scope"] = _SCOPE_LINK
    family = _AF[route.destination.version]
    ip.route("add", dst=str(route.destination), oif=index, family=family, **options)
