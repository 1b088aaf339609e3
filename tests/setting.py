"""What an agent would have told a world: peers, policies, services, NAT; and the rows for it.

Rule: a Setting says what is meant and is all that a twin reads; Agent alone knows the rows.

Theory. Rows are written here by hand from xdp/abi.h, without the agent's own writers, so that the
kernels' tests stand on their own. Policy row 2 + port belongs to the pod at that port.
"""

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network

import numpy as np

from dataplane.tables.fib4 import Fib4
from dataplane.tables.fib6 import Fib6
from tests import worlds as w
from tests.segments import TCP, Address
from xdp.abi import CONST, value

MASK64 = (1 << 64) - 1
ANY = CONST["POLICY_ANY_PROTOCOL"]
ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
ANSWERS = {name: value(f"REFUSAL_{name}") for name in ("DROP", "ICMP", "RESET")}
CLOSED = 0
WIDE = 1 << 19
PORT_ROWS = {6: 0, 17: 1, 132: 2}  # rows of the port tables; else 3


def word(action: int, rule: int = 0, answer: str = "DROP") -> int:
    """A verdict word."""
    return action | ANSWERS[answer] << CONST["POLICY_ANSWER_SHIFT"] | rule << 8


@dataclass(frozen=True)
class Peer:
    """What addresses of a prefix are. wide: a wide group, which has a number from WIDE on."""

    identity: int
    group: int = 0
    flags: int = 0
    wide: int = 0


@dataclass(frozen=True)
class Entry:
    """One entry of a chain: `depth` leading bits of the port count; group 0: any peer.

    A group from WIDE on is a wide one; in truth any number may be either.
    """

    verdict: int
    group: int = 0
    protocol: int = ANY
    port: int = 0
    depth: int = 0


@dataclass(frozen=True)
class Policy:
    """What a pod may receive and send; otherwise: verdict words of what no entry names."""

    ingress: tuple[Entry, ...] = ()
    egress: tuple[Entry, ...] = ()
    ingress_otherwise: int = ALLOW
    egress_otherwise: int = ALLOW
    flags: int = 0


OPEN = Policy()


@dataclass(frozen=True)
class Backend:
    """Where a service leads."""

    address: Address
    port: int
    protocol: int = TCP
    state: str = "ACTIVE"


@dataclass(frozen=True)
class Service:
    """A service: where it is found (address, port, protocol), where it leads.

    outside: backends for clients outside, None: the same; sources: of the fronts' family.
    """

    fronts: tuple[tuple[Address, int, int], ...]
    inside: tuple[Backend, ...] = ()
    outside: tuple[Backend, ...] | None = None
    flags: int = 0
    affinity_s: int = 0
    sources: tuple[IPv4Network | IPv6Network, ...] = ()
    table: tuple[int, ...] = ()  # positions in `inside`

    @property
    def away(self) -> tuple[Backend, ...]:
        """Backends for clients outside."""
        return self.inside if self.outside is None else self.outside


@dataclass(frozen=True)
class Setting:
    """Everything an agent says beside ports and routes."""

    peers: dict[IPv4Network | IPv6Network, Peer] = field(default_factory=dict)
    policies: dict[int, Policy | None] = field(default_factory=dict)  # by port; None: a row of 0
    services: tuple[Service, ...] = ()
    flags: int = CONST["NODE_REJECT"]
    masquerade: bool = False
    node_ports: frozenset[tuple[int, int]] = frozenset()  # (protocol, port) of the node's own
    nat: tuple[int, int] = (w.NAT_FIRST, w.NAT_COUNT)


def halves(address: Address) -> tuple[int, int]:
    """High and low 64 bits."""
    return int(address) >> 64, int(address) & MASK64


def _mixed(first: int, second: int, third: int) -> int:
    h = first ^ first >> 32
    h = h * second & MASK64
    return (h ^ h >> 29) & MASK64 & third


def entry_slot(key: int, match: int) -> int:
    """First slot of a policy entry."""
    first = (key * 0x9E3779B97F4A7C15 ^ match * 0xC2B2AE3D27D4EB4F) & MASK64
    return _mixed(first, 0xD6E8FEB86659FD93, CONST["POLICY_SLOTS"] - 1)


def frontend_slot(hi: int, lo: int, port: int, protocol: int) -> int:
    """First slot of a frontend."""
    first = hi * 0x9E3779B97F4A7C15 ^ lo * 0xC2B2AE3D27D4EB4F
    first ^= (port << 8 | protocol) * 0xD6E8FEB86659FD93
    return _mixed(first & MASK64, 0x9E3779B97F4A7C15, CONST["FRONTEND_SLOTS"] - 1)


class Agent:
    """Writes settings into a world."""

    def __init__(self, world: w.World) -> None:
        """Nothing stands but that the pods are open."""
        self.world, self.shm = world, world.shm
        shm = world.shm
        self._fibs = {
            4: Fib4(shm.ipcache4_wide, shm.ipcache4_deep, extents=shm.extents("ipcache4_wide")),
            6: Fib6(shm.ipcache6, shm.ipcache6_lengths, extents=shm.extents("ipcache6")),
        }
        self._entries: list[int] = []
        self._frontends: list[int] = []
        self._rows: dict[tuple[Address, int, int], int] = {}  # of backends: they stay what they are

    def write(self, setting: Setting) -> None:
        """Make a setting stand; live connections are judged again."""
        self._peers(setting)
        self._policies(setting)
        self._services(setting)
        self._nat(setting)
        self.shm.control["judgement"] += 1

    def _peers(self, setting: Setting) -> None:
        wanted = {
            (net.version, int(net.network_address), net.prefixlen): peer
            for net, peer in setting.peers.items()
        }
        for version, fib in self._fibs.items():
            for key in [key for key in fib.routes if (version, *key) not in wanted]:
                fib.delete(*key)
        for row, ((version, address, length), peer) in enumerate(wanted.items(), 1):
            self.shm.peers[row] = (peer.wide << 32 | peer.group, peer.identity, peer.flags)
            if self._fibs[version].routes.get((address, length)) != row:
                self._fibs[version].set(address, length, row)

    def _policies(self, setting: Setting) -> None:
        shm = self.shm
        for slot in self._entries:
            shm.policy_entries[slot] = 0
        self._entries.clear()
        for port in w.POD4:
            policy, row = setting.policies.get(port, OPEN), 2 + port
            shm.policies[row] = np.zeros((), shm.policies.dtype)
            shm.subjects[port]["policy"] = row if policy else CLOSED
            if policy:
                self.policy(row, policy)

    def policy(self, row: int, policy: Policy) -> None:
        """Write a policy row and its entries."""
        place = self.shm.policies[row]
        place["flags"] = policy.flags
        sides = (("ingress", policy.ingress), ("egress", policy.egress))
        for direction, (side, entries) in enumerate(sides):
            depths = {"": 0, "wide_": 0, "any_": 0}
            for entry in entries:
                bit = 1 << (17 if entry.protocol == ANY else entry.depth)
                kind = "wide_" if entry.group >= WIDE else "" if entry.group else "any_"
                depths[kind] |= bit
                self._entry(row, direction, entry)
            for kind, bits in depths.items():
                place[f"{side}_{kind}depths"] = bits
            place[f"{side}_otherwise"] = getattr(policy, f"{side}_otherwise")

    def _entry(self, row: int, direction: int, entry: Entry) -> None:
        match = entry.protocol << 8 | direction << 7 | entry.depth + 1
        key = row << 48 | entry.group << 16 | entry.port >> 16 - entry.depth << 16 - entry.depth
        rows, slot = self.shm.policy_entries, entry_slot(key, match)
        while rows[slot]["match"] and (rows[slot]["key"], rows[slot]["match"]) != (key, match):
            slot = (slot + 1) % len(rows)
        rows[slot] = (key, match, entry.verdict)
        self._entries.append(slot)

    def _services(self, setting: Setting) -> None:
        shm = self.shm
        for slot in self._frontends:
            shm.frontends[slot] = np.zeros((), shm.frontends.dtype)
        self._frontends.clear()
        for row in self._rows.values():
            shm.backends[row]["state"] = value("BACKEND_EMPTY")
        self._ends = {"backend_lists": 1, "maglev": 1, "source_ranges": 1}
        for number, service in enumerate(setting.services, 1):
            row = shm.services[number]
            row["flags"], row["affinity_s"] = service.flags, service.affinity_s
            inside = [self.backend(backend) for backend in service.inside]
            row["inside"] = self._part("backend_lists", inside)
            row["outside"] = self._part("backend_lists", [self.backend(b) for b in service.away])
            table = self._part("maglev", [inside[n] for n in service.table])
            row["inside_table"] = row["outside_table"] = table
            ranges = [(*halves(net[0]), *halves(net.netmask)) for net in service.sources]
            row["sources"] = self._part("source_ranges", ranges)
            for address, port, protocol in service.fronts:
                self._frontend((*halves(address), port, protocol), number)

    def backend(self, backend: Backend) -> int:
        """Row of a backend, written."""
        key = (backend.address, backend.port, backend.protocol)
        row = self._rows.setdefault(key, len(self._rows) + 1)
        state = value(f"BACKEND_{backend.state}")
        hi, lo = halves(backend.address)
        self.shm.backends[row] = (hi, lo, backend.port, backend.protocol, state, 0, 0)
        return row

    def _part(self, name: str, items: list) -> int:
        if not items:
            return 0
        first = self._ends[name]
        self._ends[name] += len(items)
        for n, item in enumerate(items):
            getattr(self.shm, name)[first + n] = item
        return first << 32 | len(items)

    def _frontend(self, key: tuple[int, int, int, int], service: int) -> None:
        rows, slot = self.shm.frontends, frontend_slot(*key)
        while rows[slot]["state"]:
            slot = (slot + 1) % len(rows)
        rows[slot] = (*key, value("SLOT_USED"), service, 0)
        self._frontends.append(slot)

    def _nat(self, setting: Setting) -> None:
        hi, lo = halves(w.NODE6) if setting.masquerade else (0, 0)
        self.world.writer.set_node(
            flags=setting.flags,
            nat_first=setting.nat[0],
            nat_count=setting.nat[1],
            masquerade4=int(w.NODE4) if setting.masquerade else 0,
            masquerade6_hi=hi,
            masquerade6_lo=lo,
        )
        self.shm.node_ports[:] = 0
        for protocol, port in setting.node_ports:
            row = PORT_ROWS.get(protocol, 3)
            self.shm.node_ports[row, port >> 3] |= 1 << (port & 7)
