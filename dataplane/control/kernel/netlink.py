"""The kernel's links, addresses, routes and neighbours, through pyroute2.

Rule: one thread uses an instance (pyroute2's sync API keeps an event loop of its own); methods do
one thing and raise KernelRefused with the value and the errno.

Theory. A snapshot is four dumps. Only what the control plane compares is decoded: unicast routes of
the main table, complete neighbours. Changes are the verbs that `plan` needs, all idempotent.
"""

import contextlib
import errno
from ipaddress import ip_address, ip_network
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from dataplane.control import ports
from dataplane.control.model import (
    HOST,
    HOST_MTU,
    HOST_PEER,
    NUD_PERMANENT,
    PROTOCOL,
    Actual,
    Address,
    HostRoute,
    Link,
    Neighbour,
    Ranges,
    Reservation,
    Route,
)
from xdp.device import channels, checksum_off, coalescing_on

MAIN = 254
UNICAST = 1
FAMILIES = {2: 4, 10: 6}
AF = {4: 2, 6: 10}
NTF_USE = 0x01
ONLINK = 0x4  # RTNH_F_ONLINK
RESERVED = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")  # IPv6's too
SCOPE_ANY = 255  # RT_SCOPE_NOWHERE: in a deletion, a route of any scope


class KernelRefused(Exception):
    """A change that the kernel did not take."""


def reserved_ports() -> Ranges | None:
    """Return the ports kept from sockets that ask for any; None: the kernel has no such list."""
    try:
        return ports.parse(RESERVED.read_text())
    except (OSError, ValueError):
        return None


def _recorded(record: Path) -> Ranges:
    """Return what a record says that we added."""
    try:
        return ports.parse(record.read_text())
    except (OSError, ValueError):
        return ()


def _mac(text: str | None) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text and len(text) == 17 else bytes(6)


class Kernel:
    """Netlink of the network namespace in which it was made."""

    def __init__(self) -> None:
        """Open the socket."""
        self._ipr = IPRoute()

    def close(self) -> None:
        """Close the socket."""
        self._ipr.close()

    # --- reading ------------------------------------------------------------------------------

    def snapshot(self) -> Actual:
        """Return the state of now."""
        links = {link.name: link for link in map(self._link, self._ipr.get_links())}
        addresses: dict[int, set[tuple[Address, int]]] = {}
        for message in self._ipr.get_addr():
            text = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
            if text:
                entry = (ip_address(text), message["prefixlen"])
                addresses.setdefault(message["index"], set()).add(entry)
        routes = [route for family in (2, 10) for route in self._routes(family)]
        neighbours = {}
        for family in (2, 10):
            for message in self._ipr.get_neighbours(family=family):
                found = self._neighbour(message)
                if found:
                    neighbours[found.device, found.address] = found
        frozen = {index: frozenset(entries) for index, entries in addresses.items()}
        return Actual(links, frozen, tuple(routes), neighbours, reserved_ports())

    def _link(self, message) -> Link:
        name = message.get_attr("IFLA_IFNAME")
        info = message.get_attr("IFLA_LINKINFO")
        kind = info.get_attr("IFLA_INFO_KIND") if info else ""
        return Link(
            index=message["index"],
            name=name,
            mac=_mac(message.get_attr("IFLA_ADDRESS")),
            mtu=message.get_attr("IFLA_MTU") or 0,
            up=bool(message["flags"] & 1),
            queues=channels(name),
            kind=kind or "",
        )

    def _routes(self, family: int):
        for message in self._ipr.get_routes(family=family):
            table = message.get_attr("RTA_TABLE") or message["table"]
            if table != MAIN or message["type"] != UNICAST or message["flags"] & 0x200:
                continue  # 0x200: RTM_F_CLONED
            hops = message.get_attr("RTA_MULTIPATH")
            first = hops[0] if hops else message  # of several next hops the first is taken
            device = first["oif"] if hops else message.get_attr("RTA_OIF")
            gateway = first.get_attr("RTA_GATEWAY")
            via = first.get_attr("RTA_VIA")
            if device is None or via:
                continue
            anything = "0.0.0.0" if family == 2 else "::"
            target = message.get_attr("RTA_DST") or anything
            metrics = message.get_attr("RTA_METRICS")
            source = message.get_attr("RTA_PREFSRC")
            yield Route(
                network=ip_network((target, message["dst_len"])),
                gateway=ip_address(gateway) if gateway else None,
                device=device,
                metric=message.get_attr("RTA_PRIORITY") or 0,
                mtu=(metrics.get_attr("RTAX_MTU") or 0) if metrics else 0,
                protocol=message["proto"],
                source=ip_address(source) if source else None,
            )

    def _neighbour(self, message) -> Neighbour | None:
        text = message.get_attr("NDA_DST")
        mac = _mac(message.get_attr("NDA_LLADDR"))
        if not text or (mac == bytes(6) and message["state"] != 0x20):  # 0x20: NUD_FAILED
            return None
        return Neighbour(message["ifindex"], ip_address(text), mac, message["state"])

    # --- changing -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _said(self, what: str, *passed: int):
        try:
            yield
        except NetlinkError as error:
            if error.code not in passed:
                reason = errno.errorcode.get(error.code, str(error.code))
                raise KernelRefused(f"{what}: {reason} {error}") from error

    def make_host_pair(self, queues: int, mac: bytes) -> None:
        """Make penstock0 and penstock1, up, in the place of what has their names."""
        self.remove_link(HOST)
        self.remove_link(HOST_PEER)
        sizes = {"num_rx_queues": queues, "num_tx_queues": queues, "mtu": HOST_MTU}
        with self._said(f"making the pair {HOST}, {HOST_PEER} with {queues} queues"):
            peer = {"ifname": HOST_PEER, **sizes}
            self._ipr.link(
                "add", ifname=HOST, kind="veth", peer=peer, address=mac.hex(":"), **sizes
            )
            for name in (HOST, HOST_PEER):
                index = self._ipr.link_lookup(ifname=name)[0]
                self._quiet(name, own_stack=name == HOST)
                self._ipr.link("set", index=index, state="up")
        checksum_off(HOST)
        coalescing_on(HOST)

    def _quiet(self, name: str, own_stack: bool) -> None:
        """No link-local address, no router solicitations; loose reverse path on penstock0."""
        settings = {f"ipv6/conf/{name}/addr_gen_mode": "1"}
        if own_stack:
            settings[f"ipv4/conf/{name}/rp_filter"] = "2"
            settings[f"ipv6/conf/{name}/disable_ipv6"] = "0"
        else:
            settings[f"ipv6/conf/{name}/disable_ipv6"] = "1"
        for key, text in settings.items():
            with contextlib.suppress(OSError):  # a kernel without IPv6 has no such file
                Path("/proc/sys/net", key).write_text(text)

    def remove_link(self, name: str) -> None:
        """Delete a device if it is there."""
        for index in self._ipr.link_lookup(ifname=name):
            with self._said(f"removing {name}", errno.ENODEV):
                self._ipr.link("del", index=index)

    def set_up(self, name: str) -> None:
        """Set a device up."""
        with self._said(f"setting {name} up"):
            self._ipr.link("set", index=self._index(name), state="up")

    def _index(self, name: str) -> int:
        found = self._ipr.link_lookup(ifname=name)
        if not found:
            raise KernelRefused(f"no device {name}")
        return found[0]

    def add_address(self, name: str, address: Address, length: int) -> None:
        """Add an address, without duplicate address detection."""
        with self._said(f"address {address}/{length} on {name}", errno.EEXIST):
            self._ipr.addr(
                "add",
                index=self._index(name),
                address=str(address),
                prefixlen=length,
                family=AF[address.version],
                **({"flags": 0x02} if address.version == 6 else {}),  # IFA_F_NODAD
            )

    def remove_address(self, name: str, address: Address, length: int) -> None:
        """Remove an address."""
        with self._said(f"removing {address}/{length} from {name}", errno.EADDRNOTAVAIL):
            self._ipr.addr(
                "del",
                index=self._index(name),
                address=str(address),
                prefixlen=length,
                family=AF[address.version],
            )

    def replace_route(self, route: HostRoute) -> None:
        """Add or replace a route of ours."""
        values = {
            "dst": str(route.network),
            "gateway": str(route.gateway),
            "oif": self._index(route.device),
            "proto": PROTOCOL,
            "family": AF[route.network.version],
        }
        if route.device == HOST:
            values["flags"] = ONLINK
        if route.mtu:
            values["metrics"] = {"mtu": route.mtu}
        if route.source:
            values["prefsrc"] = str(route.source)
        with self._said(f"route {route.network} via {route.gateway} dev {route.device}"):
            self._ipr.route("replace", **values)

    def remove_route(self, route: Route) -> None:
        """Remove a route of ours."""
        with self._said(f"removing route {route.network}", errno.ESRCH):
            self._ipr.route(
                "del",
                dst=str(route.network),
                oif=route.device,
                priority=route.metric,
                proto=PROTOCOL,
                scope=SCOPE_ANY,
                family=AF[route.network.version],
            )

    def set_neighbour(self, name: str, address: Address, mac: bytes) -> None:
        """Set a permanent neighbour."""
        with self._said(f"neighbour {address} on {name}"):
            self._ipr.neigh(
                "replace",
                ifindex=self._index(name),
                dst=str(address),
                lladdr=mac.hex(":"),
                state=NUD_PERMANENT,
                family=AF[address.version],
            )

    def reserve_ports(self, wanted: Reservation) -> None:
        """Keep ports from sockets that ask for any; what is added is recorded before."""
        have = reserved_ports()
        if have is None:
            raise KernelRefused(f"{RESERVED} cannot be read")
        added = ports.merged([*_recorded(wanted.record), *ports.without(wanted.ports, have)])
        fresh = wanted.record.with_name(f".{wanted.record.name}")
        try:
            fresh.write_text(ports.shown(added))
            fresh.rename(wanted.record)
            RESERVED.write_text(ports.shown(ports.merged([*have, *wanted.ports])))
        except OSError as error:
            raise KernelRefused(f"reserving ports {ports.shown(added)}: {error}") from error

    def release_ports(self, record: Path) -> str:
        """Undo reserve_ports; return the ports, empty when there is nothing to undo."""
        added, have = _recorded(record), reserved_ports()
        if not added or have is None:
            return ""
        try:
            # The kernel takes an empty line as an empty list, but not an empty write.
            RESERVED.write_text(ports.shown(ports.without(have, added)) + "\n")
            record.unlink(missing_ok=True)
        except OSError as error:
            raise KernelRefused(f"releasing ports {ports.shown(added)}: {error}") from error
        return ports.shown(added)

    def provoke(self, device: int, address: Address) -> None:
        """Make the kernel resolve a neighbour, as if a packet were for it (NTF_USE)."""
        with self._said(f"resolving {address}", errno.ENODEV, errno.ENETDOWN, errno.EINVAL):
            self._ipr.neigh(
                "replace",
                ifindex=device,
                dst=str(address),
                state=0,
                flags=NTF_USE,
                family=AF[address.version],
            )
