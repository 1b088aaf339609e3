"""What `fqdn why` names as being in the way, of what a node knows."""

from ipaddress import ip_address
from types import SimpleNamespace

import numpy as np
import pytest

from dataplane.policy.name_why import Reason
from dataplane.policy.reach import Asked, Way, service_name
from dataplane.policy.reasons import explain
from dataplane.tables.drops_view import Drop, dropped
from dataplane.tables.shm import Shm
from xdp.abi import value

POD, STORE, OLD, DNS = map(ip_address, ("10.1.0.2", "192.0.2.1", "192.0.2.9", "10.96.0.53"))
DENIED, TOO_BIG = value("REASON_POLICY_DENIED"), value("REASON_FRAGMENTATION_NEEDED")
CLOSED = {"allowed": False, "why": "no rule fits", "rules": [], "isolated_by": ["NetworkPolicy x"]}
OPEN = {"allowed": True, "why": "a rule", "rules": ["NetworkPolicy x egress[0]"], "isolated_by": []}


def known(*reasons: Reason, ports: tuple[str, ...] = ("443/tcp",)) -> dict:
    return {"name": "a.example.", "pod": {"ports": list(ports), "identity": 7},
            "reasons": list(reasons)}  # fmt: skip


def told(what: dict, now=(STORE,), before=(), ways=(), drops=(), opened=()) -> list[str]:
    """Codes of the reasons, and that each has a text."""
    reach = SimpleNamespace(
        asked=Asked("shop/web", (POD,), what), now=set(now), before=set(before), ways=list(ways),
        drops=list(drops), opened=list(opened), there=set(now), mtu=lambda address: 1450,
        of_cluster=lambda address: address == DNS, policy_of=lambda words: {1: "NetworkPolicy x"},
        works=lambda there, since: bool(opened and opened[0]["reply_packets"]),
    )  # fmt: skip
    said = explain(reach)
    assert all(one.text for one in said["reasons"] + said["perhaps"])
    return [one.code for one in said["reasons"]] + [
        f"perhaps {one.code}" for one in said["perhaps"]
    ]


def drop(target, reason=DENIED, port="443/tcp", first=3.0, last=1.0) -> Drop:
    return Drop(target, port, reason, 1, 2, 400, first, last)


def way(egress=OPEN, ingress=OPEN, mtu=1450, **more) -> Way:
    said = {"allowed": egress["allowed"] and ingress["allowed"], "target": "db/sql",
            "port": "443/tcp", "egress": egress, "ingress": ingress,
            "change": ["ingress: add a rule"]}  # fmt: skip
    return Way(STORE, "443/tcp", mtu, behind=[(STORE, "443/tcp")], judged=[said], **more)


UNASKED, STALE, REFUSED = (Reason(code, code) for code in ("unasked", "stale", "refused"))
SILENT = {"destination": str(STORE), "reply_source": str(STORE), "reply_source_port": 443,
          "protocol": "tcp", "packets": 3, "reply_packets": 0, "flags": []}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ([], {"ways": [way()]}),
        (["refused"], {"what": known(REFUSED), "ways": [way(egress=CLOSED)]}),
        (["unasked"], {"what": known(UNASKED), "now": ()}),
        (["policy"], {"what": known(UNASKED), "now": (), "drops": [drop(DNS, port="53/udp")]}),
        (["stale"], {"what": known(STALE), "now": ()}),
        (["unasked"], {"what": known(STALE, ports=()), "now": ()}),
        (["stale"], {"what": known(STALE), "now": (), "before": [OLD], "drops": [drop(OLD)]}),
        (["stale"], {"before": [OLD], "drops": [drop(OLD)]}),
        (["perhaps stale"], {"drops": [drop(OLD)]}),
        (["stale"], {"what": known(), "now": ()}),
        ([], {"drops": [drop(OLD)], "what": known(ports=())}),
        ([], {"drops": [drop(OLD)], "opened": [SILENT | {"reply_packets": 1}]}),
        (["policy"], {"ways": [way(egress=CLOSED)]}),
        (["policy", "policy"], {"ways": [way(CLOSED, CLOSED)], "what": known(ports=())}),
        (["backend"], {"ways": [Way(STORE, "80/tcp", service="shop/web:http")]}),
        (["route"], {"ways": [way(mtu=0)]}),
        (["mtu"], {"ways": [way()], "drops": [drop(STORE, TOO_BIG)]}),
        ([], {"ways": [way()], "drops": [drop(STORE, TOO_BIG, first=1.2)]}),
        (["dropped"], {"ways": [way()], "drops": [drop(STORE, value("REASON_NO_NAT_MAPPING"))]}),
        (["silent"], {"ways": [way()], "opened": [SILENT]}),
        ([], {"ways": [way()], "opened": [SILENT, SILENT | {"reply_packets": 1}]}),
    ],
)  # fmt: skip
def test_the_first_thing_in_the_way_is_the_reason(wanted, given):
    assert told(given.pop("what", known()), **given) == wanted


def test_a_service_has_a_name_of_two_labels():
    assert service_name("web.shop.svc.cluster.local.", "cluster.local") == "shop/web"
    assert service_name("Web.Shop.svc", "cluster.local") == "shop/web"
    for other in ("shop.svc.cluster.local", "p.web.shop.svc.cluster.local", "web.shop", "a.svc.b"):
        assert service_name(other, "cluster.local") == ""


def test_drops_of_one_sender_are_added_up(tmp_path):
    with Shm.create(tmp_path) as shm:
        rows = shm.flow_records[0]
        second = 1_000_000_000
        for n, (source, at) in enumerate([(POD, 5), (OLD, 6), (POD, 7)]):
            rows[n]["kind"], rows[n]["family"], rows[n]["protocol"] = value("EVENT_DROP"), 4, 6
            rows[n]["source_lo"], rows[n]["target_lo"] = int(source), int(STORE)
            rows[n]["target_port"], rows[n]["reason"] = 443, DENIED
            rows[n]["time_ns"], rows[n]["packets"], rows[n]["bytes"] = at * second, 2, 228
        shm.event_rings["head"][0] = np.uint64(3)
        found = dropped(shm, [POD], 10 * second, 60 * second)
        assert [(one.target, one.port, one.packets, one.mean) for one in found] == [
            (STORE, "443/tcp", 4, 100)
        ]
        assert (found[0].first_s, found[0].last_s) == (5.0, 3.0)
        assert dropped(shm, [POD], 10 * second, 4 * second)[0].packets == 2
