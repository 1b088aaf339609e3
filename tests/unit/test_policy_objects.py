"""Policies as manifests: what they mean when they are read, and why some are not."""

import pytest
import yaml

from dataplane.objects.collect import collect, interpret
from dataplane.objects.manifest import ManifestError
from dataplane.objects.policies import Block, PortMatch, ServiceRef
from dataplane.objects.selectors import Requirement, Selector

NP = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: x}\n"
CNP = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p, namespace: x}\n"
CCNP = "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: p}\n"


def read(text: str):
    return interpret(yaml.safe_load(text))[2]


def np(spec: str):
    return read(f"{NP}spec: {spec}").specs[0]


def cnp(spec: str, head: str = CNP):
    return read(f"{head}spec: {spec}").specs[0]


def texts(peers) -> list[str]:
    return sorted(map(str, peers))


# --- NetworkPolicy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "isolates"),
    [
        ("{podSelector: {}}", (True, False)),
        ("{podSelector: {}, egress: []}", (True, False)),
        ("{podSelector: {}, egress: [{}]}", (True, True)),
        ("{podSelector: {}, policyTypes: [Egress]}", (False, True)),
        ("{podSelector: {}, policyTypes: [Egress], ingress: [{}]}", (False, True)),
        ("{podSelector: {}, policyTypes: [Ingress], egress: [{}]}", (True, False)),
    ],
)
def test_policy_types_and_their_defaults(spec, isolates):
    found = np(spec)
    assert found.isolates == isolates
    assert all(found.isolates[rule.direction] for rule in found.rules)


def test_peers_and_ports_of_network_policy():
    spec = np(
        """
        podSelector: {matchLabels: {app: a}}
        ingress:
        - from:
          - podSelector: {matchLabels: {app: b}}
          - namespaceSelector: {}
          - namespaceSelector: {matchLabels: {team: red}}
            podSelector: {matchExpressions: [{key: app, operator: NotIn, values: [c, b, c]}]}
          - ipBlock: {cidr: 10.0.0.1/8, except: [10.1.0.0/16]}
          ports:
          - {port: 80}
          - {protocol: UDP}
          - {protocol: SCTP, port: 100, endPort: 200}
          - {port: http}
        - {}
        """
    )
    assert str(spec.subject) == "k8s:app=a, k8s:io.kubernetes.pod.namespace=x"
    first, second = spec.rules
    assert texts(first.peers) == [
        "10.0.0.0/8 except 10.1.0.0/16",
        "k8s:app notin (b, c), k8s:io.cilium.k8s.namespace.labels.team=red, "
        "k8s:io.kubernetes.pod.namespace",
        "k8s:app=b, k8s:io.kubernetes.pod.namespace=x",
        "k8s:io.kubernetes.pod.namespace",
    ]
    assert first.ports == (
        PortMatch(6, 80, 80),
        PortMatch(17),
        PortMatch(132, 100, 200),
        PortMatch(6, name="http"),
    )
    assert (second.peers, second.ports) == (None, None)


def test_empty_lists_of_a_rule_mean_everything():
    (rule,) = np("{podSelector: {}, ingress: [{from: [], ports: []}]}").rules
    assert (rule.peers, rule.ports) == (None, None)


# --- Cilium ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "peer", "wanted"),
    [
        (CNP, "{}", "k8s:io.kubernetes.pod.namespace=x"),
        (CNP, "{matchLabels: {app: b}}", "k8s:app=b, k8s:io.kubernetes.pod.namespace=x"),
        (CNP, "{matchLabels: {'k8s:io.kubernetes.pod.namespace': y}}",
         "k8s:io.kubernetes.pod.namespace=y"),
        (CNP, "{matchLabels: {io.cilium.k8s.namespace.labels.team: red}}",
         "k8s:io.cilium.k8s.namespace.labels.team=red"),
        (CNP, "{matchLabels: {'reserved:host': ''}}", "reserved:host="),
        (CCNP, "{}", "k8s:io.kubernetes.pod.namespace"),
        (CCNP, "{matchLabels: {'any:app': b}}", "k8s:app=b, k8s:io.kubernetes.pod.namespace"),
        (CCNP, "{matchExpressions: [{key: 'reserved:health', operator: Exists}]}",
         "reserved:health"),
    ],
)  # fmt: skip
def test_the_scope_of_peers(head, peer, wanted):
    spec = cnp(f"{{endpointSelector: {{}}, ingress: [{{fromEndpoints: [{peer}]}}]}}", head)
    assert texts(spec.rules[0].peers) == [wanted]


@pytest.mark.parametrize(
    ("rule", "peers", "ports"),
    [
        ("{}", (), None),
        ("{fromEndpoints: []}", (), None),
        ("{toPorts: [{ports: [{port: '80'}]}]}", None, 3),
        ("{fromEntities: [all]}", None, None),
        ("{fromEntities: [none]}", (), None),
        ("{fromEntities: [world, host]}", 4, None),
        ("{fromCIDR: [10.0.0.0/8, '::1']}", 2, None),
        ("{fromCIDRSet: [{cidr: 10.0.0.0/8, except: [10.0.0.0/8]}]}", 1, None),
        ("{toPorts: []}", (), None),
        ("{toPorts: [{}]}", None, 0),
        ("{icmps: [{fields: [{type: 8}, {type: EchoRequest, family: IPv6}]}]}", None, 2),
    ],
)
def test_what_is_given_what_is_empty_what_is_missing(rule, peers, ports):
    (found,) = cnp(f"{{endpointSelector: {{}}, ingress: [{rule}]}}").rules
    assert (found.peers if not isinstance(peers, int) else len(found.peers)) == peers
    assert (found.ports if not isinstance(ports, int) else len(found.ports)) == ports


def test_ports_of_cilium():
    (rule,) = cnp(
        """
        endpointSelector: {}
        egress:
        - toPorts:
          - ports:
            - {port: "0", protocol: TCP}
            - {port: "8000", endPort: 8080, protocol: udp}
            - {port: HTTP-Alt, protocol: SCTP}
            - {protocol: GRE}
            - {port: 443, protocol: tcp}
        """
    ).rules
    assert rule.ports == (
        PortMatch(6),
        PortMatch(17, 8000, 8080),
        PortMatch(132, name="http-alt"),
        PortMatch(47),
        PortMatch(6, 443, 443),
    )


@pytest.mark.parametrize(
    ("fields", "isolates"),
    [
        ("ingress: [{}]", (True, False)),
        ("ingress: []", (False, False)),
        ("ingressDeny: [{fromEntities: [all]}]", (True, False)),
        ("egress: [{}], enableDefaultDeny: {egress: false}", (False, False)),
        ("egress: [{}], enableDefaultDeny: {ingress: true}", (True, True)),
        ("egressDeny: [], egress: []", (False, False)),
    ],
)
def test_default_deny_of_cilium(fields, isolates):
    assert cnp(f"{{endpointSelector: {{}}, {fields}}}").isolates == isolates


def test_specs_services_notes_and_annotations():
    policy = read(
        CNP.replace("namespace: x", "namespace: x, annotations: {"
                    "penstock.io/deny-response: reset, penstock.io/audit: 'true'}")
        + """
spec: {endpointSelector: {}, ingress: [{}], description: first, log: {value: hello}}
specs:
- endpointSelector: {}
  egress:
  - toServices:
    - k8sService: {serviceName: s}
    - k8sServiceSelector: {selector: {matchLabels: {kind: db}}, namespace: y}
    toPorts: [{ports: [{port: "80", protocol: TCP}]}]
"""
    )  # fmt: skip
    assert (policy.response, policy.audit) == ("reset", True)
    first, second = policy.specs
    assert (first.number, first.description, first.log) == (0, "first", "hello")
    assert second.number == 1
    labels = Selector((Requirement("k8s:kind", "In", ("db",)),))
    assert second.rules[0].peers == (ServiceRef("x", "s"), ServiceRef("y", labels=labels))


def test_identities_of_the_cluster():
    text = "{apiVersion: cilium.io/v2, kind: CiliumIdentity, metadata: {name: '1234'}, LABELS}"
    found = read(text.replace("LABELS", "security-labels: {'k8s:app': a}"))
    assert (found.number, found.labels) == (1234, {"k8s:app": "a"})
    for name in ("abc", "1", "70000"):
        with pytest.raises(ManifestError, match=r"metadata\.name.*256"):
            read(text.replace("1234", name).replace(", LABELS", ""))


def test_keys_tell_kinds_apart():
    objects = collect([yaml.safe_load(f"{head}spec: {spec}") for head, spec in (
        (NP, "{podSelector: {}}"),
        (CNP, "{endpointSelector: {}, ingress: []}"),
        (CCNP, "{endpointSelector: {}, ingress: []}"),
    )])  # fmt: skip
    assert sorted(objects.policies) == [
        ("CiliumClusterwideNetworkPolicy", "", "p"),
        ("CiliumNetworkPolicy", "x", "p"),
        ("NetworkPolicy", "x", "p"),
    ]
    assert str(objects.policies["NetworkPolicy", "x", "p"]) == "NetworkPolicy x/p"


# --- refusals -------------------------------------------------------------------------------------

BROKEN_NP = [
    ("{podSelector: 7}", ["spec.podSelector", "7"]),
    ("{podSelector: {matchLabel: {a: b}}}", ["spec.podSelector.matchLabel", "unknown field"]),
    ("{podSelector: {matchLabels: {a: 1}}}", ["spec.podSelector.matchLabels", "quote"]),
    ("{podSelector: {matchLabels: {'k8s:a': b}}}", ["k8s:a", "not a label key"]),
    ("{podSelector: {matchLabels: {a: 'b c'}}}", ["b c", "not a label value"]),
    ("{podSelector: {matchExpressions: [{key: a, operator: in, values: [b]}]}}", ["operator"]),
    ("{podSelector: {matchExpressions: [{key: a, operator: In}]}}", ["at least one value"]),
    ("{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}", ["no values"]),
    ("{podSelector: {}, ingres: []}", ["spec.ingres", "unknown field"]),
    ("{podSelector: {}, policyTypes: [ingress]}", ["spec.policyTypes", "Ingress, Egress"]),
    ("{podSelector: {}, ingress: [{to: []}]}", ["spec.ingress[0].to", "unknown field"]),
    ("{podSelector: {}, ingress: [{from: [{}]}]}", ["spec.ingress[0].from[0]", "no peer"]),
    ("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}",
     ["ipBlock cannot stand beside"]),
    ("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.1}}]}]}", ["ADDRESS/LENGTH"]),
    ("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/33}}]}]}", ["10.0.0.0/33"]),
    ("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}]}]}",
     ["except[0]", "not strictly inside"]),
    ("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
     ["not strictly inside"]),
    ("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['::/9']}}]}]}",
     ["not strictly inside"]),
    ("{podSelector: {}, ingress: [{ports: [{port: 0}]}]}", ["ports[0].port", "1 to 65535"]),
    ("{podSelector: {}, ingress: [{ports: [{port: 70000}]}]}", ["1 to 65535"]),
    ("{podSelector: {}, ingress: [{ports: [{port: '80'}]}]}", ["no port name"]),
    ("{podSelector: {}, ingress: [{ports: [{port: Http}]}]}", ["no port name"]),
    ("{podSelector: {}, ingress: [{ports: [{port: http, endPort: 90}]}]}", ["not a name"]),
    ("{podSelector: {}, ingress: [{ports: [{endPort: 90}]}]}", ["needs a port"]),
    ("{podSelector: {}, ingress: [{ports: [{port: 80, endPort: 79}]}]}", ["less than port 80"]),
    ("{podSelector: {}, ingress: [{ports: [{protocol: tcp}]}]}", ["TCP, UDP, SCTP"]),
]  # fmt: skip

BROKEN_CNP = [
    ("{ingress: [{}]}", ["spec.endpointSelector", "is missing"]),
    ("{endpointSelector: {}}", ["it would do nothing"]),
    ("{nodeSelector: {}, ingress: [{}]}", ["spec.nodeSelector", "nodes", "not supported"]),
    ("{endpointSelector: {matchLabels: {'k8s:io.kubernetes.pod.namespace': y}}, ingress: [{}]}",
     ["another namespace"]),
    ("{endpointSelector: {}, egressDeny: [{toFQDNs: [{matchName: a.b}]}]}",
     ["spec.egressDeny[0].toFQDNs", "only in egress"]),
    ("{endpointSelector: {}, egress: [{toFQDNs: [{matchName: a.b, matchPattern: a}]}]}",
     ["spec.egress[0].toFQDNs[0]", "one of matchName and matchPattern"]),
    ("{endpointSelector: {}, egress: [{toFQDNs: [{matchName: '*.b'}]}]}",
     ["spec.egress[0].toFQDNs[0].matchName", "is no name"]),
    ("{endpointSelector: {}, egress: [{toFQDNs: [{matchPattern: 'a!b'}]}]}", ["is no pattern"]),
    ("{endpointSelector: {}, egress: [{toFQDNs: [{matchName: a.b}], toCIDR: [10.0.0.0/8]}]}",
     ["toCIDR and toFQDNs cannot stand in one element"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '53'}], rules: {dns: []}}]}]}",
     ["ingress[0].toPorts[0].rules", "egress only"]),
    ("{endpointSelector: {}, egress: [{toPorts: [{rules: {dns: [{matchName: a}]}}]}]}",
     ["toPorts[0].ports", "is missing"]),
    ("{endpointSelector: {}, egress: [{toPorts: [{ports: [{port: '53'}], rules: {dns: []}}]}]}",
     ["rules.dns", "is empty"]),
    ("{endpointSelector: {}, egress: [{toPorts: [{ports: [{port: '0'}], "
     "rules: {dns: [{matchName: a}]}}]}]}", ["neither 0 nor a range"]),
    ("{endpointSelector: {}, egress: [{toPorts: [{ports: [{port: '53', protocol: SCTP}], "
     "rules: {dns: [{matchName: a}]}}]}]}", ["needs UDP, TCP or ANY"]),
    ("{endpointSelector: {}, ingress: [{fromRequires: [{}]}]}", ["fromRequires", "not supported"]),
    ("{endpointSelector: {}, ingress: [{fromNodes: [{}]}]}", ["fromNodes", "remote-node"]),
    ("{endpointSelector: {}, egress: [{toGroups: [{}]}]}", ["toGroups", "not supported"]),
    ("{endpointSelector: {}, ingress: [{authentication: {mode: required}}]}", ["authentication"]),
    ("{endpointSelector: {}, egress: [{toPorts: [{rules: {http: [{}]}}]}]}", ["layer 7"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{serverNames: [a]}]}]}", ["server names"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{listener: {}}]}]}", ["listener"]),
    ("{endpointSelector: {}, ingress: [{fromCIDRSet: [{cidrGroupRef: g}]}]}", ["CIDRGroup"]),
    ("{endpointSelector: {}, ingress: [{fromCIDRSet: [{cidr: 10.0.0.0/8, except: [11.0.0.0/8]}]}]}",
     ["not inside"]),
    ("{endpointSelector: {}, ingress: [{fromCIDR: [10.0.0.0/8], fromEntities: [world]}]}",
     ["cannot stand in one element"]),
    ("{endpointSelector: {}, ingress: [{fromEntities: [moon]}]}", ["fromEntities[0]", "moon"]),
    ("{endpointSelector: {}, ingress: [{toServices: []}]}", ["toServices", "unknown field"]),
    ("{endpointSelector: {}, egress: [{toServices: [{k8sService: {}}]}]}", ["serviceName"]),
    ("{endpointSelector: {}, egress: [{toServices: [{}]}]}", ["needs one of"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{}]}]}]}", ["port", "is missing"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '70000'}]}]}]}", ["0 to 65535"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: http, endPort: 9}]}]}]}",
     ["not a name"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '9', endPort: 8}]}]}]}",
     ["less than port 9"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '80', protocol: FOO}]}]}]}",
     ["protocol", "FOO"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '8', protocol: ICMP}]}]}]}",
     ["has no ports"]),
    ("{endpointSelector: {}, ingress: [{toPorts: [{ports: PORTS}]}]}", ["41 elements, limit 40"]),
    ("{endpointSelector: {}, ingress: [{icmps: [{fields: [{type: Hello}]}]}]}", ["type", "Hello"]),
    ("{endpointSelector: {}, ingress: [{icmps: [{fields: [{type: 256}]}]}]}", ["0 to 255"]),
    ("{endpointSelector: {}, ingress: [{icmps: [{}], toPorts: [{}]}]}", ["beside toPorts"]),
    ("{endpointSelector: {}, ingress: [{}], log: {value: LONG}}", ["33 characters, limit 32"]),
    ("{endpointSelector: {}, ingress: [{}], enableDefaultDeny: {ingres: true}}", ["unknown field"]),
    ("{endpointSelector: {}, ingress: [{}], enableDefaultDeny: {ingress: 1}}", ["neither true"]),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "words"), BROKEN_NP)
def test_a_broken_network_policy_is_refused_by_field(spec, words):
    with pytest.raises(ManifestError) as refused:
        np(spec)
    said = str(refused.value)
    assert said.startswith("NetworkPolicy p: spec.")
    for word in words:
        assert word in said
    assert refused.value.place[0] == "spec"


@pytest.mark.parametrize(("spec", "words"), BROKEN_CNP)
def test_a_broken_or_unsupported_cilium_policy_is_refused_by_field(spec, words):
    spec = spec.replace("LONG", "x" * 33).replace("PORTS", str([{"port": "80"}] * 41))
    with pytest.raises(ManifestError) as refused:
        cnp(spec)
    for word in words:
        assert word in str(refused.value)
    with pytest.raises(ManifestError) as of_list:
        read(f"{CNP}specs: [{spec}]")
    assert "specs[0]" in str(of_list.value)


def test_annotations_and_missing_specs_are_refused():
    for head, text in (
        (NP, "spec: {podSelector: {}}"),
        (CNP, "spec: {endpointSelector: {}, ingress: []}"),
    ):
        with pytest.raises(ManifestError, match="spec: is missing"):
            read(head)
        for note in ("deny-response: never", "audit: maybe"):
            noted = head.replace("}", f", annotations: {{penstock.io/{note}}}}}")
            with pytest.raises(ManifestError, match=r"metadata\.annotations"):
                read(noted + text)


def test_blocks_say_what_they_are():
    (rule,) = np("{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: '::/0'}}]}]}").rules
    assert isinstance(rule.peers[0], Block)
    assert str(rule.peers[0]) == "::/0"
