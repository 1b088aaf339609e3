"""A captured packet in words: its comment in Wireshark, its line on a terminal.

Rule: a packet's words name what was decided and the rule that decided it, as `policy why` does.

Theory. A verdict word carries the number of its rule; the book of rules beside the tables says what
the number stands for, also while the agent is down. Names of pods come from their records on disk.
"""

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import numpy as np

from dataplane.capture.reader import Seen
from dataplane.policy.rulebook import attributions, read
from dataplane.policy.view import attribution
from dataplane.tables.connection_view import PROTOCOLS
from dataplane.tables.shm import Shm
from xdp.abi import CONST, ENUM, reason_text, value

RULE_SHIFT = CONST["POLICY_RULE_SHIFT"]
PORTS_MAX = CONST["PORTS_MAX"]
DROPS = 130
NAT_SOURCE = CONST["CONNECTION_FLAG_NAT_SOURCE"]
NAT_TARGET = CONST["CONNECTION_FLAG_NAT_TARGET"]
IP4, IP6, ARP, VLAN = 0x0800, 0x86DD, 0x0806, 0x8100
STAGES = {n: name.removeprefix("STAGE_").lower() for name, n in ENUM["stage"].items()}
ORDER = sorted(set(STAGES) - {value("STAGE_RECEIVE")}, key=lambda n: n == value("STAGE_ACCOUNT"))
VERDICTS = {n: name.removeprefix("VERDICT_").lower() for name, n in ENUM["verdict"].items()}
FLAGS = {
    n: name.removeprefix("PACKET_").lower().replace("_", " ")
    for name, n in ENUM["packet_flag"].items()
}
HOPS = {n: name.removeprefix("ADJACENCY_").lower() for name, n in ENUM["adjacency_kind"].items()}
TUNNELS = {8472: 8, 4789: 8, 6081: 8}  # UDP port -> bytes before the inner frame, without options


class Words:
    """Knows devices, pods and rules of one node."""

    def __init__(self, shm: Shm, rules: Path, owners: Mapping[str, str]) -> None:
        """rules: the book's file; owners: device -> namespace/pod."""
        self._shm, self._owners = shm, owners
        self._book = read(rules)
        self._known: dict[int, str] = {}

    def device(self, port: int) -> str:
        """Name of a port's device."""
        return self._shm.ports[port]["name"].decode() if port < PORTS_MAX else ""

    def owner(self, port: int) -> str:
        """The pod behind a port, else the kind of its device."""
        name = self.device(port)
        return self._owners.get(name, "") or ("node" if name.startswith("penstock") else "uplink")

    def place(self, port: int) -> str:
        """Device and whose it is."""
        return f"{self.owner(port)} ({self.device(port)})" if self.device(port) else ""

    def hop(self, adjacency: int) -> str:
        """Where a route leads."""
        row = self._shm.adjacencies[adjacency]
        return f"{HOPS[int(row['kind'])]} {self.place(int(row['port']))}"

    def rule(self, word: int) -> str:
        """What made a verdict word; empty: no rule."""
        number = word >> RULE_SHIFT
        if not number:
            return ""
        if number not in self._known:
            about = attributions(self._book, [number]).get(number)
            self._known[number] = attribution(about) if about else f"rule {number}"
        return self._known[number]

    def comment(self, seen: Seen) -> str:
        """What became of a packet, and by which rule."""
        row = seen.record
        reason = int(row["reason"])
        said = [reason_text(reason)]
        if reason < DROPS and int(row["other"]) < PORTS_MAX:
            way = "to" if seen.inbound else "from"
            said[0] += f" {way} {self.place(int(row['other']))}"
        rules = {
            "refused by": int(row["refusal"]),
            "egress by": int(row["egress_rule"]),
            "ingress by": int(row["ingress_rule"]),
        }
        for name, word in rules.items():
            text = self.rule(word)
            if text and not (reason >= DROPS and name != "refused by"):
                said.append(f"{name} {text}")
        if int(row["source_identity"]) or int(row["target_identity"]):
            said.append(f"identity {row['source_identity']} -> {row['target_identity']}")
        if row["way"]:
            said.append("reply")
        for bit, text in ((NAT_SOURCE, "source"), (NAT_TARGET, "target")):
            if int(row["flags"]) & bit:
                said.append(f"{text} translated")
        return "; ".join(said)

    def line(self, seen: Seen) -> str:
        """A packet on a terminal."""
        point = "in " if seen.inbound else "out"
        where = self.place(int(seen.record["port"]))
        size = int(seen.record["length"])
        return f"{point} {where}  {summary(seen.data)}  {size} bytes  [{self.comment(seen)}]"


def summary(frame: bytes) -> str:
    """Addresses, ports and protocol of a frame; out of the tunnel, if it is in one."""
    if len(frame) < 14:
        return "runt"
    (kind,) = struct.unpack_from(">H", frame, 12)
    if kind == ARP and len(frame) >= 42:
        sender, target = IPv4Address(frame[28:32]), IPv4Address(frame[38:42])
        return f"arp who has {target} tell {sender}"
    if kind == IP4 and len(frame) >= 34:
        ends = [IPv4Address(frame[at : at + 4]) for at in (26, 30)]
        later = struct.unpack_from(">H", frame, 20)[0] & 0x1FFF
        return _transport(frame, ends, frame[23], 14 + (frame[14] & 15) * 4, bool(later))
    if kind == IP6 and len(frame) >= 54:
        six = [IPv6Address(frame[at : at + 16]) for at in (22, 38)]
        return _transport(frame, six, frame[20], 54, False)
    return f"ethertype {kind:#06x}"


def _transport(frame: bytes, ends: list, protocol: int, at: int, later: bool) -> str:
    name = PROTOCOLS.get(protocol, f"protocol {protocol}")
    if protocol not in (6, 17, 132) or later or len(frame) < at + 4:
        return f"{ends[0]} -> {ends[1]} {name}"
    source, target = struct.unpack_from(">HH", frame, at)
    if protocol == 17 and target in TUNNELS and len(frame) >= at + 16:
        options = (frame[at + 8] & 0x3F) * 4 if target == 6081 else 0
        inner = frame[at + 8 + TUNNELS[target] + options :]
        return f"{summary(inner)} (tunnel {ends[0]} -> {ends[1]})"
    texts = [f"[{one}]" if one.version == 6 else str(one) for one in ends]
    return f"{texts[0]}:{source} -> {texts[1]}:{target} {name}"


def stages(seen: Seen, words: Words) -> list[dict[str, Any]]:
    """What each stage made of a packet, in order, with its time: ns a packet of the vector."""
    rows = []
    before = ""
    for number in ORDER:
        step = seen.steps[number]
        if int(step["stage"]) != number:
            continue  # it did not run
        now = _state(step, words)
        ns = round(int(step["ns"]) / max(1, int(seen.record["vector"])), 1)
        after = now if now != before else "the same"
        rows.append({"stage": STAGES[number], "ns": ns, "after": after})
        before = now
    return rows


def _state(step: np.void, words: Words) -> str:
    """A packet as a stage has left it."""
    verdict = VERDICTS[int(step["verdict"]) & 3]
    said = [verdict]
    if verdict == "drop":
        said.append(reason_text(int(step["reason"])))
    if step["connection"]:
        said.append(f"connection {int(step['connection']) - 1}")
    if step["adjacency"]:
        said.append(words.hop(int(step["adjacency"])))
    said += [text for bit, text in FLAGS.items() if int(step["flags"]) & bit]
    return ", ".join(said)
