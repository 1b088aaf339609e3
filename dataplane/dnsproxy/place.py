"""Where the DNS proxy lives: a network namespace of its own, joined to the forwarder by a veth.

Rule: in there every address is local, and nothing leads out but the forwarder.

Theory. The proxy stands between a pod and its server under the addresses of both, so it needs a
place where it may listen at any address and speak from any: packets that come in by the veth are
looked up in a table where everything is local, its own go out by a default route. Nothing of this
touches the node's own stack. The namespace is kept by a bind mount, so a proxy that starts again
finds it, veth and all, and needs no agent to be reached; the forwarder's port stays as it is. The
MTU is the least that every path carries, so no segment is too large, whatever server it goes to.
"""

import contextlib
import ctypes
import os
import socket
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from dataplane.tables.model import PROXY_DEVICE, PROXY_MAC, PROXY_PEER
from xdp.device import checksum_off, coalescing_on
from xdp.errors import KernelError

FILE = "dnsproxy.ns"
MTU = 1280  # RFC 8200 5; less than any tunnel leaves of 1500
TABLE = 100  # where every address is local
NEXT_HOPS = {socket.AF_INET: "169.254.1.1", socket.AF_INET6: "fe80::1"}
CLONE_NEWNET, MS_BIND, MNT_DETACH = 0x40000000, 4096, 2
PERMANENT = 0x80  # NUD_PERMANENT
ONLINK, LOCAL, SCOPE_HOST = 0x4, 2, 254  # RTNH_F_*, RTN_*, RT_SCOPE_*
_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int, what: str) -> None:
    if result < 0:
        raise KernelError(what, ctypes.get_errno())


def enter(run_dir: Path, queues: int, gateway_mac: str) -> None:
    """Move this process into the proxy's namespace, made and joined where it is not yet.

    queues: of the veth, one for each worker. Raises KernelError, NetlinkError.
    """
    with IPRoute() as node:
        _enter_namespace(run_dir / FILE)
        with IPRoute() as here:
            _join(node, here, queues)
            _settle(here, gateway_mac)


def leave(run_dir: Path) -> bool:
    """Take the namespace's mount away; whether there was one."""
    path = run_dir / FILE
    if not path.exists():
        return False
    mounted = _libc.umount2(os.fsencode(path), MNT_DETACH) == 0
    path.unlink()
    return mounted


def _enter_namespace(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            if _libc.setns(file.fileno(), CLONE_NEWNET) == 0:
                return
    path.touch(mode=0o600)
    _call(_libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
    own = b"/proc/self/ns/net"
    _call(_libc.mount(own, os.fsencode(path), None, MS_BIND, None), f"mount({path})")


def _join(node: Any, here: Any, queues: int) -> None:
    """Make the veth, unless it stands with so many queues."""
    ends = here.link_lookup(ifname=PROXY_DEVICE)
    if ends and node.link_lookup(ifname=PROXY_PEER):
        link = here.get_links(ends[0])[0]
        if link.get_attr("IFLA_NUM_RX_QUEUES") == queues:
            return
    for index in node.link_lookup(ifname=PROXY_PEER):
        node.link("del", index=index)
    sizes = {"num_rx_queues": queues, "num_tx_queues": queues, "mtu": MTU}
    peer = {
        "ifname": PROXY_DEVICE,
        "net_ns_pid": os.getpid(),
        "address": PROXY_MAC.hex(":"),
        **sizes,
    }
    node.link("add", ifname=PROXY_PEER, kind="veth", peer=peer, **sizes)
    node.link("set", index=node.link_lookup(ifname=PROXY_PEER)[0], state="up")


def _settle(here: Any, gateway_mac: str) -> None:
    """Addresses, routes and rules: all that comes in is local, all that goes out goes back."""
    for key in ("all", "default", PROXY_DEVICE):
        _set(f"ipv4/conf/{key}/rp_filter", "0")
    _set(f"ipv6/conf/{PROXY_DEVICE}/accept_ra", "0")
    _set(f"ipv6/conf/{PROXY_DEVICE}/accept_dad", "0")
    _set("ipv4/ip_local_port_range", "1024 65000")
    index, lo = here.link_lookup(ifname=PROXY_DEVICE)[0], here.link_lookup(ifname="lo")[0]
    for each in (lo, index):
        here.link("set", index=each, state="up")
    checksum_off(PROXY_DEVICE)
    coalescing_on(PROXY_DEVICE)
    for family, hop in NEXT_HOPS.items():
        here.neigh(
            "replace", dst=hop, lladdr=gateway_mac, ifindex=index, state=PERMANENT, family=family
        )
        everything = "0.0.0.0/0" if family == socket.AF_INET else "::/0"
        here.route("replace", dst=everything, gateway=hop, oif=index, flags=ONLINK, family=family)
        here.route(
            "replace",
            dst=everything,
            oif=lo,
            table=TABLE,
            type=LOCAL,
            scope=SCOPE_HOST,
            family=family,
        )
        with contextlib.suppress(Exception):
            here.rule("del", iifname=PROXY_DEVICE, table=TABLE, priority=50, family=family)
        here.rule("add", iifname=PROXY_DEVICE, table=TABLE, priority=50, family=family)


def _set(key: str, text: str) -> None:
    with contextlib.suppress(OSError):
        Path("/proc/sys/net", key).write_text(text)
