"""Policies, slowly: twin of kernels/policy.py and kernels/verdict.py.

Rule: every entry is looked at; a Setting (tests/setting.py) is all that is known.

Theory. In a chain (a group's, a wide group's, or that of any peer) the longest port prefix counts,
then any protocol; of the three chains a deny wins, then the group's own word, then the wide
group's; then what is said of the rest. Both ends are asked when both are pods of this node.
"""

from dataclasses import dataclass

from tests.naive import node
from tests.naive.route import longest
from tests.setting import ANY, DENY, OPEN, Backend, Entry, Peer, Setting
from xdp.abi import CONST

ALLOW, ACTION, AUDIT = CONST["POLICY_ALLOW"], CONST["POLICY_ACTION_MASK"], CONST["POLICY_AUDIT"]
HAIRPIN = CONST["NODE_POLICY_HAIRPIN"]
NOBODY = Peer(0)


@dataclass(frozen=True)
class Verdict:
    """reason: name, empty: it may pass."""

    reason: str = ""
    word: int = 0
    egress: int = 0
    ingress: int = 0
    audited: bool = False


def peer(setting: Setting, address) -> Peer:
    """What an address is."""
    networks = list(setting.peers)
    number = longest({network: n for n, network in enumerate(networks, 1)}, address)
    return setting.peers[networks[number - 1]] if number else NOBODY


def stands(setting: Setting, backend: Backend) -> bool:
    """Whether a backend is one of any service's."""
    return any(backend in (*service.inside, *service.away) for service in setting.services)


def chain(entries: tuple[Entry, ...], group: int, protocol: int, port: int) -> int:
    """Verdict word of a chain, 0: it says nothing."""
    fits = [
        entry
        for entry in entries
        if entry.group == group
        and entry.protocol == protocol
        and entry.port >> 16 - entry.depth == port >> 16 - entry.depth
    ]
    if fits:
        return max(fits, key=lambda entry: entry.depth).verdict
    anything = [entry for entry in entries if entry.group == group and entry.protocol == ANY]
    return anything[0].verdict if anything else 0


def ask(entries, otherwise: int, group: int, wide: int, protocol: int, port: int) -> int:
    """Verdict word about a peer of a group and a wide group."""
    own = chain(entries, group, protocol, port) if group else 0
    many = chain(entries, wide, protocol, port) if wide else 0
    anybody = chain(entries, 0, protocol, port)
    for said in (own, many, anybody):
        if said & ACTION == DENY:
            return said
    return own or many or anybody or otherwise


def _reason(said: int, otherwise: int) -> str:
    if said == 0:
        return "ENDPOINT_NOT_READY"
    return "POLICY_DENIED" if said == otherwise else "POLICY_DENIED_BY_RULE"


def both(setting: Setting, source, target, protocol: int, port: int) -> Verdict:
    """What the policies of both ends say. port: the target's, or the ICMP type."""
    (kind, sender), (kind_to, receiver) = node.route(source), node.route(target)
    from_pod, to_pod = kind == "pod", kind_to == "pod"
    if from_pod and to_pod and sender == receiver and not setting.flags & HAIRPIN:
        if setting.policies.get(sender, OPEN) is not None:
            return Verdict()
    denials: list[tuple[str, int, bool]] = []
    words = {"egress": 0, "ingress": 0}
    for side, asked, port_index, other in (
        ("egress", from_pod, sender, target),
        ("ingress", to_pod, receiver, source),
    ):
        if not asked or (denials and not denials[0][2]):
            continue
        policy = setting.policies.get(port_index, OPEN)
        said = otherwise = 0
        audits = False
        if policy is not None:
            otherwise = getattr(policy, f"{side}_otherwise")
            who = peer(setting, other)
            said = ask(getattr(policy, side), otherwise, who.group, who.wide, protocol, port)
            audits = bool(policy.flags & AUDIT)
        words[side] = said
        if said & ACTION != ALLOW:
            denials.append((_reason(said, otherwise), said, audits))
    enforced = [denial for denial in denials if not denial[2]]
    if enforced:
        return Verdict(enforced[0][0], enforced[0][1], **words)
    return Verdict(audited=bool(denials), **words)
