"""The one configuration file.

Rule: every option has a default, a meaning and a check here; an unknown one is refused by name.

Theory. YAML into pydantic models. A value that makes no sense is refused at the start, with the
option, the value and the limit, rather than found under traffic. `describe` writes the documented
default file that `penstock config default` prints.
"""

import base64
import os
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dataplane.control.sections import Conntrack, Metrics, Observe
from dataplane.control.sections import Section as _Section
from xdp.abi import CONST

FLOW_SLOTS_LEAST, FLOW_SLOTS_MOST = CONST["FLOW_SLOTS_LEAST"], CONST["FLOW_SLOTS_MOST"]
DEFAULT_PATH = Path("/etc/penstock/config.yaml")
TUNNEL_PORTS = {"vxlan": 8472, "geneve": 6081}  # Cilium's defaults; IANA's VXLAN port is 4789
EXCLUDED = (
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "240.0.0.0/4", "169.254.0.0/16", "fe80::/10",
)  # fmt: skip


class ConfigError(Exception):
    """The file cannot be used; the message names file, option and limit."""


class Cni(_Section):
    """Where the container runtime looks."""

    bin_dir: Path = Field(Path("/opt/cni/bin"), description="folder of the runtime's plugins")
    conf_dir: Path = Field(Path("/etc/cni/net.d"), description="folder of its configuration")
    name: str = Field("penstock", description="network name in the conflist")


class NodeSection(_Section):
    """This node."""

    name: str = Field(default_factory=lambda: os.uname().nodename, description="its Node object")
    run_dir: Path = Field(Path("/run/penstock"), description="sockets and shared memory; tmpfs")
    state_dir: Path = Field(Path("/var/lib/penstock"), description="leases, endpoints, manifests")
    cni: Cni = Field(default_factory=Cni)


class Pool(_Section):
    """A cluster pool of one family."""

    cidr: str = Field(description="network that node CIDRs are carved from")
    mask_size: int = Field(description="prefix length of a node's part")


class Network(_Section):
    """How pods are reached."""

    mode: Literal["overlay", "direct"] = Field(
        "overlay",
        description="overlay: through a tunnel; direct: pod addresses routed in the underlay",
    )
    tunnel: Literal["vxlan", "geneve"] = Field("vxlan", description="overlay's encapsulation")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="UDP port of the tunnel; 0: 8472 for vxlan, 6081 for geneve"
    )
    vni: Literal["identity"] | Annotated[int, Field(ge=0, lt=1 << 24)] = Field(
        "identity",
        description="virtual network identifier: the sender's identity, or this number always",
    )
    underlay_family: Literal[4, 6] = Field(4, description="IP version of the outer header")
    uplinks: list[str] = Field(
        default_factory=list,
        description="devices to other nodes; empty: those with our InternalIPs",
    )
    cluster_cidrs: list[str] = Field(
        default_factory=lambda: ["10.244.0.0/16", "fd00:244::/48"],
        description="all pod addresses of the cluster, one network a family",
    )
    pools: list[Pool] = Field(
        default_factory=list,
        description="what `penstock ipam carve NODE` cuts podCIDRs of Nodes from",
    )
    mtu: int = Field(
        0, ge=0, le=65000, description="path MTU between nodes; 0: uplink less overhead"
    )

    @model_validator(mode="after")
    def _check(self) -> "Network":
        for text in [*self.cluster_cidrs, *(pool.cidr for pool in self.pools)]:
            ip_network(text)
        if self.mtu and self.mtu < 1280:
            raise ValueError(f"mtu {self.mtu}: IPv6 needs at least 1280 (RFC 8200 5)")
        return self

    @property
    def tunnel_port(self) -> int:
        """UDP port of the tunnel, host order."""
        return self.port or TUNNEL_PORTS[self.tunnel]

    @property
    def fixed_vni(self) -> int:
        """The VNI of every packet; 0 where it carries the identity instead."""
        return 0 if self.vni == "identity" else self.vni

    @property
    def clusters(self) -> list[IPv4Network | IPv6Network]:
        """cluster_cidrs as networks."""
        return [ip_network(text) for text in self.cluster_cidrs]


class Source(_Section):
    """Where Kubernetes objects come from."""

    folder: Path = Field(Path("/etc/penstock/manifests"), description="folder of YAML manifests")


class ForwarderSection(_Section):
    """The forwarding process."""

    workers: Annotated[int, Field(ge=0, le=16)] = Field(
        0, description="forwarding threads; 0: one for each uplink queue, at most the CPUs"
    )
    frames: Annotated[int, Field(ge=1024, le=1 << 22)] = Field(
        16384, description="packet buffers of 4 KiB"
    )
    spin_us: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        50, description="idle time before a worker sleeps"
    )
    nice: Annotated[int, Field(ge=-20, le=19)] = Field(
        -10, description="of the workers, for which the packets of all pods wait (setpriority(2))"
    )
    standby: bool = Field(
        False,
        description="keep the next forwarder prepared: one that dies is replaced at once, not in "
        "some seconds; takes its memory twice",
    )
    watchdog_ms: Annotated[int, Field(ge=0, le=60_000)] = Field(
        3000, description="without a heartbeat for so long the uplink is the kernel's; 0: never"
    )
    pod_hook: Literal["tc", "xdp"] = Field(
        "tc",
        description="where new pods' packets are taken: tc: least work for pods that use sockets; "
        "xdp: most packets a second for pods that send frames (AF_XDP)",
    )
    flow_table: bool = Field(True, description="let XDP forward established flows by itself")
    flow_entries: Annotated[int, Field(ge=FLOW_SLOTS_LEAST, le=FLOW_SLOTS_MOST)] = Field(
        1 << 18, description="directions of flows that it holds, 136 bytes each"
    )
    error_rate: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        1000, description="ICMP errors and echo replies a second, a worker"
    )
    error_burst: Annotated[int, Field(ge=0, le=1_000_000)] = Field(200, description="and at once")


class Policy(_Section):
    """Network policies."""

    enforcement: Literal["default", "always", "never"] = Field(
        "default", description="default: pods that a policy selects; always: deny the others"
    )
    cidr_match: Literal["kubernetes", "cilium"] = Field(
        "kubernetes",
        description="kubernetes: address blocks match pods and nodes too; cilium: only the world",
    )
    audit: bool = Field(False, description="let pass what would be denied, and count it")
    deny_response: Literal["drop", "icmp", "reset"] = Field(
        "drop", description="answer to denied packets, where the policy does not say"
    )
    hairpin: Literal["allow", "enforce"] = Field(
        "allow", description="whether policies judge a pod that reaches itself through a service"
    )
    entries_max: Annotated[int, Field(ge=256, le=1 << 20)] = Field(
        65536, description="table entries of one pod's policy; more is refused"
    )


def _port_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not 1 <= int(first) <= int(last) <= 65535:
        raise ValueError(f"{text}: must be FIRST-LAST with 1 <= FIRST <= LAST <= 65535")
    return int(first), int(last)


class Services(_Section):
    """Services, as kube-proxy does them."""

    cidrs: list[str] = Field(
        default_factory=lambda: ["10.96.0.0/12", "fd00:96::/108"],
        description="addresses of ClusterIPs; this node reaches them through the dataplane",
    )
    algorithm: Literal["random", "maglev"] = Field(
        "random",
        description="choice of a backend, unless a Service's penstock.io/lb-algorithm says",
    )
    maglev_size: Literal[251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071] = Field(
        16381, description="entries of a Maglev table: 100 times the backends or more"
    )
    maglev_seed: str = Field(
        "JLfvgnHc2kaSUFaI", description="12 bytes in base64, the same on all nodes"
    )
    node_ports: Annotated[str, Field(pattern=r"^\d+-\d+$")] = Field(
        "30000-32767", description="range of NodePorts"
    )
    node_port_addresses: list[str] = Field(
        default_factory=list,
        description="networks whose addresses serve NodePorts; empty: the InternalIPs",
    )
    healthz_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port of kube-proxy's /healthz for load balancers, there 10256; 0: none"
    )
    no_backend: Literal["reject", "drop"] = Field(
        "reject", description="answer of a service that has no backend"
    )
    loopback: list[str] = Field(
        default_factory=lambda: ["169.254.42.1", "fd00:42::1"],
        description="what a pod sees as its client when a service leads back to itself",
    )

    @model_validator(mode="after")
    def _check(self) -> "Services":
        for text in (*self.cidrs, *self.node_port_addresses):
            ip_network(text)
        families = [ip_address(text).version for text in self.loopback]
        if len(set(families)) < len(families):
            raise ValueError(f"loopback {self.loopback}: at most one address a family")
        if len(base64.b64decode(self.maglev_seed, validate=True)) != 12:
            raise ValueError(f"maglev_seed {self.maglev_seed!r}: must be 12 bytes in base64")
        _port_range(self.node_ports)
        return self

    @property
    def node_port_range(self) -> tuple[int, int]:
        """First and last NodePort."""
        return _port_range(self.node_ports)

    @property
    def networks(self) -> list[IPv4Network | IPv6Network]:
        """cidrs as networks."""
        return [ip_network(text) for text in self.cidrs]

    def loopback_of(self, family: int) -> IPv4Address | IPv6Address | None:
        """The loopback address of family 4 or 6."""
        found = (ip_address(text) for text in self.loopback)
        return next((address for address in found if address.version == family), None)


class Dns(_Section):
    """DNS of pods, and policies by name (toFQDNs, rules.dns)."""

    name_error: Literal["refused", "nxdomain"] = Field(
        "refused", description="answer to a query for a name that no rule of the pod allows"
    )
    learned_by: Literal["node", "identity"] = Field(
        "node", description="who may use an address: all pods of the node, or those like the asking"
    )
    least_ttl_s: Annotated[int, Field(ge=0, le=604_800)] = Field(
        0, description="an address is a name's for so long at least, whatever its TTL"
    )
    grace_s: Annotated[int, Field(ge=0, le=604_800)] = Field(
        60, description="and for so long beyond that: pods keep answers too"
    )
    addresses_max: Annotated[int, Field(ge=1, le=65536)] = Field(
        1000, description="addresses of one name; more are counted and warned of, not learned"
    )
    tcp: bool = Field(True, description="run the proxy that reads DNS over TCP where names count")
    cluster_domain: Annotated[
        str, Field(pattern=r"^([-a-z0-9_]+(\.[-a-z0-9_]+)*)?$", max_length=62)
    ] = Field("cluster.local", description="what pods' search lists end in; empty: unknown")


class Masquerade(_Section):
    """Source addresses of packets that leave the cluster."""

    ipv4: bool = Field(True, description="replace pods' IPv4 sources by the node's address")
    ipv6: bool = Field(True, description="and IPv6 sources")
    exclude: list[str] = Field(
        default_factory=lambda: list(EXCLUDED),
        description="destinations that see pods' own addresses (ip-masq-agent's default)",
    )
    ports: Annotated[str, Field(pattern=r"^\d+-\d+$")] = Field(
        "40960-65535", description="source ports; kept out of the node's own ephemeral ports"
    )

    @model_validator(mode="after")
    def _check(self) -> "Masquerade":
        for text in self.exclude:
            ip_network(text)
        _port_range(self.ports)
        return self

    @property
    def port_range(self) -> tuple[int, int]:
        """First and last source port."""
        return _port_range(self.ports)


class Config(_Section):
    """The whole file."""

    node: NodeSection = Field(default_factory=NodeSection)
    network: Network = Field(default_factory=Network)
    source: Source = Field(default_factory=Source)
    forwarder: ForwarderSection = Field(default_factory=ForwarderSection)
    policy: Policy = Field(default_factory=Policy)
    services: Services = Field(default_factory=Services)
    dns: Dns = Field(default_factory=Dns)
    masquerade: Masquerade = Field(default_factory=Masquerade)
    conntrack: Conntrack = Field(default_factory=Conntrack)
    metrics: Metrics = Field(default_factory=Metrics)
    observe: Observe = Field(default_factory=Observe)
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )

    @model_validator(mode="after")
    def _check(self) -> "Config":
        nat, nodes = self.masquerade.port_range, self.services.node_port_range
        if nat[0] <= nodes[1] and nodes[0] <= nat[1]:
            raise ValueError(
                f"masquerade.ports {self.masquerade.ports} overlaps services.node_ports "
                f"{self.services.node_ports}: a reply would be taken for a NodePort's packet"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Folder of sockets and shared memory."""
        return self.node.run_dir

    @property
    def state_dir(self) -> Path:
        """Folder of leases, endpoints and last good manifests."""
        return self.node.state_dir


def load(path: Path | None) -> Config:
    """Read and check a file; None: the default path, or all defaults when that is not there.

    Raises ConfigError.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return Config()
        path = DEFAULT_PATH
    try:
        text = path.read_text()
        raw = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that is none
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, is {type(raw).__name__}")
    try:
        return Config.model_validate(raw or {})
    except ValidationError as error:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = [
            f"{path}:{_line(root, item['loc'])}: "
            f"{'.'.join(str(part) for part in item['loc']) or 'file'}: {item['msg']} "
            f"(is {item['input']!r})"
            for item in error.errors()
        ]
        raise ConfigError("; ".join(lines)) from error


def _line(node: yaml.Node | None, place: tuple[int | str, ...]) -> int:
    """Return the line of an option, or of what should hold it; the first is 1."""
    line = 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            key, node = next(((k, v) for k, v in node.value if k.value == part), (None, None))
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            key = node = node.value[part]
        else:
            break
        if key is None:
            break
        line = key.start_mark.line + 1
    return line


def describe() -> str:
    """Return the default file as YAML with a comment at every option."""
    lines = ["# Penstock's configuration: the defaults. Every option may be left out."]
    _describe(Config(), lines, "")
    return "\n".join(lines) + "\n"


def _describe(section: BaseModel, lines: list[str], indent: str) -> None:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:  # {(type(value).__doc__ or '').strip()}")
            _describe(value, lines, indent + "  ")
        else:
            plain = str(value) if isinstance(value, Path) else value
            text = (
                yaml.safe_dump(plain, default_flow_style=True, width=1000)
                .replace("\n...", "")
                .strip()
            )
            lines.append(f"{indent}{name}: {text}  # {field.description}")
