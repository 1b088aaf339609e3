"""A port: a device, its streams by profile, the program that sends them and the one that counts.

Rule: what is sent and what has arrived is what the programs counted; nothing is estimated.

Theory. A stream has its place in the generator's maps from the moment it is added, so one that
cannot be sent is refused then. Starting a profile is a matter of writing times into rows that the
program reads: it runs as a process of its own (penstock-frames) while anything is running or
paused, and not longer, since it spins. Rates are differences of counters, a tick apart.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.lab import LabError, Process, eventually, inside, sh
from bench.trex.compile import SHIFT, Compiled, compiled, offsets
from bench.trex.streams import FCS, GAP, LAYOUT, LIMITS, Stream, StreamError
from xdp.artifacts import find
from xdp.link import attach_netlink, detach_netlink
from xdp.object import BpfObject, ObjectSpec

IDLE, RUNNING, PAUSED = (LIMITS[f"STREAM_{name}"] for name in ("IDLE", "RUNNING", "PAUSED"))
LAG_NS = 20_000_000  # what a stream catches up: a time slice of somebody else
BATCH = 8  # a frame waits for its batch to be full
ALL = "*"
LINE_DEFAULT = 10e9
EVERYTHING = LIMITS["GROUPS_MAX"]


@dataclass(frozen=True)
class Device:
    """Where a port is. target: MAC of streams that leave it to the port."""

    name: str
    namespace: Path | None = None
    target: str = "00:00:00:00:00:00"

    @classmethod
    def parse(cls, text: str) -> "Device":
        """DEVICE[@NAMESPACE][=TARGET_MAC]."""
        place, _, target = text.partition("=")
        name, _, namespace = place.partition("@")
        path = Path("/run/netns") / namespace if namespace else None
        return cls(name, path, target or cls.target)


@dataclass
class Placed:
    """A stream in its place."""

    stream: Stream
    given: dict
    slot: int
    group: int | None
    pps: float
    made: Compiled


@dataclass
class Profile:
    """Streams that are started together."""

    streams: dict[int, Placed] = field(default_factory=dict)
    active: bool = False
    paused: bool = False
    factor: float = 1.0

    @property
    def state(self) -> str:
        """TRex's word."""
        if self.active:
            return "PAUSE" if self.paused else "TX"
        return "STREAMS" if self.streams else "IDLE"


class Port:
    """A port of the server."""

    def __init__(self, number: int, device: Device, cpus: frozenset[int], folder: Path) -> None:
        """Load the programs, begin to count. Raises LabError, KernelError."""
        self.number, self.device = number, device
        self.owner = self.handler = self.session = ""
        self.service = False
        self.profiles: dict[str, Profile] = {}
        self._cpus, self._folder = cpus, folder
        self._process: Process | None = None
        with inside(device.namespace):
            rows = json.loads(sh(["ip", "-j", "link", "show", "dev", device.name]))
            self.line = _line(device.name)
            self._bpf = BpfObject(ObjectSpec.load(find("streams.bpf.o")))
            self.ifindex = int(rows[0]["ifindex"])
            self._bpf.maps["device"].update(0, self.ifindex)
            attach_netlink(self._bpf.programs["arrive"], self.ifindex)
        self.mac, self.target = rows[0]["address"], device.target
        maps = self._bpf.maps
        self._control = maps["control"].mmap(LAYOUT["stream_control"])
        self._rows = maps["streams"].mmap(LAYOUT["stream"])
        self._bodies = maps["bodies"].mmap(LAYOUT["stream_body"])
        self._lists = maps["lists"].mmap(np.dtype("<u8"))
        self.times = maps["times"].mmap(LAYOUT["group_times"])
        self.buckets = maps["buckets"].mmap(np.dtype("<u8"))
        self._gone = np.zeros((EVERYTHING + 1, 3), np.int64)  # packets, bytes, left out
        self.rates = np.zeros((EVERYTHING + 1, 4))  # tx and rx: packets, bits a second
        self._last = (time.monotonic(), np.zeros((EVERYTHING + 1, 4)))

    def close(self) -> None:
        """Stop, and leave the device as it was."""
        self._end()
        with inside(self.device.namespace):
            detach_netlink(self.ifindex)
        self._bpf.close()

    # --- streams ------------------------------------------------------------------------------

    def placed(self) -> list[Placed]:
        """All streams."""
        return [one for profile in self.profiles.values() for one in profile.streams.values()]

    def add(
        self, profile: str, number: int, stream: Stream, given: dict, group: int | None
    ) -> None:
        """Give a stream its place. Raises StreamError."""
        known = self.profiles.setdefault(profile, Profile())
        if any(number in one.streams for one in self.profiles.values()):
            raise StreamError(f"stream {number} exists already")
        free = set(range(LIMITS["STREAMS_MAX"])) - {one.slot for one in self.placed()}
        if not free:
            raise StreamError(f"{LIMITS['STREAMS_MAX']} streams a port: no more")
        macs = bytes.fromhex(self.target.replace(":", "")), bytes.fromhex(self.mac.replace(":", ""))
        made = compiled(stream, macs, group)
        pps = stream.mode.rate.pps(stream.length, self.line)
        one = Placed(stream, given, min(free), group, pps, made)
        offsets([each.made for each in [*self.placed(), one]])
        known.streams[number] = one
        body = self._bodies["bytes"][one.slot]
        body[:] = 0
        body[: len(made.body)] = np.frombuffer(made.body, np.uint8)
        self._rows[one.slot] = made.row

    def remove(self, profile: str, number: int) -> None:
        """Take a stream away. Raises StreamError."""
        known = self._profile(profile)
        if known.active or number not in known.streams:
            raise StreamError(f"stream {number}: not there, or its profile is active")
        self._forget(known.streams.pop(number))

    def remove_all(self, profile: str) -> None:
        """Take away all streams of a profile, or of all."""
        for name in [profile] if profile != ALL else list(self.profiles):
            known = self.profiles.get(name, Profile())
            if known.active:
                raise StreamError(f"profile {name} is active: stop it first")
            for one in known.streams.values():
                self._forget(one)
            self.profiles.pop(name, None)

    def _forget(self, one: Placed) -> None:
        self._keep(one)
        self._rows[one.slot]["state"] = IDLE

    def _keep(self, one: Placed) -> None:
        """Add a row's counts to those of rows that are no more, and clear them."""
        row = self._rows[one.slot]
        packets = int(row["sent"])
        counts = (packets, int(row["bytes"]) + FCS * packets, int(row["left_out"]))
        self._gone[EVERYTHING] += counts
        if one.group is not None:
            self._gone[one.group] += counts
        row["sent"] = row["bytes"] = row["left_out"] = 0

    def _profile(self, name: str) -> Profile:
        if name not in self.profiles:
            raise StreamError(f"port {self.number} has no profile {name}")
        return self.profiles[name]

    # --- traffic ------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """TRex's word for all profiles."""
        found = {one.state for one in self.profiles.values()}
        return next((word for word in ("TX", "PAUSE", "STREAMS") if word in found), "IDLE")

    def factor(self, profile: str, mul: dict) -> float:
        """Return what every rate is multiplied with. Raises StreamError."""
        known = self._profile(profile)
        on = [one for one in known.streams.values() if one.stream.enabled]
        pps = sum(one.pps for one in on)
        bits = sum(8 * one.pps * (one.stream.length + FCS) for one in on)
        of = {"raw": 1.0, "pps": pps, "bps": bits, "bpsl1": bits + 8 * GAP * pps}
        of["percentage"] = of["bpsl1"] * 100 / self.line
        if mul.get("type") not in of or not of[mul["type"]]:
            raise StreamError(f"multiplier {mul}: one of {', '.join(of)}, of streams that send")
        value = float(mul["value"]) / of[mul["type"]]
        sign = {"abs": 0, "add": 1, "sub": -1}[mul.get("op", "abs")]
        wanted = known.factor + sign * value if sign else value
        if wanted <= 0:
            raise StreamError(f"multiplier {mul}: nothing would be left")
        return wanted

    def start(self, profile: str, mul: dict, duration: float, flow_sequence: int) -> float:
        """Start a profile; return its factor. duration: s, below 0: no end. Raises StreamError."""
        known = self._profile(profile)
        if known.active or not known.streams:
            raise StreamError(f"profile {profile}: active already, or without streams")
        known.factor = self.factor(profile, mul)
        now = self._begin()
        slots = {number: one.slot for number, one in known.streams.items()}
        begins = offsets([one.made for one in self.placed()])
        where = {one.slot: at for one, at in zip(self.placed(), begins, strict=True)}
        for one in known.streams.values():
            self._prepare(one, known.factor, now, where[one.slot], slots, flow_sequence)
            if duration > 0:
                self._rows[one.slot]["end"] = now + (round(duration * 1e9) << SHIFT)
        self._control["streams"] = 1 + max(one.slot for one in self.placed())
        for one in known.streams.values():
            if one.stream.enabled and one.stream.self_start:
                paused = one.stream.start_paused
                self._rows[one.slot]["state"] = PAUSED if paused else RUNNING
        known.active, known.paused = True, False
        return known.factor

    def _prepare(
        self, one: Placed, factor: float, now: int, values_at: int, slots: dict[int, int], seq: int
    ) -> None:
        self._keep(one)
        fresh = one.made.row.copy()
        fresh["gap"] = max(1, round((1 << SHIFT) * 1e9 / (one.pps * factor)))
        fresh["next"] = now + int(fresh["delay"])
        fresh["left"], fresh["bursts_left"] = fresh["burst"], fresh["bursts"]
        fresh["flow_sequence"] = seq
        listed = fresh["variables"]["values"]
        listed[listed > 0] += values_at
        self._lists[values_at : values_at + len(one.made.values)] = one.made.values
        if one.stream.next_stream_id >= 0:
            if one.stream.next_stream_id not in slots:
                raise StreamError(f"next stream {one.stream.next_stream_id} is not in the profile")
            fresh["following"] = slots[one.stream.next_stream_id] + 1
        body = self._bodies["bytes"][one.slot]
        body[: len(one.made.body)] = np.frombuffer(one.made.body, np.uint8)
        self._rows[one.slot] = fresh

    def _begin(self) -> int:
        """Have the program run; return its time."""
        control = self._control[0]
        if self._process is not None and self._process.alive:
            return int(control["now"])
        for name in control.dtype.names:
            control[name] = 0
        control["lag"] = LAG_NS << SHIFT
        program = str(self._bpf.programs["transmit"].fd)
        words = [str(find("penstock-frames")), program, str(self.ifindex)]
        words += [str(LIMITS["FRAME_MOST"]), str(BATCH)]
        log = self._folder / f"port{self.number}.log"
        with inside(self.device.namespace):
            self._process = Process(words, log, self._cpus, fds=(int(program),))
        eventually(self._turning, f"a generator on {self.device.name}", every=0.001)
        return int(control["now"])

    def _turning(self) -> bool:
        if self._process is None or not self._process.alive:
            text = self._process.output()[-300:] if self._process else ""
            raise LabError(f"the generator on {self.device.name} has ended: {text}")
        return bool(self._control["turns"][0])

    def _end(self) -> None:
        self._control["stop"] = 1
        if self._process is not None:
            time.sleep(0.0005)  # a batch that has begun
            self._process.stop()
            self._process = None

    def names(self, profile: str, state: str) -> list[str]:
        """Return the profiles in a state that a name means."""
        if profile != ALL:
            self._profile(profile)
        return [
            name
            for name, one in self.profiles.items()
            if profile in (ALL, name) and one.state in state.split()
        ]

    def stop(self, profile: str) -> list[str]:
        """Stop a profile, or all; return those that were active."""
        stopped = (
            self.names(profile, "TX PAUSE") if profile == ALL or profile in self.profiles else []
        )
        for name in stopped:
            for one in self.profiles[name].streams.values():
                self._rows[one.slot]["state"] = IDLE
            self.profiles[name].active = False
        if not any(one.active for one in self.profiles.values()):
            self._end()
        return stopped

    def pause(self, profile: str, on: bool, streams: Sequence[int] = ()) -> list[str]:
        """Pause or resume profiles, or some streams of one; return the profiles."""
        names = self.names(profile, "TX PAUSE" if streams else "TX" if on else "PAUSE")
        before, after = (RUNNING, PAUSED) if on else (PAUSED, RUNNING)
        for name in names:
            known = self.profiles[name]
            for number, one in known.streams.items():
                row = self._rows[one.slot]
                if (streams and number not in streams) or row["state"] != before:
                    continue
                if not on:
                    row["next"] = max(int(row["next"]), int(self._control["now"][0]))
                row["state"] = after
            if not streams:
                known.paused = on
        return names

    def update(self, profile: str, mul: dict, streams: Sequence[int] = ()) -> float:
        """Change rates while frames are sent; return the factor. Raises StreamError."""
        factor = 0.0
        for name in self.names(profile, "TX PAUSE"):
            known = self.profiles[name]
            factor = self.factor(name, mul)
            if not streams:
                known.factor = factor
            for number, one in known.streams.items():
                if not streams or number in streams:
                    gap = round((1 << SHIFT) * 1e9 / (one.pps * factor))
                    self._rows[one.slot]["gap"] = max(1, gap)
        return factor

    def finished(self) -> list[str]:
        """Return profiles whose streams have all ended, once."""
        found = []
        for name in self.names(ALL, "TX"):
            states = self._rows["state"][[one.slot for one in self.profiles[name].streams.values()]]
            if not np.isin(states, (RUNNING, PAUSED)).any():
                found += self.stop(name)
        return found

    # --- counters -----------------------------------------------------------------------------

    def counts(self) -> np.ndarray:
        """Return int64[groups + 1, 5]: packets and bytes sent, received, left out; last: all."""
        found = np.zeros((EVERYTHING + 1, 5), np.int64)
        found[:, [0, 1, 4]] = self._gone
        for one in self.placed():
            row = self._rows[one.slot]
            packets = int(row["sent"])
            counts = (packets, int(row["bytes"]) + FCS * packets, int(row["left_out"]))
            found[EVERYTHING, [0, 1, 4]] += counts
            if one.group is not None:
                found[one.group, [0, 1, 4]] += counts
        return found

    def receive_counts(self, groups: Sequence[int]) -> np.ndarray:
        """Return int64[n, 2]: packets and bytes that have arrived of groups; EVERYTHING: all."""
        found = np.zeros((len(groups), 2), np.int64)
        for n, group in enumerate(groups):
            rows = self._bpf.maps["groups"].lookup_per_cpu(group, LAYOUT["group_count"])
            packets = int(rows["packets"].sum())
            found[n] = packets, int(rows["bytes"].sum()) + FCS * packets
        return found

    def sample(self, groups: Sequence[int]) -> None:
        """Bring the rates up to date; to be called a tick apart."""
        now = time.monotonic()
        before, old = self._last
        fresh = np.zeros_like(old)
        fresh[:, :2] = self.counts()[:, :2]
        which = [*groups, EVERYTHING]
        fresh[which, 2:] = self.receive_counts(which)
        rates = (fresh - old) / max(now - before, 1e-3)
        rates[:, [1, 3]] *= 8
        self.rates = np.maximum(rates, 0)
        self._last = (now, fresh)

    def acquire(self, user: str, session: str) -> str:
        """Give the port to somebody; return the handler."""
        self.owner, self.session = user, session
        self.handler = secrets.token_hex(4)
        return self.handler


def _line(name: str) -> float:
    """Return bits a second of a device, as it says."""
    text = sh(["ethtool", name])
    for row in text.splitlines():
        label, _, value = row.strip().partition(": ")
        if label == "Speed" and value.endswith("Mb/s"):
            return float(value.removesuffix("Mb/s")) * 1e6
    return LINE_DEFAULT
