"""Known policies over nine pods in three namespaces: truth tables as people expect them.

The world is that of Kubernetes' own suite (test/e2e/network/netpol): namespaces x, y, z with pods
a, b, c, each serving ports 80 and 81 by TCP, UDP and SCTP. Each case says which connections of the
81 pairs a policy takes away; the oracle that reads raw manifests must agree for every one.
"""

import itertools

import pytest
import yaml

from tests.policy_world import OWN, PolicyWorld, addresses, namespace, node, pod, policy

SPACES, NAMES = ("x", "y", "z"), ("a", "b", "c")
PODS = [f"{space}/{name}" for space in SPACES for name in NAMES]
PORTS = ((6, 80), (6, 81), (17, 80), (17, 81), (132, 80), (132, 81), (1, 8))
SERVED = (
    ("serve-80-tcp", 80, "TCP"), ("serve-81-tcp", 81, "TCP"), ("serve-80-udp", 80, "UDP"),
    ("serve-81-udp", 81, "UDP"), ("serve-80-sctp", 80, "SCTP"), ("serve-81-sctp", 81, "SCTP"),
)  # fmt: skip


def ip(name: str, family: int = 4) -> str:
    return addresses(1, 10 + PODS.index(name))[family == 6]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = PolicyWorld(tmp_path_factory.mktemp("world"))
    yield made
    made.shm.close()


@pytest.fixture
def nine(world):
    """All nine pods on this node, labelled pod=NAME in namespaces labelled ns=SPACE; no policy."""
    world.manifests.clear()
    world.endpoints.clear()
    world.put(node(1), node(2), *(namespace(space, ns=space) for space in SPACES))
    for number, name in enumerate(PODS):
        space, short = name.split("/")
        one = pod(space, short, 10 + number, 1, SERVED, pod=short)
        world.put(one)
        world.attach(2 + number, one)
    if world.options.cidr_match != "kubernetes" or world.options.enforcement != "default":
        world.start()
    world.update()
    return world


def apply(world, *policies: str, kind: str = "NetworkPolicy", space: str = "x") -> None:
    for number, text in enumerate(policies):
        world.put(policy(space, f"p{number}", yaml.safe_load(text), kind))
    assert world.update() == []


def reaches(world, source: str, target: str, protocol: int, port: int, family: int = 4) -> bool:
    """A connection passes if egress of the one and ingress of the other allow it."""
    one, other = 2 + PODS.index(source), 2 + PODS.index(target)
    egress = world.allows(one, "egress", ip(target, family), protocol, port)
    return egress and world.allows(other, "ingress", ip(source, family), protocol, port)


def check(world, denied, ports=PORTS) -> None:
    """denied(source, target, protocol, port): whether the case takes a connection away."""
    world.check([ip(name, family) for name in PODS for family in (4, 6)], PORTS)
    wrong = [
        (source, target, protocol, port)
        for source, target in itertools.product(PODS, PODS)
        for protocol, port in ports
        if source != target
        for family in (4, 6)
        if reaches(world, source, target, protocol, port, family)
        == bool(denied(source, target, protocol, port))
    ]
    assert wrong == []


A, X = "x/a", ("x/a", "x/b", "x/c")
TO_A = "{podSelector: {matchLabels: {pod: a}}, "

CASES = {
    # name: (policies of namespace x, what they take away)
    "deny all ingress": (["{podSelector: {}}"], lambda s, t, p, n: t in X),
    "deny all egress": (["{podSelector: {}, policyTypes: [Egress]}"], lambda s, t, p, n: s in X),
    "deny all both ways": (
        ["{podSelector: {}, policyTypes: [Ingress, Egress]}"],
        lambda s, t, p, n: s in X or t in X,
    ),
    "deny all to one app": (["{podSelector: {matchLabels: {pod: a}}}"],
                            lambda s, t, p, n: t == A),
    "allow all ingress": (["{podSelector: {}, ingress: [{}]}"], lambda s, t, p, n: False),
    "allow all over deny all": (
        ["{podSelector: {}}", "{podSelector: {}, ingress: [{}]}"],
        lambda s, t, p, n: False,
    ),
    "limit to one app": (
        [TO_A + "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]}"],
        lambda s, t, p, n: t == A and s != "x/b",
    ),
    "deny other namespaces": (
        ["{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}"],
        lambda s, t, p, n: t in X and s not in X,
    ),
    "allow all namespaces": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {}}]}]}"],
        lambda s, t, p, n: False,
    ),
    "allow one namespace": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}"],
        lambda s, t, p, n: t == A and s[0] != "y",
    ),
    "allow a namespace by its name": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {matchLabels: "
         "{kubernetes.io/metadata.name: z}}}]}]}"],
        lambda s, t, p, n: t == A and s[0] != "z",
    ),
    "namespace AND pod": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}, "
         "podSelector: {matchLabels: {pod: b}}}]}]}"],
        lambda s, t, p, n: t == A and s != "y/b",
    ),
    "namespace OR pod": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}, "
         "{podSelector: {matchLabels: {pod: b}}}]}]}"],
        lambda s, t, p, n: t == A and not (s[0] == "y" or s == "x/b"),
    ),
    "several pods of several namespaces": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {matchExpressions: [{key: ns, "
         "operator: NotIn, values: [x]}]}, podSelector: {matchExpressions: [{key: pod, "
         "operator: In, values: [b, c]}]}}]}]}"],
        lambda s, t, p, n: t == A and not (s[0] != "x" and s[-1] in "bc"),
    ),
    "one port": (
        [TO_A + "ingress: [{ports: [{port: 81}]}]}"],
        lambda s, t, p, n: t == A and (p, n) != (6, 81),
    ),
    "one port of one namespace": (
        [TO_A + "ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}], "
         "ports: [{port: 81}]}]}"],
        lambda s, t, p, n: t == A and not (s[0] == "y" and (p, n) == (6, 81)),
    ),
    "two rules of two ports are stacked": (
        [TO_A + "ingress: [{ports: [{port: 80}]}, {ports: [{port: 81}]}]}"],
        lambda s, t, p, n: t == A and p != 6,
    ),
    "two policies are stacked": (
        [TO_A + "ingress: [{ports: [{port: 80}]}]}", TO_A + "ingress: [{ports: [{port: 81}]}]}"],
        lambda s, t, p, n: t == A and p != 6,
    ),
    "a range of ports": (
        [TO_A + "ingress: [{ports: [{port: 80, endPort: 81, protocol: UDP}]}]}"],
        lambda s, t, p, n: t == A and p != 17,
    ),
    "a named port": (
        [TO_A + "ingress: [{ports: [{port: serve-81-tcp}]}]}"],
        lambda s, t, p, n: t == A and (p, n) != (6, 81),
    ),
    "a named port of egress": (
        ["{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], "
         "egress: [{ports: [{port: serve-80-tcp}, {port: serve-81-udp, protocol: UDP}]}]}"],
        lambda s, t, p, n: s == A and (p, n) not in ((6, 80), (17, 81)),
    ),
    "a whole protocol": (
        [TO_A + "ingress: [{ports: [{protocol: UDP}]}]}"],
        lambda s, t, p, n: t == A and p != 17,
    ),
    "SCTP does not leak into TCP": (
        [TO_A + "ingress: [{ports: [{protocol: SCTP, port: 80}]}]}"],
        lambda s, t, p, n: t == A and (p, n) != (132, 80),
    ),
    "an SCTP rule isolates for TCP": (
        ["{podSelector: {}, ingress: [{ports: [{protocol: SCTP, port: 9}]}]}"],
        lambda s, t, p, n: t in X,
    ),
    "egress to one namespace": (
        ["{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], "
         "egress: [{to: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}"],
        lambda s, t, p, n: s == A and t[0] != "y",
    ),
    "egress to pods": (
        ["{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], "
         "egress: [{to: [{podSelector: {matchLabels: {pod: b}}}]}]}"],
        lambda s, t, p, n: s == A and t != "x/b",
    ),
    "ingress and egress of one policy": (
        ["{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress, Egress], "
         "ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}], "
         "egress: [{to: [{podSelector: {matchLabels: {pod: c}}}]}]}"],
        lambda s, t, p, n: (t == A and s != "x/b") or (s == A and t != "x/c"),
    ),
    "nothing matches": (
        ["{podSelector: {matchLabels: {pod: nobody}}}"],
        lambda s, t, p, n: False,
    ),
    "a label that does not exist": (
        ["{podSelector: {matchExpressions: [{key: other, operator: DoesNotExist}]}}"],
        lambda s, t, p, n: t in X,
    ),
    "a block of addresses covers pods": (
        [TO_A + "ingress: [{from: [{ipBlock: {cidr: 10.244.1.11/32}}, "
         "{ipBlock: {cidr: 'fd00:244:0:1::b/128'}}]}]}"],
        lambda s, t, p, n: t == A and s != "x/b",
    ),
    "a block with an exception": (
        ["{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: ["
         "{ipBlock: {cidr: 10.244.0.0/16, except: [10.244.1.11/32]}}, "
         "{ipBlock: {cidr: '::/0', except: ['fd00:244:0:1::b/128']}}]}]}"],
        lambda s, t, p, n: s == A and t == "x/b",
    ),
    "an exception that another rule allows": (
        ["{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], egress: [{to: ["
         "{ipBlock: {cidr: 10.244.0.0/16, except: [10.244.1.11/32]}}, "
         "{ipBlock: {cidr: '::/0', except: ['fd00:244:0:1::b/128']}}]}, "
         "{to: [{podSelector: {matchLabels: {pod: b}}}]}]}"],
        lambda s, t, p, n: False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_network_policy(nine, name):
    policies, denied = CASES[name]
    apply(nine, *policies)
    check(nine, denied)


def test_labels_of_pods_and_namespaces_are_followed(nine):
    apply(nine, TO_A + "ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}, "
          "podSelector: {matchLabels: {pod: b}}}]}]}")  # fmt: skip
    check(nine, lambda s, t, p, n: t == A and s != "y/b")
    moved = pod("y", "b", 10 + PODS.index("y/b"), 1, SERVED, pod="other")
    nine.put(moved)
    nine.update()
    check(nine, lambda s, t, p, n: t == A)
    nine.put(namespace("y", ns="y"), pod("y", "c", 10 + PODS.index("y/c"), 1, SERVED, pod="b"))
    nine.update()
    check(nine, lambda s, t, p, n: t == A and s != "y/c")
    nine.put(namespace("y", ns="other"), namespace("z", ns="y"))
    nine.update()
    check(nine, lambda s, t, p, n: t == A and s != "z/b")
    nine.drop(next(m for m in nine.manifests.values() if m["kind"] == "NetworkPolicy"))
    nine.update()
    check(nine, lambda s, t, p, n: False)


def test_a_policy_is_updated_in_place(nine):
    apply(nine, TO_A + "ingress: [{ports: [{port: 80}]}]}")
    check(nine, lambda s, t, p, n: t == A and (p, n) != (6, 80))
    apply(nine, TO_A + "ingress: [{ports: [{port: 81}]}]}")
    check(nine, lambda s, t, p, n: t == A and (p, n) != (6, 81))
    apply(nine, "{podSelector: {matchLabels: {pod: b}}, ingress: [{ports: [{port: 81}]}]}")
    check(nine, lambda s, t, p, n: t == "x/b" and (p, n) != (6, 81))


def test_the_own_node_is_always_let_in_and_others_are_not(nine):
    apply(nine, "{podSelector: {}, policyTypes: [Ingress, Egress]}")
    for address in (*OWN, "10.244.1.1", "fd00:244:0:1::1"):
        assert nine.allows(2, "ingress", address, 6, 80)
        assert not nine.allows(2, "egress", address, 6, 80), "Kubernetes says nothing of egress"
    for address in ("192.0.2.2", "2001:db8::2", "10.244.2.1", "8.8.8.8", "2001:db8:9::1"):
        assert not nine.allows(2, "ingress", address, 6, 80)
    assert nine.about(2, "ingress", OWN[0], 6, 80)["description"] == "own node is let in"


def test_the_story_of_the_backend(nine):
    """Default deny; DNS to kube-dns, one block of the world, and the frontend."""
    dns = pod("z", "a", 10 + PODS.index("z/a"), 1, SERVED, **{"k8s-app": "kube-dns"})
    nine.put(dns)
    apply(
        nine,
        "{podSelector: {}, policyTypes: [Ingress, Egress]}",
        "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels:"
        " {ns: z}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}], "
        "ports: [{port: 80, protocol: UDP}, {port: 80}]}]}",
        "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress], "
        "egress: [{to: [{ipBlock: {cidr: 203.0.113.0/24}}], ports: [{port: 443}]}]}",
    )
    assert nine.allows(2, "egress", ip("z/a"), 17, 80)
    assert nine.allows(2, "egress", ip("z/a", 6), 6, 80)
    assert not nine.allows(2, "egress", ip("z/b"), 17, 80)
    assert nine.allows(2, "egress", "203.0.113.9", 6, 443)
    assert not nine.allows(3, "egress", "203.0.113.9", 6, 443), "x/b has no such rule"
    assert not nine.allows(2, "egress", "203.0.114.9", 6, 443)
    about = nine.about(2, "egress", "203.0.114.9", 6, 443)
    assert about["kind"] == "default deny"
    assert [one["name"] for one in about["policies"]] == ["p0", "p1", "p2"]


# --- Cilium ---------------------------------------------------------------------------------------

CILIUM_CASES = {
    "allow from one app": (
        ["{endpointSelector: {matchLabels: {pod: a}}, "
         "ingress: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}"],
        lambda s, t, p, n: t == A and s != "x/b",
    ),
    "allow from the whole namespace": (
        ["{endpointSelector: {}, ingress: [{fromEndpoints: [{}]}]}"],
        lambda s, t, p, n: t in X and s not in X,
    ),
    "default deny by an empty element": (
        ["{endpointSelector: {}, ingress: [{}]}"],
        lambda s, t, p, n: t in X,
    ),
    "a port of any peer": (
        ["{endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: '80', protocol: ANY}]}]}]}"],
        lambda s, t, p, n: t in X and (n != 80 or p == 1),
    ),
    "deny beats allow": (
        ["{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEntities: [all]}], "
         "ingressDeny: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}"],
        lambda s, t, p, n: t == A and s == "x/b",
    ),
    "deny one port": (
        ["{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEntities: [cluster]}], "
         "ingressDeny: [{fromEntities: [all], "
         "toPorts: [{ports: [{port: '80', protocol: TCP}]}]}]}"],
        lambda s, t, p, n: t == A and (p, n) == (6, 80),
    ),
    "deny without default deny": (
        ["{endpointSelector: {matchLabels: {pod: a}}, enableDefaultDeny: {ingress: false}, "
         "ingressDeny: [{fromEndpoints: [{matchLabels: {pod: b}}]}]}"],
        lambda s, t, p, n: t == A and s == "x/b",
    ),
    "egress to the cluster": (
        ["{endpointSelector: {}, egress: [{toEntities: [cluster]}]}"],
        lambda s, t, p, n: False,
    ),
    "egress to the world only": (
        ["{endpointSelector: {}, egress: [{toEntities: [world]}]}"],
        lambda s, t, p, n: s in X,
    ),
    "echo only": (
        ["{endpointSelector: {}, ingress: [{icmps: [{fields: [{type: 8}]}]}]}"],
        lambda s, t, p, n: t in X and p != 1,
    ),
    "other namespaces by label": (
        ["{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels: "
         "{'k8s:io.cilium.k8s.namespace.labels.ns': y}}]}]}"],
        lambda s, t, p, n: t == A and s[0] != "y",
    ),
    "another namespace by name": (
        ["{endpointSelector: {matchLabels: {pod: a}}, ingress: [{fromEndpoints: [{matchLabels: "
         "{'k8s:io.kubernetes.pod.namespace': y, pod: c}}]}]}"],
        lambda s, t, p, n: t == A and s != "y/c",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CILIUM_CASES)
def test_cilium_network_policy(nine, name):
    policies, denied = CILIUM_CASES[name]
    apply(nine, *policies, kind="CiliumNetworkPolicy")
    check(nine, denied)


def test_clusterwide_and_mixed_with_network_policy(nine):
    deny = "{endpointSelector: {matchLabels: {pod: a}}, ingressDeny: [{fromEndpoints: [{matchLabels: {pod: c}}]}], enableDefaultDeny: {ingress: false}}"  # noqa: E501
    nine.put(policy("", "w", yaml.safe_load(deny), "CiliumClusterwideNetworkPolicy"))
    apply(nine, "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")
    check(nine, lambda s, t, p, n: t.endswith("a") and s.endswith("c"))


def test_blocks_match_pods_only_as_kubernetes_has_it(nine):
    nine.start(cidr_match="cilium")
    apply(nine, *CASES["a block of addresses covers pods"][0])
    check(nine, lambda s, t, p, n: t == A)
    assert nine.allows(2, "ingress", OWN[0], 6, 80), "the own node"


def test_enforcement_always_and_never(nine):
    nine.start(enforcement="always")
    apply(nine, TO_A + "ingress: [{}]}")
    check_all = [reaches(nine, s, t, 6, 80) for s in PODS for t in PODS if s != t]
    assert not any(check_all), "egress of all is denied"
    assert nine.allows(2, "ingress", ip("y/b"), 6, 80)
    about = nine.about(2, "egress", ip("y/b"), 6, 80)
    assert about["description"] == "policy.enforcement is always"
    nine.start(enforcement="never")
    apply(nine, "{podSelector: {}, policyTypes: [Ingress, Egress]}")
    assert all(reaches(nine, s, t, 6, 80) for s in PODS for t in PODS)
