"""Give the machine back as it was.

Rule: only what is ours goes: devices by our names, routes by our protocol number, our folder.

Theory. `penstock cleanup`, when no daemon runs. Removing a veth removes its XDP program and its
pod's end with it; the uplinks' programs went with the forwarder (bpf_link). State (leases,
endpoints) stays unless asked for, so that pods keep their addresses over a reinstallation.
"""

import contextlib
import shutil

from dataplane.cni import conflist, wire
from dataplane.control.config import Config
from dataplane.control.kernel.netlink import PROTOCOL, Kernel
from dataplane.control.model import HOST, HOST_PEER, RESERVED_PORTS
from dataplane.daemon.lock import hold
from dataplane.dnsproxy import place
from dataplane.tables.model import PROXY_PEER


def cleanup(config: Config, state: bool = False) -> list[str]:
    """Remove everything; return what was removed. Raises AlreadyRunning."""
    removed = []
    stood = config.run_dir.exists()
    with contextlib.ExitStack() as alone:
        for name in ("run", "agent", "forwarder", "dnsproxy"):
            alone.enter_context(hold(config.run_dir / f"{name}.lock"))
        if conflist.remove(config.node.cni.conf_dir):
            removed.append(f"{config.node.cni.conf_dir / conflist.FILE}")
        for name in sorted(wire.host_ends()):
            wire.detach(name)
            removed.append(f"device {name}")
        kernel = Kernel()
        try:
            actual = kernel.snapshot()
            for route in actual.routes:
                if route.protocol == PROTOCOL:
                    kernel.remove_route(route)
                    removed.append(f"route {route.network}")
            for name in (HOST, HOST_PEER, PROXY_PEER):
                if name in actual.links:
                    kernel.remove_link(name)
                    removed.append(f"device {name}")
            if released := kernel.release_ports(config.run_dir / RESERVED_PORTS):
                removed.append(f"reserved ports {released}")
        finally:
            kernel.close()
        if place.leave(config.run_dir):
            removed.append("the DNS proxy's namespace")
        shutil.rmtree(config.run_dir)
    if stood:
        removed.append(str(config.run_dir))
    if state and config.state_dir.exists():
        shutil.rmtree(config.state_dir)
        removed.append(str(config.state_dir))
    return removed
