"""Who is who, and what rules mean by it: identities, flags, services, named ports, attribution."""

import pytest

from tests.naive import policy as naive
from tests.policy_node import A4, ALLOW_C, C4, CNP, HTTP, begin, peer, row_of, write
from tests.policy_world import OWN, PolicyWorld, addresses, pod, slice_of
from xdp.abi import CONST, value


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = PolicyWorld(tmp_path_factory.mktemp("world"))
    yield made
    made.shm.close()


@pytest.fixture
def world(shared):
    return begin(shared)


# --- who is who -----------------------------------------------------------------------------------


def test_identities_and_flags_of_addresses(world):
    host, remote, pods = CONST["PEER_HOST"], CONST["PEER_REMOTE_NODE"], CONST["PEER_POD"]
    keep = CONST["PEER_KEEP_SOURCE"]
    world.put(slice_of("default", "kubernetes", ["192.0.2.2", "198.51.100.1"]))
    world.update()
    assert peer(world, OWN[0]) == (value("IDENTITY_HOST"), host | keep)
    assert peer(world, "10.244.1.1") == (value("IDENTITY_HOST"), host | keep)
    assert peer(world, "2001:db8::2") == (value("IDENTITY_REMOTE_NODE"), remote | keep)
    assert peer(world, "192.0.2.2") == (value("IDENTITY_KUBE_APISERVER"), remote | keep)
    assert peer(world, "198.51.100.1") == (value("IDENTITY_KUBE_APISERVER"), 0)
    assert peer(world, "10.244.9.9") == (value("IDENTITY_UNMANAGED"), keep)
    assert peer(world, "10.9.9.9") == (value("IDENTITY_WORLD_IPV4"), keep), "not masqueraded"
    assert peer(world, "8.8.8.8") == (value("IDENTITY_WORLD_IPV4"), 0)
    assert peer(world, "2001:db9::1") == (value("IDENTITY_WORLD_IPV6"), 0)
    number, flags = peer(world, C4)
    assert value("IDENTITY_HASHED_FIRST") <= number < value("IDENTITY_CIDR_FIRST")
    assert flags == pods | keep
    assert world.writer.subject(2)[0] == peer(world, A4)[0] != number


def test_a_block_of_a_policy_has_an_identity_of_its_own(world):
    write(world, "p", "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, "
          "except: [10.9.0.0/16]}}, {ipBlock: {cidr: 0.0.0.0/0}}]}]}")  # fmt: skip
    world.update()
    outer, inner = peer(world, "10.1.1.1"), peer(world, "10.9.1.1")
    assert value("IDENTITY_CIDR_FIRST") <= outer[0] != inner[0] >= value("IDENTITY_CIDR_FIRST")
    assert inner[1] == outer[1] == CONST["PEER_KEEP_SOURCE"], "what is around is inherited"
    assert peer(world, "8.8.8.8")[0] == value("IDENTITY_WORLD_IPV4"), "all of it is the world"
    del world.manifests["NetworkPolicy", "x", "p"]
    world.update()
    assert peer(world, "10.9.1.1")[0] == value("IDENTITY_WORLD_IPV4")


def test_the_same_labels_have_the_same_number_everywhere_and_hashes_of_pods_none(world):
    number = peer(world, A4)[0]
    world.put(pod("x", "a", 10, 1, HTTP, app="a", **{"pod-template-hash": "abc"}))
    world.update()
    assert peer(world, A4)[0] == number
    write(world, "p", "{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: "
          "{pod-template-hash: abc}}}]}]}")  # fmt: skip
    world.update()
    assert world.allows(3, "ingress", A4, 6, 80), "policies may ask for it nevertheless"


def test_identities_that_the_cluster_allots(world):
    labels = {
        "k8s:app": "c",
        "k8s:io.kubernetes.pod.namespace": "y",
        "k8s:io.cilium.k8s.namespace.labels.team": "red",
        "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": "y",
        "k8s:io.cilium.k8s.policy.cluster": "default",
        "k8s:io.cilium.k8s.policy.serviceaccount": "default",
    }
    write(world, "p", ALLOW_C)
    allotted = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumIdentity",
        "metadata": {"name": "4711"},
        "security-labels": labels,
    }
    world.put(allotted)
    world.update()
    assert peer(world, C4)[0] == 4711
    row = int(world.shm.identity_peers[4711])
    group, _ = naive.groups_of(world.shm, C4)  # only the address is in the wide group of 0.0.0.0/0
    assert int(world.shm.peers[row]["groups"]) & 0xFFFFFFFF == group != 0
    world.drop(allotted)
    world.update()
    assert peer(world, C4)[0] != 4711
    assert int(world.shm.identity_peers[4711]) == 0


def test_an_address_that_two_pods_claim_is_told(world):
    world.put(pod("y", "z", 12, 2))
    problems = world.update()
    assert len(problems) == 2, "both families"
    assert "address 10.244.2.12 is claimed by y/c and y/z" in problems[0]
    world.drop(pod("y", "z", 12, 2))
    assert world.update() == []


def test_the_host_port_is_the_host(world):
    local = world.local()
    object.__setattr__(local, "host_port", 0)
    world.engine.update(world.objects(), local)
    assert world.writer.subject(0) == (value("IDENTITY_HOST"), 1)
    world.update()
    assert world.writer.subject(0) == (0, 0)


# --- what rules mean ------------------------------------------------------------------------------


def test_the_same_name_is_another_port_with_another_pod(world):
    world.put(pod("y", "d", 13, 2, (("http", 8080, "TCP"),), app="c"))
    write(world, "p", "{podSelector: {}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: "
          "{}, podSelector: {matchLabels: {app: c}}}], ports: [{port: http}]}]}")  # fmt: skip
    world.update()
    d4 = addresses(2, 13)[0]
    assert [world.allows(2, "egress", C4, 6, n) for n in (80, 8080)] == [True, False]
    assert [world.allows(2, "egress", d4, 6, n) for n in (80, 8080)] == [False, True]
    write(world, "q", "{podSelector: {}, ingress: [{ports: [{port: http}]}]}")
    world.put(pod("x", "b", 11, 1, (("http", 8080, "TCP"),), app="b"))
    world.update()
    assert [world.allows(2, "ingress", C4, 6, n) for n in (80, 8080)] == [True, False]
    assert [world.allows(3, "ingress", C4, 6, n) for n in (80, 8080)] == [False, True]


def test_services_are_the_addresses_of_their_endpoints(world):
    write(world, "p", "{endpointSelector: {}, egress: [{toServices: [{k8sService: {"
          "serviceName: s, namespace: y}}], toPorts: [{ports: [{port: '443', protocol: TCP}]}]}]}",
          CNP)  # fmt: skip
    world.put(slice_of("y", "s", ["203.0.113.1", C4]))
    world.update()
    assert world.allows(2, "egress", "203.0.113.1", 6, 443)
    assert world.allows(2, "egress", C4, 6, 443)
    assert not world.allows(2, "egress", "203.0.113.2", 6, 443)
    world.put(slice_of("y", "s", ["203.0.113.2"]))
    world.update()
    assert not world.allows(2, "egress", "203.0.113.1", 6, 443)
    assert not world.allows(2, "egress", C4, 6, 443)
    assert world.allows(2, "egress", "203.0.113.2", 6, 443)


def test_verdicts_know_answer_log_and_rule(world):
    write(world, "p", "{podSelector: {matchLabels: {app: a}}}", deny_response="reset")
    write(world, "q", "{endpointSelector: {matchLabels: {app: b}}, log: {value: seen}, "
          "description: why not, ingressDeny: [{fromEndpoints: [{matchLabels: {app: a}}]}], "
          "ingress: [{fromEntities: [cluster]}]}", CNP)  # fmt: skip
    world.start(deny_response="icmp")
    world.update()
    word = world.word(2, "ingress", C4, 6, 80)
    assert (word & 3, word >> 2 & 3, word & 16) == (2, value("REFUSAL_RESET"), 0)
    word = world.word(3, "ingress", A4, 6, 80)
    assert (word & 3, word >> 2 & 3, word & 16) == (2, value("REFUSAL_ICMP"), 16)
    assert world.engine.book.about(word >> 8) == {
        "kind": CNP,
        "namespace": "x",
        "name": "q",
        "direction": "ingress",
        "section": "ingressDeny",
        "index": 0,
        "match": 1,
        "description": "why not",
        "log": "seen",
    }
    assert world.about(3, "ingress", C4, 6, 80)["section"] == "ingress"
    word = world.word(3, "ingress", "8.8.8.8", 6, 80)
    assert word & 16, "the rest of a policy that logs"


def test_audit_of_a_pod_of_a_policy_and_beside_others(world):
    flags = world.shm.policies["flags"]
    write(world, "p", "{podSelector: {}}", audit="true")
    world.update()
    assert flags[row_of(world, 2)] == CONST["POLICY_AUDIT"]
    assert not world.allows(2, "ingress", C4, 6, 80), "the verdict is kept, the kernel lets it pass"
    write(world, "q", "{podSelector: {matchLabels: {app: a}}, ingress: [{ports: [{port: 1}]}]}")
    write(world, "r", "{podSelector: {}, ingress: [{ports: [{port: 2}]}]}", audit="true")
    world.update()
    assert flags[row_of(world, 2)] == 0
    assert flags[row_of(world, 3)] == CONST["POLICY_AUDIT"]
    assert [world.allows(2, "ingress", C4, 6, n) for n in (1, 2, 3)] == [True, True, False]
    about = world.about(2, "ingress", C4, 6, 3)
    assert [one["name"] for one in about["policies"]] == ["q"], "an audited one denies nothing"
    world.start(audit=True)
    world.update()
    assert flags[row_of(world, 2)] == CONST["POLICY_AUDIT"]
