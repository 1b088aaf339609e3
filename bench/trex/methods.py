"""The calls of TRex's stateless RPC.

Rule: a call that is not here, or asks for what is not supported, is answered by an error.

Theory. Calls are functions of the server's state and the parameters, in a table by name. Ports are
owned: a call that changes one carries the handler that `acquire` gave.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.trex import figures
from bench.trex.ports import ALL, Port, Profile
from bench.trex.state import (
    PAUSED,
    PORT_ACQUIRED,
    PORT_RELEASED,
    RESUMED,
    STARTED,
    STOPPED,
    Params,
    Session,
    State,
)
from bench.trex.streams import LIMITS, StreamError, parse
from bench.trex.wire import UNKNOWN, RpcError

API: Params = {"name": "STL", "major": 5, "minor": 1}
DEFAULT = "_"


# --- who is there ---------------------------------------------------------------------------------


def api_sync_v2(state: State, given: Params) -> Any:
    """Whether client and server understand each other."""
    if given.get("name") != API["name"] or given.get("major") != API["major"]:
        raise RpcError(f"this server speaks {API}, the client {given}")
    return {"api_h": state.api}


def get_version(state: State, given: Params) -> Any:
    """Who answers."""
    return {
        "version": "v3.04", "build_date": "", "build_time": "", "built_by": "penstock bench",
        "mode": "STL",
    }  # fmt: skip


def get_system_info(state: State, given: Params) -> Any:
    """The machine and its ports."""
    return {
        "hostname": platform.node(),
        "uptime": str(round(time.time() - state.started)),
        "core_type": platform.processor() or platform.machine(),
        "dp_core_count": os.cpu_count(),
        "dp_core_count_per_port": 1,
        "advanced_per_stream": True,
        "port_count": len(state.ports),
        "ports": [_info(port) for port in state.ports],
    }


def _info(port: Port) -> dict[str, Any]:
    no = ("is_fc_supported", "is_led_supported", "is_link_supported", "is_vxlan_supported")
    return {
        "index": port.number,
        "driver": "xdp live frames",
        "description": port.device.name,
        "hw_mac": port.mac,
        "pci_addr": port.device.name,
        "numa": -1,
        "cores": [0],
        "speed": port.line / 1e9,
        "supp_speeds": [],
        "is_virtual": True,
        "is_prom_supported": True,
        "is_ieee1588_supported": False,
        **dict.fromkeys(no, False),
        "rx": {"caps": ["flow_stats", "latency", "rx_bytes"], "counters": LIMITS["GROUPS_MAX"]},
    }


def get_supported_cmds(state: State, given: Params) -> Any:
    """Every call."""
    return sorted(CALLS)


def ping(state: State, given: Params) -> Any:
    """The server's clock, s."""
    return {"ts": time.time()}


# --- events ---------------------------------------------------------------------------------------


def publish_now(state: State, given: Params) -> Any:
    """A barrier: whoever sees it has seen all before it."""
    state.tell("trex-barrier", given.get("key", 0), {})
    return True


def get_async_events(state: State, given: Params) -> Any:
    """What has happened since the last call."""
    key = (given.get("session_id"), given.get("user"))
    session = state.sessions.setdefault(key, Session(0.0))
    session.seen = time.monotonic()
    waiting, session.waiting = session.waiting, []
    return {"data": waiting}


# --- ports ----------------------------------------------------------------------------------------


def get_port_status(state: State, given: Params) -> Any:
    """State, owner, attributes."""
    port = state.port(given)
    off = {"is_active": False}
    streams = [number for one in port.profiles.values() for number in one.streams]
    profiles = {name: one.state for name, one in port.profiles.items()}
    return {
        "state": port.state,
        "state_profile": profiles or {DEFAULT: "IDLE"},
        "owner": port.owner,
        "session_id": port.session,
        "max_stream_id": max(streams, default=0),
        "service": port.service,
        "service_filtered": False,
        "rx_info": {
            "queue": {**off, "count": 0, "size": 0},
            "grat_arp": {**off, "interval_sec": 0},
            "latency": {"is_active": False},
        },
        "attr": {
            "promiscuous": {"enabled": True},
            "multicast": {"enabled": True},
            "link": {"up": True},
            "speed": port.line / 1e9,
            "rx_filter_mode": "all",
            "vxlan_fs": [],
            "vlan": {"tags": []},
            "layer_cfg": {
                "ether": {"src": port.mac, "dst": port.target, "state": "configured"},
                "ipv4": {"state": "none"},
                "ipv6": {"enabled": False},
            },
        },
    }


def acquire(state: State, given: Params) -> Any:
    """Take a port; the answer is the handler."""
    port, user = state.port(given), str(given.get("user", ""))
    session = str(given.get("session_id", ""))
    if port.owner and not given.get("force") and (port.owner, port.session) != (user, session):
        raise RpcError(f"port {port.number} belongs to {port.owner}")
    handler = port.acquire(user, session)
    data = {"who": user, "session_id": given.get("session_id"), "force": bool(given.get("force"))}
    state.event(PORT_ACQUIRED, port, **data)
    return handler


def release(state: State, given: Params) -> Any:
    """Give a port back."""
    port = state.owned(given)
    data = {"who": port.owner, "session_id": port.session}
    port.owner = port.handler = port.session = ""
    state.event(PORT_RELEASED, port, **data)
    return True


def set_port_attr(state: State, given: Params) -> Any:
    """Promiscuous is what a port always is; the rest is not supported."""
    state.owned(given)
    if extra := set(given.get("attr", {})) - {"promiscuous", "multicast"}:
        raise RpcError(f"attribute {min(extra)}: not supported")
    return True


def set_l2(state: State, given: Params) -> Any:
    """Where streams go that leave their target MAC to the port."""
    port = state.owned(given)
    if port.state != "IDLE":
        raise RpcError(f"port {port.number} has streams: set the MAC before they are added")
    port.target = str(given.get("dst_mac", port.target))
    return True


def service(state: State, given: Params) -> Any:
    """Service mode: kept, without effect."""
    if given.get("filtered"):
        raise RpcError("filtered service mode is not supported")
    state.owned(given).service = bool(given.get("enabled"))
    return True


def set_rx_feature(state: State, given: Params) -> Any:
    """Queues of received packets are not supported; switching one off is fine."""
    if given.get("enabled"):
        raise RpcError(f"receive feature {given.get('type')}: not supported")
    state.owned(given)
    return True


def remove_rx_filters(state: State, given: Params) -> Any:
    """Groups are counted as long as their streams are there."""
    state.port(given)
    return True


def capture(state: State, given: Params) -> Any:
    """There are no captures: penstock has its own, tcpdump sees veths too."""
    if given.get("command") in ("status", "remove"):
        return []
    raise RpcError("capture is not supported by this server")


# --- streams --------------------------------------------------------------------------------------


def add_stream(state: State, given: Params) -> Any:
    """Give a stream its place."""
    port, raw = state.owned(given), given.get("stream")
    stream = parse(raw)
    fresh = not stream.flow_stats.enabled or stream.flow_stats.stream_id not in state.groups
    group = state.group(stream)
    try:
        port.add(_profile(given), int(given["stream_id"]), stream, dict(raw or {}), group)
    except StreamError:
        if fresh and group is not None:
            state.groups.pop(stream.flow_stats.stream_id)
        raise
    return True


def remove_stream(state: State, given: Params) -> Any:
    """Take one away."""
    state.owned(given).remove(_profile(given), int(given["stream_id"]))
    _forget_groups(state)
    return True


def remove_all_streams(state: State, given: Params) -> Any:
    """Take all away."""
    state.owned(given).remove_all(_profile(given))
    _forget_groups(state)
    return True


def _forget_groups(state: State) -> None:
    """Groups without a stream are free again."""
    used = {one.group for port in state.ports for one in port.placed()}
    state.groups = {name: group for name, group in state.groups.items() if group in used}


def get_all_streams(state: State, given: Params) -> Any:
    """Streams as they were given, by profile and number."""
    port, name = state.port(given), _profile(given)
    chosen = {key: one for key, one in port.profiles.items() if name in (ALL, key)}
    return {
        "profiles": {
            key: {str(number): placed.given for number, placed in one.streams.items()}
            for key, one in chosen.items()
        }
    }


def get_stream_list(state: State, given: Params) -> Any:
    """Numbers of a profile's streams."""
    return list(state.port(given).profiles.get(_profile(given), Profile()).streams)


def get_profile_list(state: State, given: Params) -> Any:
    """Names of profiles."""
    return list(state.port(given).profiles)


def _profile(given: Params) -> str:
    return str(given.get("profile_id", DEFAULT))


# --- traffic --------------------------------------------------------------------------------------


def start_traffic(state: State, given: Params) -> Any:
    """Send a profile's streams."""
    port, name = state.owned(given), _profile(given)
    state.flow_sequence = state.flow_sequence % 255 + 1
    known = port.profiles.get(name, Profile())
    groups = {one.group for one in known.streams.values() if one.group is not None}
    state.expect(groups, state.flow_sequence)
    begins = float(given.get("start_at_ts") or 0)
    if begins:
        time.sleep(min(max(0.0, begins - time.time()), 5.0))
    factor = port.start(name, given["mul"], float(given.get("duration", -1)), state.flow_sequence)
    state.event(STARTED, port, profile_id=name)
    return {"multiplier": factor, "ts": time.time()}


def _told(state: State, port: Port, names: Sequence[str], kind: int) -> bool:
    for name in names:
        state.event(kind, port, profile_id=name)
    return True


def stop_traffic(state: State, given: Params) -> Any:
    """End them."""
    port = state.owned(given)
    return _told(state, port, port.stop(_profile(given)), STOPPED)


def pause_traffic(state: State, given: Params) -> Any:
    """Keep their place and their time."""
    port = state.owned(given)
    return _told(state, port, port.pause(_profile(given), True), PAUSED)


def resume_traffic(state: State, given: Params) -> Any:
    """Go on."""
    port = state.owned(given)
    return _told(state, port, port.pause(_profile(given), False), RESUMED)


def pause_streams(state: State, given: Params) -> Any:
    """Some streams of a profile."""
    state.owned(given).pause(_profile(given), True, given.get("stream_ids", ()))
    return True


def resume_streams(state: State, given: Params) -> Any:
    """And on with them."""
    state.owned(given).pause(_profile(given), False, given.get("stream_ids", ()))
    return True


def update_traffic(state: State, given: Params) -> Any:
    """Another rate, while they are sent."""
    return {"multiplier": state.owned(given).update(_profile(given), given["mul"])}


def update_streams(state: State, given: Params) -> Any:
    """Of some streams."""
    ids = given.get("stream_ids", ())
    return {"multiplier": state.owned(given).update(_profile(given), given["mul"], ids)}


def validate(state: State, given: Params) -> Any:
    """What all streams of a port ask for."""
    port = state.owned(given)
    placed = [one for one in port.placed() if one.stream.enabled]
    pps = sum(one.pps for one in placed)
    bits = sum(8 * one.pps * (one.stream.length + 4) for one in placed)
    util = 100 * (bits + 160 * pps) / port.line
    rate = {"max_pps": pps, "max_bps_l2": bits, "max_bps_l1": bits + 160 * pps}
    graph = {"expected_duration": -1, "events_count": 0, "events": []}
    return {"rate": {**rate, "max_line_util": util}, "graph": graph}


# --- statistics -----------------------------------------------------------------------------------


def get_active_pgids(state: State, given: Params) -> Any:
    """Groups that streams have."""
    timed = LIMITS["TIMED_MAX"]
    latency = [name for name, group in state.groups.items() if group < timed]
    stats = [name for name, group in state.groups.items() if group >= timed]
    return {"ids": {"latency": latency, "flow_stats": stats}}


def get_pgid_stats(state: State, given: Params) -> Any:
    """What has become of groups."""
    asked = given.get("pgids") or list(state.groups)
    known = {name: state.groups[name] for name in asked if name in state.groups}
    return figures.of_groups(state.ports, known, state.versions)


CALLS: dict[str, Callable[[State, Params], Any]] = {
    function.__name__: function
    for function in (
        api_sync_v2, get_version, get_system_info, get_supported_cmds, ping, publish_now,
        get_async_events, get_port_status, acquire, release, set_port_attr, set_l2, service,
        set_rx_feature, remove_rx_filters, capture, add_stream, remove_stream, remove_all_streams,
        get_all_streams, get_stream_list, get_profile_list, start_traffic, stop_traffic,
        pause_traffic, resume_traffic, pause_streams, resume_streams, update_traffic,
        update_streams, validate, get_active_pgids, get_pgid_stats,
    )
}  # fmt: skip
CALLS |= {
    "get_port_stats": lambda state, given: figures.of_port(state.port(given)),
    "get_global_stats": lambda state, given: figures.of_all(state.ports),
    "get_port_xstats_names": lambda state, given: {"xstats_names": list(figures.XSTATS)},
    "get_port_xstats_values": lambda state, given: {
        "xstats_values": figures.xstats(state.port(given))
    },
    "get_utilization": lambda state, given: {"cpu": [], "mbuf_stats": {}},
    "get_tpg_status": lambda state, given: {"enabled": False},
    "get_owner": lambda state, given: state.port(given).owner,
}
OPEN = {"api_sync_v2", "get_version", "ping"}
"""Calls that need no api_h."""


def call(state: State, name: str, given: Params) -> Any:
    """Carry out a call. Raises RpcError."""
    if name not in CALLS:
        raise RpcError(f"{name}: not supported by this server", UNKNOWN)
    if name not in OPEN and given.get("api_h") != state.api:
        raise RpcError("api_h: not what api_sync_v2 gave; connect again")
    try:
        return CALLS[name](state, given)
    except StreamError as error:
        raise RpcError(str(error)) from error
    except (KeyError, TypeError, ValueError) as error:
        raise RpcError(f"{name}: {type(error).__name__}: {error}") from error
