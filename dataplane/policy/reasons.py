"""What stands in a pod's way to a name: the reasons of `penstock fqdn why NAME --pod`.

Rule: the first thing that is in the way is the first reason; what is over is none.

Theory. In the order of a connection: the name may not be asked for, or leads nowhere; a service has
nobody behind it, an address no route; a policy of either end denies. Then what the forwarder has
seen lately: packets to an address that the name led to before, or that no answer has named; packets
that do not fit and that the pod goes on sending (a healthy sender lowers them at once when it is
told); anything else that was dropped; and who does not answer.
"""

from collections.abc import Iterable
from typing import Any

from dataplane.policy.name_why import Reason
from dataplane.policy.reach import Address, Reach, Way
from dataplane.tables.drops_view import Drop
from xdp.abi import reason_text, value

AGAIN_S = 1.0  # who is told of the MTU again after so long does not heed it
DNS_PORTS = ("53/udp", "53/tcp")
ADDRESSES_SHOWN = 4
DENIED = (value("REASON_POLICY_DENIED"), value("REASON_POLICY_DENIED_BY_RULE"))
TOO_BIG = value("REASON_FRAGMENTATION_NEEDED")


def explain(reach: Reach) -> dict[str, Any]:
    """Return what is known of the question, with `ways`, `dropped`, its `reasons`, and `perhaps`.

    perhaps: Reasons that are guesses, where there are none.
    """
    known = reach.asked.known
    reasons = [one for one in known["reasons"][:1] if one.code == "refused"]
    if not reasons:
        reasons = [] if reach.now else _unled(reach)
        for way in reach.ways:
            reasons += _of_way(reach, way)
        reasons += _stale(reach) + _too_big(reach)
    reasons = reasons or _others(reach) or _silent(reach)
    drops = [one for one in reach.drops if one.target in reach.there | reach.before]
    by = reach.policy_of({one.word for one in drops})
    return {
        **known,
        "ways": [way.plain() for way in reach.ways],
        "dropped": [one.plain(by.get(one.word, "")) for one in drops],
        "reasons": list(dict.fromkeys(reasons)),
        "perhaps": [] if reasons else _elsewhere(reach),
    }


def _unled(reach: Reach) -> list[Reason]:
    """Say why the name leads nowhere, with what the pod has tried."""
    known = reach.asked.known["reasons"]
    if not known:
        text = "its addresses were learned for pods of other labels only (dns.learned_by: identity)"
        return [Reason("stale", text)]
    if known[0].code == "stale" and not reach.asked.ports:  # no rule of the pod needs them
        text = f"the pod has not asked for {reach.asked.name} lately: where it leads is not known"
        return [Reason("unasked", text)]
    lost = [one for one in _denied(reach.drops) if one.port in DNS_PORTS]
    if known[0].code == "unasked" and lost:
        by = reach.policy_of({lost[0].word}).get(lost[0].word, "by policy")
        return [Reason("policy", f"its queries to {lost[0].target} are dropped, {by}: allow DNS")]
    return [] if known[0].code == "stale" and _stale(reach) else list(known)


# --- what should be -------------------------------------------------------------------------------


def _of_way(reach: Reach, way: Way) -> list[Reason]:
    if way.service and not way.behind:
        text = (
            f"service {way.service} has no ready backend for {way.port}: look at the pods that it "
            "selects, and at its EndpointSlices"
        )
        return [Reason("backend", text)]
    if not way.mtu:
        return [Reason("route", f"this node has no route to {way.behind[0][0]}")]
    return [one for said in way.judged for one in _denials(reach, way, said)]


def _denials(reach: Reach, way: Way, said: dict[str, Any]) -> list[Reason]:
    """Say who denies, of one answer of `policy why`."""
    if said.get("allowed", True):
        return []
    if "families" in said:
        both = said["families"].values()
        return [one for each in both for one in _denials(reach, way, each)]
    target, port, reasons = said["target"], said["port"], []
    if not said["egress"]["allowed"]:
        text = f"the pod's own policy keeps it from {target} at {port}: {_by(said['egress'])}"
        ports = reach.asked.ports
        if reach.of_cluster(way.address):
            text += _hint(said, "egress")
        elif ports:
            text += f"; by this name it may have {', '.join(ports)}"
        else:
            text += f"; no rule toFQDNs of it fits {reach.asked.name}: add one"
        reasons.append(Reason("policy", text))
    if not said["ingress"]["allowed"]:
        text = f"policy on the other side: {target} does not let the pod in at {port}: "
        reasons.append(Reason("policy", text + _by(said["ingress"]) + _hint(said, "ingress")))
    return reasons


def _by(side: dict[str, Any]) -> str:
    return f"{side['why']} ({', '.join(side['rules'] or side['isolated_by'])})"


def _hint(said: dict[str, Any], side: str) -> str:
    hints = (one for one in said["change"] if one.startswith(f"{side}: "))
    return next((f"; {one.removeprefix(f'{side}: ')}" for one in hints), "")


# --- what has been --------------------------------------------------------------------------------


def _denied(drops: Iterable[Drop]) -> list[Drop]:
    return [one for one in drops if one.reason in DENIED]


def _stale(reach: Reach) -> list[Reason]:
    """Say of addresses that denied packets went to that the name led there before."""
    name, now = reach.asked.name, reach.now
    return [
        Reason(
            "stale",
            f"the address is stale: {name} led to {one.target} before and leads {_to(now)} now; "
            f"{_packets(one)} denied, the last {_ago(one)}: the program keeps an old answer and "
            "has to ask again",
        )
        for one in _denied(reach.drops)
        if reach.asked.ports and one.target in reach.before and not reach.works(now, one.last_s)
    ]


def _elsewhere(reach: Reach) -> list[Reason]:
    """Name denied addresses outside that no answer has led to: the program has them otherwise."""
    return [
        Reason(
            "stale",
            f"{_packets(one)} to {one.target} denied, the last {_ago(one)}: no answer that is in "
            f"force has led there. If {reach.asked.name} is meant, which leads {_to(reach.now)}, "
            "the program has the address from an old answer, a hosts file or another server",
        )
        for one in _denied(reach.drops)
        if reach.asked.ports
        and one.target not in reach.there
        and not reach.of_cluster(one.target)
        and not reach.works(reach.now, one.last_s)
    ]


def _too_big(reach: Reach) -> list[Reason]:
    return [
        Reason(
            "mtu",
            f"MTU: {_packets(one)} of {one.mean} bytes to {one.target} answered by "
            f'"fragmentation needed", again and again, the last {_ago(one)}: '
            f"{reach.mtu(one.target)} bytes fit. The pod does not heed that: look at its routes, "
            "and for rules in it that drop ICMP",
        )
        for one in reach.drops
        if one.reason == TOO_BIG
        and one.target in reach.there
        and one.first_s - one.last_s >= AGAIN_S
    ]


def _others(reach: Reach) -> list[Reason]:
    """Name drops that nothing above explains."""
    by = reach.policy_of({one.word for one in reach.drops})
    return [
        Reason(
            "dropped",
            f"{_packets(one)} to {one.target} dropped, the last {_ago(one)}: "
            f"{reason_text(one.reason)} {by.get(one.word, '')}".rstrip(),
        )
        for one in reach.drops
        if one.reason != TOO_BIG
        and one.target in reach.there
        and not reach.works({one.target}, one.last_s)
    ]


def _silent(reach: Reach) -> list[Reason]:
    """Name a connection that nobody answers, if none is answered."""
    there = {str(one) for one in reach.there}
    mine = [
        one
        for one in reach.opened
        if there & {one["destination"], one["reply_source"]} and "denied" not in one["flags"]
    ]
    if not mine or any(one["reply_packets"] for one in mine):
        return []
    one = mine[0]
    where = f"{one['reply_source']} at {one['reply_source_port']}/{one['protocol']}"
    text = f"{where} does not answer: {one['packets']} packets have passed, none came back: "
    return [Reason("silent", f"{text}look at that server and the way to it")]


def _packets(drop: Drop) -> str:
    some = f"{drop.packets} packets" if drop.packets > 1 else "a packet"
    return f"{some} ({drop.port})"


def _ago(drop: Drop) -> str:
    return f"{drop.last_s:.0f} s ago"


def _to(now: set[Address]) -> str:
    shown = sorted(map(str, now))[:ADDRESSES_SHOWN]
    return f"to {', '.join(shown)}" if shown else "nowhere"
