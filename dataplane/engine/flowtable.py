"""The flow table as the forwarder owns it: memory that XDP shares, devices, generations.

Rule: one increment of the generation makes every entry stale; whoever changes what an entry says
increments it afterwards.

Theory. Tags, entries and hops are BPF arrays that numpy maps, so workers install without a system
call (kernels/flows.py). What has been read of each entry's counters is kept in the tables' folder.
So XDP goes on forwarding established flows while no forwarder runs, and the next one takes maps and
counters up as they stand (`taken`), but for what its predecessor had in hand. Any device takes what
programs at tc redirect to it, not all take what XDP does (xdp/netdev.py); `devices` says so to the
kernels, two maps to the programs. With generation 0 the table is off and nothing is looked up.
"""

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np

from dataplane.engine.account import dns_rows, make_counters
from dataplane.kernels.dns_copies import make_copies
from dataplane.kernels.flows import Flows, renew
from dataplane.kernels.harvest import harvest
from dataplane.kernels.rows import Rows
from xdp.abi import CONST, DTYPE, value
from xdp.errors import KernelError
from xdp.maps import Map
from xdp.netdev import redirect_targets
from xdp.object import BpfObject

WAYS = CONST["FLOW_WAYS"]
LINE = np.dtype(f"V{4 * WAYS}")
MAPS = ("steering", "flow_tags", "flow_entries", "hops", "flow_devices", "flow_ifindexes",
        "program_drops", "dns_copies")  # fmt: skip
BY_XDP, BY_TC = 1 << value("HOOK_XDP"), 1 << value("HOOK_TC")
WRITTEN, LIVE = value("FLOW_WRITTEN"), value("FLOW_LIVE")
NO_DEVICE = [value("DROP_UPLINK_NO_DEVICE"), value("DROP_POD_NO_DEVICE")]
RESTING, RECORD_LIVE = value("FLOW_RESTING"), value("RECORD_LIVE")


def sizes(slots: int) -> dict[str, int]:
    """Return max_entries of the maps for a table of `slots` entries (a power of two), 0: off."""
    slots = max(slots, CONST["FLOW_SLOTS_LEAST"])
    return {"flow_entries": slots, "flow_tags": slots // WAYS}


def taken(kept: Mapping[str, int], slots: int) -> dict[str, int]:
    """Return the maps of a predecessor that a table of `slots` entries takes up: all, or none.

    kept: file descriptors by name.
    """
    try:
        maps = {name: Map.taken(kept[name]) for name in MAPS}
        row = maps["steering"].mmap(DTYPE["steering"])[0]
    except (KeyError, KernelError, ValueError):
        return {}
    same = all(maps[name].max_entries == count for name, count in sizes(slots).items())
    on = bool(row["flow_generation"]) == (slots > 0)
    if not same or not on or int(row["flow_abi"]) != CONST["ABI_VERSION"]:
        return {}
    return {name: entry.fd for name, entry in maps.items()}


def identities(kept: Mapping[str, int]) -> dict[str, int]:
    """Return the kernel's numbers of the maps among what is kept, by name."""
    return {name: Map.taken(kept[name]).id for name in MAPS if name in kept}


class FlowTable:
    """Entries, hops and devices of one forwarder."""

    def __init__(self, shm: Any, bpf: BpfObject, steering: np.ndarray) -> None:
        """steering: the mmapped steering[1]. The object's maps say how large the table is."""
        self._bpf, self._steering, self._shm = bpf, steering, shm
        self.slots = bpf.maps["flow_entries"].max_entries
        self.devices = np.zeros(CONST["PORTS_MAX"], np.uint8)
        self.drops = bpf.maps["program_drops"].mmap(np.dtype("<u8"))
        self.copies = bpf.maps["dns_copies"]
        ring = self._ring = self.copies.ring()
        self.flows = Flows(
            tags=Rows(bpf.maps["flow_tags"].mmap(LINE).view("<u4")),
            entries=Rows(bpf.maps["flow_entries"].mmap(DTYPE["flow_entry"])),
            hops=Rows(bpf.maps["hops"].mmap(DTYPE["hop"])),
            seen=Rows(shm.flow_seen[: self.slots]),
            steering=Rows(steering),
            devices=Rows(self.devices),
            copies=make_copies(ring),
        )
        self.live = 0
        self.packets = 0
        self._paused = 0  # the generation before `pause`
        rows = (shm.reasons[-1], shm.port_counters[-1], np.zeros(1, DTYPE["worker_stats"]))
        self._counters = make_counters(*rows, dns_rows(shm, CONST["DNS_SWEEPER"]))

    def start(self, on: bool) -> None:
        """Open the empty table, or leave it off."""
        row = self._steering[0]
        self._shm.clear("flow_seen")
        row["flow_seed"] = secrets.randbits(64)
        row["flow_mask"] = self.slots // WAYS - 1
        self._say_tunnel()
        row["flow_abi"] = CONST["ABI_VERSION"]
        row["flow_generation"] = int(on)

    def _say_tunnel(self) -> None:
        """Say which tunnel packets are ours; the configuration may differ from a predecessor's."""
        row, node = self._steering[0], self._shm.node[0]
        row["flow_any_vni"] = bool(int(node["flags"]) & CONST["NODE_IDENTITY_VNI"])
        row["flow_vni"] = int(node["vni"])
        row["flow_tunnel"] = int(node["tunnel_kind"])

    def take_up(self, records: int) -> None:
        """Go on with a predecessor's table. records: connections that the forwarder will know.

        What it was writing when it ended, and entries of connections that are no more, go.
        """
        self._say_tunnel()
        seen, connections = self._shm.flow_seen[: self.slots], self._shm.connections
        number = np.minimum(seen["record"], records - 1)
        slot = np.where(
            seen["way"] == 0,
            connections["flow_original"][number],
            connections["flow_reply"][number],
        )
        good = (seen["state"] == LIVE) & (seen["record"] == number)
        good &= slot == np.arange(1, self.slots + 1)
        good &= connections["owner"][number] == RECORD_LIVE
        good &= connections["created"][number] == seen["created"]
        self.flows.tags.array[~good] = 0
        seen["state"][~good & np.isin(seen["state"], (WRITTEN, LIVE))] = RESTING

    @property
    def steering(self) -> np.void:
        """The value that the programs read."""
        return self._steering[0]

    @property
    def on(self) -> bool:
        """Whether XDP looks anything up."""
        return bool(self._steering[0]["flow_generation"])

    def pause(self) -> None:
        """Let XDP look nothing up until `resume`: every packet comes to the workers."""
        self._paused = int(self._steering[0]["flow_generation"])
        self._steering[0]["flow_generation"] = 0

    def resume(self) -> None:
        """Go on, under a generation that no entry has yet."""
        if self._paused:
            self._steering[0]["flow_generation"] = self._paused + 1
        self._paused = 0

    def renew(self) -> None:
        """Make every entry stale."""
        renew(self.flows)

    def follow(self, ports: Mapping[int, int]) -> None:
        """Let packets be redirected to ports (index: ifindex), by XDP if their devices take it."""
        targets = redirect_targets() if ports else frozenset()
        for port, ifindex in ports.items():
            takes, took = BY_TC | (BY_XDP if ifindex in targets else 0), int(self.devices[port])
            if took & ~takes:
                self.close(port)
            if took != takes:
                self._open(port, ifindex, takes)

    def _open(self, port: int, ifindex: int, takes: int) -> None:
        try:
            if takes & BY_XDP:
                self._bpf.maps["flow_devices"].update(port, ifindex)
            self._bpf.maps["flow_ifindexes"].update(port, ifindex)
        except KernelError:
            return  # the device is gone again
        self.devices[port] = takes

    def close(self, port: int) -> None:
        """Redirect nothing to a port any more."""
        self.devices[port] = 0
        self.renew()
        self._bpf.maps["flow_ifindexes"].update(port, 0)
        try:
            self._bpf.maps["flow_devices"].delete(port)
        except KernelError:
            pass  # the kernel has taken it out with its device

    def collect(self, tables: Any, now: int) -> None:
        """Read XDP's counters, retire idle entries. tables: of any worker; now: ns, monotonic."""
        self.live, packets = harvest(tables, self._counters, self.flows, self.slots, now)
        self.packets += packets

    def view(self) -> dict[str, Any]:
        """Return the gauges as plain data."""
        return {
            "on": self.on,
            "entries": self.live,
            "slots": self.slots,
            "packets": self.packets,
            "faults": int(self.drops[NO_DEVICE].sum()),
            "ports": int(np.count_nonzero(self.devices)),
        }
