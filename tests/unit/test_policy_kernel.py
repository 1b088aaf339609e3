"""The lookup of policies against its twin; both ends; identities out of the tunnel.

Compiled policies against manifests are test_policy_random.py's; here entries are made up.
"""

from ipaddress import ip_network
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import Ether
from scapy.layers.vxlan import VXLAN

from dataplane.kernels import policy as kernel_policy
from dataplane.kernels.house import kernel
from tests import records
from tests import segments as sg
from tests import worlds as w
from tests.naive import judgement
from tests.places import FAMILIES, FAR, OUT, PEERS, A, B, is_drop, send
from tests.setting import (
    ALLOW,
    ANY,
    DENY,
    WIDE,
    Agent,
    Entry,
    Peer,
    Policy,
    Setting,
    entry_slot,
    word,
)
from tests.worlds import HOST, POD_A, POD_B, UPLINK
from xdp.abi import CONST, value

BY_FAMILY = pytest.mark.parametrize("f", FAMILIES)
MASK64 = (1 << 64) - 1
PROBES, SLOTS = CONST["POLICY_PROBES_MAX"], CONST["POLICY_SLOTS"]
INGRESS, EGRESS = 0, 1


@kernel
def _ask_all(t, row, direction, asked, out):
    for n in range(len(asked)):
        group, wide, protocol, port = asked[n]
        groups = np.uint64(wide << 32 | group)
        if direction == 1:
            out[n] = kernel_policy.egress(t, row, groups, protocol, port)
        else:
            out[n] = kernel_policy.ingress(t, row, groups, protocol, port)


def ask_all(world, row: int, direction: int, asked: list) -> list[int]:
    """Verdict words about (group, wide group, protocol, port)."""
    out = np.zeros(len(asked), np.int64)
    _ask_all(world.tables, row, direction, np.array(asked, np.int64), out)
    return out.tolist()


@pytest.fixture(scope="module")
def stage(worlds):
    world = worlds("TUNNEL_VXLAN", 4, 1_000_000, 1, 1024)
    return world, Agent(world)


@pytest.fixture
def world(stage):
    world, agent = stage
    agent.write(Setting(peers=PEERS))
    world.forget()
    return world


@pytest.fixture
def agent(stage, world):
    return stage[1]


# --- entries ------------------------------------------------------------------------------------

words = st.sampled_from([word(ALLOW, 1), word(ALLOW, 2), word(DENY, 3), word(DENY, 4, "RESET")])
GROUPS, PROTOCOLS = [0, 0, 1, 2, WIDE - 1], [6, 17, 132, 1, 58, 0]
WIDES = [WIDE, (1 << 20) - 1]


@st.composite
def entries(draw) -> tuple[Entry, ...]:
    """Entries that overlap in every way: nested ports, any port, any protocol, all chains."""
    found = {}
    for _ in range(draw(st.integers(0, 12))):
        group = draw(st.sampled_from([*GROUPS, *WIDES]))
        protocol = draw(st.sampled_from([*PROTOCOLS, ANY]))
        depth = 0 if protocol == ANY else draw(st.integers(0, 16))
        port = draw(st.sampled_from([0, 80, 443, 8080, 0x8000, 0xFFFF]))
        entry = Entry(draw(words), group, protocol, port >> 16 - depth << 16 - depth, depth)
        found[entry.group, protocol, entry.port, depth] = entry
    return tuple(found.values())


NUMBERS = (0, 80, 81, 443, 8080, 0x7FFF, 0x8000, 0xFFFF)
ASKED = [*product({*GROUPS, 7}, (0, *WIDES), (*PROTOCOLS, 47), NUMBERS)]
policies = st.builds(Policy, entries(), entries(), words, words)


@settings(max_examples=100, deadline=None)
@given(first=policies, second=policies)
def test_lookups_are_their_twin(stage, first, second):
    """Two rows at a time: none says anything about the other's pods."""
    world, agent = stage
    agent.write(Setting(policies={POD_A: first, POD_B: second}))
    for port, policy in ((POD_A, first), (POD_B, second)):
        for direction, side in ((INGRESS, "ingress"), (EGRESS, "egress")):
            said, otherwise = getattr(policy, side), getattr(policy, f"{side}_otherwise")
            found = ask_all(world, 2 + port, direction, ASKED)
            for question, answer in zip(ASKED, found, strict=True):
                assert answer == judgement.ask(said, otherwise, *question), (side, question)


def crowd(count: int) -> list[tuple[int, int]]:
    """(group, first slot) of entries for TCP 80 of row 9 whose first slot is nearly the same."""
    match = (6 << 8 | INGRESS << 7 | 17) * 0xC2B2AE3D27D4EB4F & MASK64
    groups = np.arange(1, 1 << 22, dtype=np.uint64)
    keys = np.uint64(9 << 48 | 80) | groups << np.uint64(16)
    mixed = keys * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(match)
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
    slots = (mixed ^ mixed >> np.uint64(29)) & np.uint64(SLOTS - 1)
    order = np.argsort(slots, kind="stable")
    last = slots[order][-400:]  # at the end of the table, so that a run wraps
    near = order[-400:][last >= SLOTS - 40]
    return [(int(groups[n]), int(slots[n])) for n in near[:count]]


def test_runs_of_slots_are_searched_to_their_limit_and_no_further(world, agent):
    """A lookup passes others' entries and deleted ones, over the end of the table, 64 slots far."""
    found = crowd(40)
    assert len(found) == 40
    agent.policy(9, Policy(tuple(Entry(word(ALLOW, group % 1000), group, 6, 80, 16)
                                 for group, _ in found), ingress_otherwise=word(DENY)))  # fmt: skip

    def ask(group: int) -> int:
        return ask_all(world, 9, INGRESS, [(group, 0, 6, 80)])[0]

    rows = world.shm.policy_entries
    for group, first in found:
        assert first == entry_slot(9 << 48 | group << 16 | 80, 6 << 8 | 17)
        assert ask(group) == word(ALLOW, group % 1000)
    gone = agent._entries[1::2]
    for slot in gone:  # deleted ones do not end a run
        rows[slot]["match"] = 127
    for n, (group, _) in enumerate(found):
        assert ask(group) == (word(DENY) if n % 2 else word(ALLOW, group % 1000))
    group, first = found[-1]
    key, match = 9 << 48 | group << 16 | 80, 6 << 8 | 17
    everything = rows.copy()
    try:
        for n in range(PROBES + 1):
            rows[(first + n) % SLOTS] = (1, 5 << 8 | 1, word(ALLOW))
        rows[(first + PROBES - 1) % SLOTS] = (key, match, word(ALLOW, 77))
        assert ask(group) == word(ALLOW, 77)
        rows[(first + PROBES - 1) % SLOTS] = (1, 5 << 8 | 1, word(ALLOW))
        rows[(first + PROBES) % SLOTS] = (key, match, word(ALLOW, 77))
        assert ask(group) == word(DENY)
    finally:
        rows[:] = everything


# --- both ends ----------------------------------------------------------------------------------


@BY_FAMILY
def test_a_pod_without_a_policy_row_is_closed(world, agent, f):
    """From the first packet on, both ways, for itself too: its rows may not be written yet."""
    agent.write(Setting(peers=PEERS, policies={POD_B: None}))
    for e in ((A[f], 1, B[f], 53), (B[f], 1, A[f], 53), (B[f], 1, OUT[f], 53), (B[f], 1, B[f], 53)):
        assert is_drop(send(world, sg.udp(sg.Ends(*e))), "ENDPOINT_NOT_READY")
    assert not records.live(world)


@BY_FAMILY
@pytest.mark.parametrize("hairpin", [False, True])
def test_a_pod_and_itself(world, agent, f, hairpin):
    """A pod cannot block itself (NetworkPolicy v1), unless one wants it so."""
    closed = Policy(ingress_otherwise=word(DENY), egress_otherwise=word(DENY))
    flags = CONST["NODE_POLICY_HAIRPIN"] if hairpin else 0
    agent.write(Setting(peers=PEERS, policies={POD_B: closed}, flags=flags))
    assert send(world, sg.udp(sg.Ends(B[f], 1, B[f], 53))).sent != hairpin


@BY_FAMILY
def test_each_end_sees_the_other(world, agent, f):
    """The sender's policy is asked about the receiver, the receiver's about the sender."""
    out = Policy(egress=(Entry(word(ALLOW, 1), 2, 17, 53, 16),), egress_otherwise=word(DENY))
    into = Policy(ingress=(Entry(word(ALLOW, 2), 1, 17, 53, 16),), ingress_otherwise=word(DENY))
    agent.write(Setting(peers=PEERS, policies={POD_A: out, POD_B: into}))
    assert send(world, sg.udp(sg.Ends(A[f], 1, B[f], 53))).egress == POD_B
    assert is_drop(send(world, sg.udp(sg.Ends(A[f], 1, B[f], 54))), "POLICY_DENIED")
    assert is_drop(send(world, sg.udp(sg.Ends(A[f], 1, FAR[f], 53))), "POLICY_DENIED")
    assert is_drop(send(world, sg.udp(sg.Ends(FAR[f], 1, B[f], 53))), "POLICY_DENIED")
    assert send(world, sg.udp(sg.Ends(B[f], 53, FAR[f], 1))).egress == UPLINK
    assert send(world, sg.udp(sg.Ends(FAR[f], 1, B[f], 53))).egress == POD_B  # an answer


@BY_FAMILY
def test_a_denied_packet_names_its_rule_and_both_identities(world, agent, f):
    no = Policy(ingress=(Entry(word(DENY, 42), 1, 17, 53, 16),), ingress_otherwise=word(DENY, 43))
    agent.write(Setting(peers=PEERS, policies={POD_B: no}))
    assert is_drop(send(world, sg.udp(sg.Ends(A[f], 1, B[f], 53))), "POLICY_DENIED_BY_RULE")
    assert int(world.batch.refusal[0]) >> CONST["POLICY_RULE_SHIFT"] == 42
    assert (int(world.batch.source_identity[0]), int(world.batch.target_identity[0])) == (
        70001, 70002,
    )  # fmt: skip
    assert is_drop(send(world, sg.udp(sg.Ends(A[f], 1, B[f], 54))), "POLICY_DENIED")
    assert int(world.batch.refusal[0]) >> CONST["POLICY_RULE_SHIFT"] == 43


@BY_FAMILY
@pytest.mark.parametrize("audits", ["A", "B", "AB"])
def test_an_audit_lets_pass_and_counts_what_it_would_deny(world, agent, f, audits):
    """One end's audit is no permission for the other end's enforcement."""
    flags = {name: CONST["POLICY_AUDIT"] if name in audits else 0 for name in "AB"}
    a = Policy(egress_otherwise=word(DENY, 5), flags=flags["A"])
    b = Policy(ingress_otherwise=word(DENY, 6), flags=flags["B"])
    agent.write(Setting(peers=PEERS, policies={POD_A: a, POD_B: b}))
    result = send(world, sg.udp(sg.Ends(A[f], 1, B[f], 53)))
    world.tally()
    if audits != "AB":
        assert is_drop(result, "POLICY_DENIED")
        assert int(world.batch.refusal[0]) == word(DENY, 5 if audits == "B" else 6)
        return
    for _ in range(2):  # the first packet and a later one
        assert result.egress == POD_B
        assert int(world.batch.reason[0]) == value("REASON_AUDITED")
        result = send(world, sg.udp(sg.Ends(A[f], 1, B[f], 53)))
        world.tally()


@BY_FAMILY
def test_icmp_is_judged_by_its_type(world, agent, f):
    protocol, ask = (1, 8) if f == 4 else (58, 128)
    only = Policy(ingress=(Entry(word(ALLOW, 1), 0, protocol, ask, 16),),
                  ingress_otherwise=word(DENY))  # fmt: skip
    agent.write(Setting(peers=PEERS, policies={POD_B: only}))
    e = sg.Ends(A[f], 7, B[f], 0)
    assert send(world, sg.echo(e)).egress == POD_B
    assert send(world, sg.echo(e.back(), reply=True)).egress == POD_A
    other = 13 if f == 4 else 139  # another question: time stamp, node information
    assert is_drop(send(world, sg.error(e, other, 0, b"who")), "POLICY_DENIED")
    assert is_drop(send(world, sg.echo(sg.Ends(A[f], 0, B[f], 9), reply=True)), "CT_INVALID")
    agent.write(Setting(peers=PEERS, policies={POD_B: only}))  # judged again by the same type
    assert send(world, sg.echo(e)).egress == POD_B


# --- identities and the tunnel ------------------------------------------------------------------


@pytest.fixture
def told(stage, world):
    """VNIs carry identities; identity 300 belongs to group 4, and no address of node 2 is known."""
    world, agent = stage
    only = Policy(ingress=(Entry(word(ALLOW, 1), 4, 17, 53, 16),), ingress_otherwise=word(DENY))

    def tell(known: Peer | None):
        peers = {net: peer for net, peer in PEERS.items() if net not in (w.FAR4, w.FAR6)}
        for f in FAMILIES if known else ():
            peers[ip_network(FAR[f])] = known
        world.shm.peers[900] = (4, 300, 0)
        world.shm.identity_peers[300] = 900
        agent.write(Setting(peers=peers, policies={POD_B: only}, flags=CONST["NODE_IDENTITY_VNI"]))
        return world

    yield tell
    world.shm.identity_peers[300] = 0


def arrives(world, frame: bytes, vni: int):
    return world.one(UPLINK, sg.vxlan(frame, w.REMOTE4, w.NODE4, vni))


@BY_FAMILY
def test_an_unknown_source_is_what_its_tunnel_says(told, f):
    world = told(None)
    frame = sg.udp(sg.Ends(FAR[f], 1, B[f], 53))
    for vni in (0, 299, 301, 65536 + 300, 0xFFFFFF):
        assert is_drop(arrives(world, frame, vni), "POLICY_DENIED")
    assert arrives(world, frame, 300).egress == POD_B
    (row,) = records.live(world).values()
    assert int(row["source_identity"]) == 300


@BY_FAMILY
def test_it_stays_so_when_it_is_judged_again(told, f):
    world = told(None)
    frame = sg.udp(sg.Ends(FAR[f], 1, B[f], 53))
    assert arrives(world, frame, 300).sent
    for _ in range(2):
        world.shm.control[0]["judgement"] += 1
        assert send(world, sg.udp(sg.Ends(B[f], 53, FAR[f], 1))).sent
        assert arrives(world, frame, 300).sent


@BY_FAMILY
@pytest.mark.parametrize("flags", ["PEER_POD", "PEER_HOST", "PEER_REMOTE_NODE"])
def test_a_known_source_is_what_its_address_says(told, f, flags):
    """The tunnel's word does not count where the address is known: a node may not lend a name."""
    world = told(Peer(200, 0, CONST[flags]))
    frame = sg.udp(sg.Ends(FAR[f], 1, B[f], 53))
    assert is_drop(arrives(world, frame, 300), "POLICY_DENIED")


@BY_FAMILY
def test_a_cidr_does_not_hide_what_the_tunnel_says(told, f):
    """A peer that is only a prefix of a rule is not known to be anybody."""
    world = told(Peer(value("IDENTITY_CIDR_FIRST"), 0, 0))
    assert arrives(world, sg.udp(sg.Ends(FAR[f], 1, B[f], 53)), 300).egress == POD_B


@BY_FAMILY
def test_the_identity_travels_in_the_vni(told, f):
    """A pod's own; the node's traffic, and what has the node's address, as a remote node's."""
    world = told(None)

    def vni(port: int, frame: bytes) -> int:
        result = world.one(port, frame)
        assert result.egress == UPLINK
        return Ether(result.frame)[VXLAN].vni

    assert vni(POD_A, sg.udp(sg.Ends(A[f], 1, FAR[f], 53))) == w.IDENTITY[POD_A]
    assert vni(POD_B, sg.udp(sg.Ends(B[f], 1, FAR[f], 53))) == w.IDENTITY[POD_B]
    node = w.NODE4 if f == 4 else w.NODE6
    assert vni(HOST, sg.udp(sg.Ends(node, 1, FAR[f], 53))) == value("IDENTITY_REMOTE_NODE")
