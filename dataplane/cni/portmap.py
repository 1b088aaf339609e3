"""Port mappings: what kubelet (hostPort) and podman (-p) ask of the plugin.

Rule: a mapping that is kept is valid; what it means for the dataplane is services' business.

Theory. The conflist declares the capability "portMappings"; the runtime then adds them to
"runtimeConfig" (CNI conventions, "Dynamic Plugin specific fields"). They stay in the endpoint's
record, so they hold for as long as the pod does, over restarts. An address that means "any" is
none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Any

from dataplane.cni.errors import CniError, Code
from dataplane.services.model import HostPort

if TYPE_CHECKING:
    from dataplane.cni.endpoints import Endpoint

Address = IPv4Address | IPv6Address

CAPABILITY = "portMappings"
PROTOCOLS = ("TCP", "UDP", "SCTP")
PORT_MOST = 65535
MAPPINGS_MOST = 4096  # podman expands ranges: a port each


@dataclass(frozen=True)
class PortMapping:
    """A port of the node that leads to the pod. host_ip None: any address of the node."""

    host_port: int
    container_port: int
    protocol: str  # TCP, UDP, SCTP
    host_ip: Address | None = None

    def plain(self) -> dict[str, Any]:
        """Return it as JSON has it, in the runtime's words."""
        return {
            "hostPort": self.host_port,
            "containerPort": self.container_port,
            "protocol": self.protocol.lower(),
            "hostIP": str(self.host_ip or ""),
        }

    @staticmethod
    def read(entry: Any) -> "PortMapping":
        """The inverse of plain(), and what runtimes send. Raises ValueError."""
        if not isinstance(entry, Mapping):
            raise ValueError(f"{entry!r} is not an object")
        ports = []
        for name in ("hostPort", "containerPort"):
            port = entry.get(name)
            if isinstance(port, bool) or not isinstance(port, int) or not 0 < port <= PORT_MOST:
                raise ValueError(f'"{name}" is {port!r}, not a number from 1 to {PORT_MOST}')
            ports.append(port)
        protocol = entry.get("protocol") or "tcp"
        if not isinstance(protocol, str) or protocol.upper() not in PROTOCOLS:
            raise ValueError(f'"protocol" is {protocol!r}, none of tcp, udp, sctp')
        text = entry.get("hostIP") or ""
        if not isinstance(text, str):
            raise ValueError(f'"hostIP" is {text!r}, not a string')
        address = ip_address(text) if text else None
        host_ip = None if address is None or address.is_unspecified else address
        return PortMapping(ports[0], ports[1], protocol.upper(), host_ip)


def port_mappings(config: Mapping[str, Any]) -> tuple[PortMapping, ...]:
    """Return what a network configuration asks for. Raises CniError INVALID_CONFIG."""
    runtime = config.get("runtimeConfig") or {}
    if not isinstance(runtime, Mapping):
        raise CniError(Code.INVALID_CONFIG, f'"runtimeConfig" is {runtime!r}, not an object')
    entries = runtime.get(CAPABILITY) or []
    if not isinstance(entries, list) or len(entries) > MAPPINGS_MOST:
        message = f'"{CAPABILITY}" must be a list of at most {MAPPINGS_MOST} mappings'
        raise CniError(Code.INVALID_CONFIG, message)
    found = []
    for entry in entries:
        try:
            found.append(PortMapping.read(entry))
        except ValueError as error:
            raise CniError(Code.INVALID_CONFIG, f'"{CAPABILITY}": {error}') from None
    return tuple(dict.fromkeys(found))


def host_ports(endpoints: Iterable["Endpoint"]) -> list[HostPort]:
    """Return the mappings of all endpoints as services want them."""
    found = []
    for end in endpoints:
        targets = tuple(at for at in (end.address4, end.address6) if at is not None)
        owner = f"{end.pod_namespace}/{end.pod_name}"
        if not end.pod_name:
            owner = f"container {end.container_id[:12]}"
        found += [
            HostPort(owner, one.host_port, one.protocol, one.container_port, targets, one.host_ip)
            for one in end.port_mappings
        ]
    return found
