"""The row of struct node: what the kernels must know of this node.

Rule: a pure function of the configuration and the node; every member of the row is set here.

Theory. Members are plain numbers, so that a row that did not change is known by comparing. A family
that the node has not, or that is not masqueraded, is 0.
"""

from typing import Any

from dataplane.control import overlay
from dataplane.control.config import Config
from dataplane.control.here import Here
from dataplane.control.model import Address
from xdp.abi import CONST, ENUM, value

MASK64 = (1 << 64) - 1


def node_row(config: Config, me: Here, host_port: int) -> dict[str, Any]:
    """Return the members by name; host_port: index of the port towards the node's stack."""
    tunnelled = config.network.mode == "overlay"
    options = config.forwarder
    return {
        "gateway_mac": me.mac,
        "tunnel_kind": overlay.TUNNELS[config.network.tunnel] if tunnelled else 0,
        "tunnel_port": config.network.tunnel_port if tunnelled else 0,
        "host_port": host_port,
        "vni": config.network.fixed_vni,
        "flags": _flags(config),
        "error_rate": options.error_rate,
        "error_burst": options.error_burst,
        **_halves("router", me.routers.get(4), me.routers.get(6)),
        "workers": me.workers,
        "frame_count": options.frames,
        "spin_us": options.spin_us,
        "watchdog_ms": options.watchdog_ms,
        "flow_slots": _power(options.flow_entries) if options.flow_table else 0,
        **_translation(config, me),
        **_tracking(config),
        **_telling(config),
    }


def _halves(name: str, four: Address | None, six: Address | None) -> dict[str, int]:
    """An address of each family as the row has it: NAME4, NAME6_hi, NAME6_lo."""
    wide = int(six or 0)
    return {f"{name}4": int(four or 0), f"{name}6_hi": wide >> 64, f"{name}6_lo": wide & MASK64}


def _translation(config: Config, me: Here) -> dict[str, int]:
    """What NAT needs of the node row."""
    first, last = config.masquerade.port_range

    def own(family: int, on: bool) -> Address | None:
        return me.node.internal_ip(family) if on else None

    masks, back = config.masquerade, config.services.loopback_of
    return {
        "nat_first": first,
        "nat_count": last - first + 1,
        **_halves("masquerade", own(4, masks.ipv4), own(6, masks.ipv6)),
        **_halves("loopback", back(4), back(6)),
    }


def _tracking(config: Config) -> dict[str, Any]:
    """What connection tracking needs of the node row."""
    times = config.conntrack.timeouts
    by_state = {
        "CONNECTION_CLOSED": times.tcp_closed,
        "CONNECTION_SYN_SENT": times.tcp_syn,
        "CONNECTION_INIT": times.tcp_syn,
        "CONNECTION_UNREPLIED": times.udp_unreplied,
        "CONNECTION_ICMP": times.icmp,
        "CONNECTION_SYN_RECEIVED": times.tcp_syn,
        "CONNECTION_CLOSING": times.tcp_closing,
        "CONNECTION_REPLIED": times.udp,
        "CONNECTION_ESTABLISHED": times.tcp_established,
    }
    assert by_state.keys() == ENUM["connection_state"].keys()
    seconds = [0] * CONST["TIMEOUTS_MAX"]
    for name, timeout in by_state.items():
        seconds[value(name)] = timeout
    records = _power(max(config.conntrack.max, CONST["CONNECTIONS_LEAST"]))
    return {"connections": records, "timeout_s": tuple(seconds)}


def _telling(config: Config) -> dict[str, int]:
    """Which events the forwarder tells."""
    observe = config.observe
    return {
        "events_off": sum(1 << value(f"EVENT_{kind.upper()}") for kind in set(observe.skip)),
        "sample_shift": _power(observe.sample).bit_length() - 1 if observe.sample else 0,
    }


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _flags(config: Config) -> int:
    wanted = {
        "NODE_IDENTITY_VNI": config.network.vni == "identity",
        "NODE_REJECT": config.services.no_backend == "reject",
        "NODE_POLICY_HAIRPIN": config.policy.hairpin == "enforce",
    }
    return sum(CONST[name] for name, on in wanted.items() if on)
