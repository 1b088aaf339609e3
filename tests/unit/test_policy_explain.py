"""`why` and `lint` over manifests alone."""

import pytest
import yaml

from dataplane.objects.collect import collect
from dataplane.policy.explain import Explainer, Unknown
from dataplane.policy.findings import TEXTS
from dataplane.policy.lint import Linter
from dataplane.policy.options import LocalView, PolicyOptions
from dataplane.policy.why import Why, question
from tests.policy_world import namespace, node, pod, policy, slice_of

CNP, CCNP = "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"
WEB = pod("shop", "web", 10, 1, (("http", 8080, "TCP"),), app="web")
DB = pod("db", "postgres", 11, 2, (("sql", 5432, "TCP"),), app="postgres")
DNS = pod("kube-system", "dns", 12, 2, (("dns", 53, "UDP"),), **{"k8s-app": "kube-dns"})
CLUSTER = [node(1), node(2), namespace("shop"), namespace("db", team="data"),
           namespace("kube-system"), WEB, DB, DNS]  # fmt: skip
SERVICE = [
    {
        "kind": "Service",
        "metadata": {"name": "sql", "namespace": "db"},
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "sql", "port": 5432}]},
    },
    {**slice_of("db", "sql", ["10.244.2.11"]), "ports": [{"name": "sql", "port": 5432}]},
]


def explainer(*policies, more=(), **options) -> Explainer:
    objects = collect([*CLUSTER, *more, *policies])
    return Explainer(objects, PolicyOptions(**options), LocalView("n1"))


def write(name: str, text: str, kind="NetworkPolicy", space="shop", **notes) -> dict:
    return policy(space, name, yaml.safe_load(text), kind, **notes)


def why(source: str, target: str, port: str, *policies, more=(), **options) -> dict:
    answer = Why(explainer(*policies, more=more, **options))
    return answer.answer(question(source, target, port))


DENY = write("deny", "{podSelector: {}, policyTypes: [Ingress, Egress]}")
TO_DB = write("to-db", "{podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: "
              "[{to: [{namespaceSelector: {matchLabels: {team: data}}}], "
              "ports: [{port: 5432}]}]}")  # fmt: skip


def test_without_policies_all_is_open():
    answer = why("shop/web", "db/postgres", "5432/tcp")
    assert answer["allowed"]
    assert answer["egress"]["why"] == "no policy isolates it in this direction"
    assert answer["change"] == []


def test_default_deny_names_the_policies_and_a_rule_that_would_do():
    answer = why("shop/web", "db/postgres", "5432/tcp", DENY)
    assert not answer["allowed"]
    assert not answer["egress"]["allowed"] and answer["ingress"]["allowed"]
    assert answer["egress"]["isolated_by"] == ["NetworkPolicy shop/deny"]
    first, example = answer["change"]
    assert "no rule of NetworkPolicy shop/deny means this peer or 5432/tcp" in first
    proposed = yaml.safe_load(example.partition("for example ")[2])
    rule = write("fix", "{podSelector: {}, policyTypes: [Egress]}")
    rule["spec"] |= proposed
    assert why("shop/web", "db/postgres", "5432/tcp", DENY, rule)["allowed"], "the proposal works"
    assert not why("shop/web", "db/postgres", "5433/tcp", DENY, rule)["allowed"]


def test_what_allows_is_named_and_what_nearly_would_is_too():
    answer = why("shop/web", "db/postgres", "5432/tcp", DENY, TO_DB)
    assert answer["allowed"]
    assert answer["egress"]["rules"] == ["NetworkPolicy shop/to-db egress[0]"]
    answer = why("shop/web", "db/postgres", "80/tcp", DENY, TO_DB)
    assert "means this peer, but not 80/tcp: add the port (it has 5432/tcp)" in answer["change"][0]
    answer = why("shop/web", "kube-system/dns", "5432/tcp", DENY, TO_DB)
    assert (
        "means 5432/tcp, but not this peer: k8s:io.cilium.k8s.namespace.labels.team=data "
        in (answer["change"][0])
    )


def test_a_deny_rule_is_named_with_its_description():
    deny = write("no-web", "{endpointSelector: {}, description: not for shops, "
                 "enableDefaultDeny: {ingress: false}, "
                 "ingressDeny: [{fromEntities: [cluster]}]}", CNP, "db")  # fmt: skip
    answer = why("shop/web", "db/postgres", "5432/tcp", deny)
    assert answer["ingress"]["rules"] == [
        "CiliumNetworkPolicy db/no-web ingressDeny[0] (not for shops)"
    ]
    assert "an allow rule cannot help" in answer["change"][0]
    assert why("8.8.8.8", "db/postgres", "5432/tcp", deny)["allowed"]


def test_the_own_node_the_world_other_nodes_and_itself():
    assert why("192.0.2.1", "shop/web", "80/tcp", DENY)["allowed"]
    answer = why("192.0.2.1", "shop/web", "80/tcp", DENY)
    assert answer["ingress"]["why"] == "a pod's own node is always let in"
    assert not why("192.0.2.2", "shop/web", "80/tcp", DENY)["allowed"]
    assert not why("8.8.8.8", "shop/web", "80/tcp", DENY)["allowed"]
    itself = why("shop/web", "shop/web", "80/tcp", DENY)
    assert itself["allowed"] and "itself" in itself["note"]


@pytest.mark.parametrize("seen_from", ["", "n1", "n2"])
def test_a_pods_own_node_is_its_own_wherever_one_asks(seen_from):
    closed = write("closed", "{podSelector: {}, policyTypes: [Ingress]}", space="db")
    objects = collect([*CLUSTER, closed])
    judge = Why(Explainer(objects, PolicyOptions(), LocalView(seen_from)))

    def allowed(node: str) -> bool:
        return judge.answer(question(node, "db/postgres", "80/tcp"))["allowed"]

    assert allowed("192.0.2.2") and not allowed("192.0.2.1")


def test_families_are_told_apart_where_they_differ():
    block = write("four", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: "
                  "{cidr: 10.244.0.0/16}}]}]}")  # fmt: skip
    answer = why("shop/web", "db/postgres", "80/tcp", block)
    assert not answer["allowed"]
    assert answer["families"]["IPv4"]["allowed"]
    assert not answer["families"]["IPv6"]["allowed"]
    assert why("shop/web", "10.244.2.11", "80/tcp", block)["allowed"]


def test_services_are_their_endpoints():
    answer = why("shop/web", "db/sql", "5432/tcp", DENY, TO_DB, more=SERVICE)
    assert answer["allowed"] and answer["service"] == "db/sql"
    assert answer["target"] == "db/postgres"
    assert why("shop/web", "10.96.0.7", "5432/tcp", DENY, TO_DB, more=SERVICE)["allowed"]
    answer = why("shop/web", "db/sql", "5432/tcp", DENY, more=SERVICE)
    assert (answer["endpoints"], answer["endpoints_denied"]) == (1, 1)
    with pytest.raises(Unknown, match="no port 80/tcp, it has 5432/tcp"):
        why("shop/web", "db/sql", "80/tcp", more=SERVICE)


def test_echo_and_the_host_network():
    echo = write("echo", "{endpointSelector: {}, ingress: [{icmps: "
                 "[{fields: [{type: EchoRequest}]}]}]}", CNP, "db")  # fmt: skip
    assert not why("shop/web", "db/postgres", "icmp", echo)["allowed"], "not over IPv6"
    assert why("10.244.1.10", "db/postgres", "icmp", echo)["allowed"]
    assert not why("10.244.1.10", "db/postgres", "13/icmp", echo)["allowed"]
    proxy = pod("kube-system", "proxy", 1, 1)
    proxy["spec"]["hostNetwork"] = True
    proxy["status"]["podIPs"] = [{"ip": "192.0.2.1"}]
    answer = why("kube-system/proxy", "shop/web", "80/tcp", DENY, more=[proxy])
    assert answer["allowed"] and answer["source"] == "kube-system/proxy (host network)"


def test_options_count():
    allow = write("block", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{ipBlock: "
                  "{cidr: 10.0.0.0/8}}, {ipBlock: {cidr: '::/0'}}]}]}")  # fmt: skip
    assert why("shop/web", "db/postgres", "80/tcp", allow)["allowed"]
    assert not why("shop/web", "db/postgres", "80/tcp", allow, cidr_match="cilium")["allowed"]
    assert not why("shop/web", "db/postgres", "80/tcp", enforcement="always")["allowed"]
    assert why("shop/web", "db/postgres", "80/tcp", DENY, enforcement="never")["allowed"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("shop/nobody", "db/postgres", "80/tcp"), "no pod shop/nobody"),
        (("web", "db/postgres", "80/tcp"), "neither NAMESPACE/POD nor an address"),
        (("shop/web", "db/postgres", "http"), "not PORT/PROTOCOL"),
        (("shop/web", "db/postgres", "/tcp"), "has no port"),
        (("shop/web", "db/postgres", "99999/tcp"), "not PORT/PROTOCOL"),
        (("shop/web", "db/postgres", "80/igmp"), "not PORT/PROTOCOL"),
        (("2001:db8::9", "10.244.2.11", "80/tcp"), "no address family in common"),
    ],
)
def test_a_question_that_makes_no_sense_is_told(asked, words):
    with pytest.raises(Unknown, match=words):
        why(*asked)


# --- lint -----------------------------------------------------------------------------------------

SURPRISES = {
    "selects-no-pod": write("p", "{podSelector: {matchLabels: {app: none}}}"),
    "no-dns": DENY,
    "fits-nothing": write("p", "{endpointSelector: {}, ingress: [{}]}", CNP),
    "sctp-only": write("p", "{podSelector: {}, ingress: [{ports: [{protocol: SCTP}]}]}"),
    "denies-own-node": write("p", "{endpointSelector: {}, ingressDeny: [{fromEntities: [all], "
                             "toPorts: [{ports: [{port: '80'}]}]}]}", CNP),
    "service-without-endpoints": write("p", "{endpointSelector: {}, egress: [{toServices: "
                                       "[{k8sService: {serviceName: x}}]}]}", CNP),
    "or-not-and": write("p", "{podSelector: {}, ingress: [{from: [{namespaceSelector: "
                        "{matchLabels: {team: data}}}, "
                        "{podSelector: {matchLabels: {app: web}}}]}]}"),
    "unknown-source": write("p", "{endpointSelector: {}, ingress: [{fromEndpoints: [{matchLabels: "
                            "{'container:a': b}}]}]}", CNP),
    "peer-selects-nothing": write("p", "{podSelector: {}, ingress: [{from: [{podSelector: "
                                  "{matchLabels: {app: none}}}]}]}"),
    "block-covers-pods": write("p", "{podSelector: {}, ingress: [{from: [{ipBlock: "
                               "{cidr: 10.244.2.0/24, except: [10.244.2.12/32]}}]}]}"),
    "no-such-port": write("p", "{podSelector: {}, ingress: [{ports: [{port: grpc}]}]}"),
}  # fmt: skip


def findings(*policies, more=(), **options) -> list:
    return Linter(explainer(*policies, more=more, **options)).findings()


def codes(*policies, more=(), **options) -> set[str]:
    return {one.code for one in findings(*policies, more=more, **options)}


def test_a_cluster_without_policies_has_nothing_surprising():
    assert findings() == []


@pytest.mark.parametrize("code", SURPRISES)
def test_a_surprise_is_found_with_its_policy(code):
    found = [one for one in findings(SURPRISES[code]) if one.code == code]
    assert len(found) == 1
    assert found[0].policy.endswith(f"shop/{SURPRISES[code]['metadata']['name']}")
    assert found[0].severity == TEXTS[code][0]
    assert "{}" not in found[0].text
    assert set(found[0].plain()) == {"severity", "code", "policy", "rule", "text"}


def test_counts_and_examples_are_right():
    (found,) = [
        f for f in findings(SURPRISES["block-covers-pods"]) if f.code == "block-covers-pods"
    ]
    assert (
        "10.244.2.0/24 except 10.244.2.12/32 allows 1 pod address, such as 10.244.2.11"
        in found.text
    )
    assert "block-misses-pods" in codes(SURPRISES["block-covers-pods"], cidr_match="cilium")


def test_a_way_to_dns_is_enough():
    dns = write("dns", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{"
                "namespaceSelector: {}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], "
                "ports: [{port: 53, protocol: UDP}]}]}")  # fmt: skip
    assert "no-dns" not in codes(DENY, dns)


def test_audit_beside_what_is_enforced_and_pods_of_the_host_network():
    audited = write("audited", "{podSelector: {}}", audit="true")
    assert "audit-beside-enforced" in codes(DENY, audited)
    assert "audit-beside-enforced" not in codes(audited)
    proxy = pod("shop", "proxy", 1, 1, app="web")
    proxy["spec"]["hostNetwork"] = True
    assert "host-network" in codes(DENY, more=[proxy])


def test_rules_in_the_shadow_of_others():
    wide = write("wide", "{podSelector: {}, ingress: [{ports: [{port: 1, endPort: 100}]}]}")
    narrow = write("narrow", "{podSelector: {matchLabels: {app: web}}, ingress: [{from: "
                   "[{podSelector: {}}], ports: [{port: 80}]}]}")  # fmt: skip
    (found,) = [one for one in findings(wide, narrow) if one.code == "shadowed"]
    assert (found.policy, found.text) == (
        "NetworkPolicy shop/narrow",
        "says no more than NetworkPolicy shop/wide ingress[0]",
    )
    other = write(
        "narrow", "{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 101}]}]}"
    )
    assert "shadowed" not in codes(wide, other)
    twice = write("wide2", "{podSelector: {}, ingress: [{ports: [{port: 1, endPort: 100}]}]}")
    assert [one.policy for one in findings(wide, twice) if one.code == "shadowed"] == [
        "NetworkPolicy shop/wide2"
    ]
    blocks = [
        write(name, f"{{podSelector: {{}}, policyTypes: [Egress], "
              f"egress: [{{to: [{{ipBlock: {block}}}]}}]}}")
        for name, block in (("a", "{cidr: 11.0.0.0/8, except: [11.1.0.0/16]}"),
                            ("b", "{cidr: 11.2.0.0/16}"), ("c", "{cidr: 11.1.2.0/24}"))
    ]  # fmt: skip
    assert [one.policy for one in findings(*blocks) if one.code == "shadowed"] == [
        "NetworkPolicy shop/b"
    ]


def test_an_allowance_that_a_deny_rule_defeats():
    deny = write("deny", "{endpointSelector: {}, ingressDeny: [{fromEntities: [all]}]}", CCNP, "")
    allow = write(
        "allow", "{podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 80}]}]}"
    )
    (found,) = [one for one in findings(deny, allow) if one.code == "defeated"]
    assert found.policy == "NetworkPolicy shop/allow"
    assert "CiliumClusterwideNetworkPolicy deny ingressDeny[0] denies all of it" in found.text


def test_too_many_rules_are_not_compared():
    rules = ", ".join("{ports: [{port: %d}]}" % n for n in range(1, 500))  # noqa: UP031
    many = write("many", f"{{podSelector: {{}}, ingress: [{rules}]}}")
    assert "not-compared" in codes(many)
