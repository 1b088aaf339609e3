"""Services and EndpointSlices as manifests say them: every field, defaults, refusals by field."""

from ipaddress import ip_address, ip_network

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dataplane.objects.collect import collect
from dataplane.objects.manifest import ManifestError
from dataplane.objects.services import Endpoint, EndpointPort, ServicePort, is_plain

FULL = """
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  creationTimestamp: 2025-01-02T03:04:05Z
  annotations: {penstock.io/lb-algorithm: maglev}
  labels: {app: web}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, "fd00:96::a"]
  externalIPs: [198.51.100.7]
  externalTrafficPolicy: Local
  internalTrafficPolicy: Local
  healthCheckNodePort: 31234
  publishNotReadyAddresses: true
  trafficDistribution: PreferClose
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  loadBalancerSourceRanges: [" 192.0.2.7/24 ", "2001:db8::/32"]
  ports:
  - {name: http, port: 80, targetPort: web, nodePort: 30080}
  - {name: dns, protocol: UDP, port: 53}
status:
  loadBalancer:
    ingress: [{ip: 203.0.113.7}, {ip: 203.0.113.8, ipMode: Proxy}, {hostname: lb.example}]
"""
SLICE = """
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: web-abc
  namespace: shop
  labels: {kubernetes.io/service-name: web}
  annotations: {service.cilium.io/weight: "5"}
addressType: IPv4
ports:
- {name: http, port: 8080, protocol: TCP}
- {name: all}
endpoints:
- addresses: [10.1.0.5, 10.1.0.6]
  conditions: {ready: false, serving: true, terminating: true}
  nodeName: node1
  targetRef: {kind: Pod, name: web-1}
  hints: {forZones: [{name: a}, {name: b}], forNodes: [{name: node1}]}
- addresses: [10.1.0.7]
  targetRef: {kind: Machine, name: m}
- addresses: [10.1.0.8]
  conditions: {ready: false}
"""


def read(text: str):
    return collect([yaml.safe_load(text)])


def changed(text: str, path: str, value):
    """The manifest with one field set, by a path such as spec.ports.0.port."""
    manifest = yaml.safe_load(text)
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    at = manifest
    for part in way:
        at = at[part]
    at[last] = value
    return manifest


def test_every_field_of_a_service_is_read():
    one = read(FULL).services["shop", "web"]
    assert one.type == "LoadBalancer"
    assert one.cluster_ips == (ip_address("10.96.0.10"), ip_address("fd00:96::a"))
    assert one.external_ips == (ip_address("198.51.100.7"),)
    assert one.load_balancer_ips == (ip_address("203.0.113.7"),), "mode Proxy comes to node ports"
    assert one.external_local
    assert one.internal_local
    assert one.health_check_port == 31234
    assert one.publish_not_ready
    assert one.affinity_s == 60
    assert one.source_ranges == (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))
    assert one.ports == (
        ServicePort("http", "TCP", 80, "web", 30080),
        ServicePort("dns", "UDP", 53, 0, 0),
    )
    assert one.created == "2025-01-02T03:04:05+00:00"
    assert one.annotations["penstock.io/lb-algorithm"] == "maglev"


def test_every_field_of_a_slice_is_read():
    one = read(SLICE).slices["shop", "web-abc"]
    assert (one.service, one.family, one.weight) == ("web", 4, 5)
    assert one.ports == (EndpointPort("http", "TCP", 8080), EndpointPort("all", "TCP", 0))
    first = Endpoint(
        ip_address("10.1.0.5"), False, True, True, "node1", "web-1", ("a", "b"), ("node1",)
    )
    assert one.endpoints == (
        first,
        Endpoint(ip_address("10.1.0.7")),
        Endpoint(ip_address("10.1.0.8"), ready=False, serving=False),
    )


def test_defaults_are_those_of_the_api_server():
    bare = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}}
    one = collect([{**bare, "spec": {"ports": [{"port": 80}]}}]).services["default", "a"]
    assert (one.type, one.cluster_ips, one.headless) == ("ClusterIP", (), False)
    assert not one.external_local
    assert not one.internal_local
    assert one.affinity_s == 0
    assert one.ports == (ServicePort("", "TCP", 80),)
    sticky = collect([{**bare, "spec": {"sessionAffinity": "ClientIP"}}])
    assert sticky.services["default", "a"].affinity_s == 10800


@pytest.mark.parametrize(
    ("spec", "headless", "addresses"),
    [
        ({"clusterIP": "None"}, True, ()),
        ({"clusterIPs": ["None"]}, True, ()),
        ({"clusterIP": ""}, False, ()),
        ({"clusterIP": "10.96.0.1"}, False, ("10.96.0.1",)),
        ({"clusterIP": "10.96.0.1", "clusterIPs": []}, False, ("10.96.0.1",)),
        ({"type": "ExternalName", "externalName": "example.org"}, False, ()),
    ],
)
def test_cluster_ips(spec, headless, addresses):
    made = {"kind": "Service", "metadata": {"name": "a"}, "spec": spec}
    one = collect([made]).services["default", "a"]
    assert one.headless == headless
    assert one.cluster_ips == tuple(map(ip_address, addresses))


def test_slices_of_names_have_no_endpoints():
    one = collect([changed(SLICE, "addressType", "FQDN")]).slices["shop", "web-abc"]
    assert (one.family, one.endpoints) == (0, ())


@pytest.mark.parametrize(
    ("text", "path", "value", "place"),
    [
        (FULL, "spec/type", "Magic", "spec.type"),
        (FULL, "spec/clusterIPs", ["10.96.0.1", "10.96.0.2"], "spec.clusterIPs"),
        (FULL, "spec/clusterIPs", ["None", "10.96.0.2"], "spec.clusterIPs"),
        (FULL, "spec/clusterIPs", ["127.0.0.1"], "spec.clusterIPs"),
        (FULL, "spec/clusterIPs", "10.96.0.1", "spec.clusterIPs"),
        (FULL, "spec/externalIPs", ["here"], "spec.externalIPs"),
        (FULL, "spec/externalIPs", "198.51.100.1", "spec.externalIPs"),
        (FULL, "spec/externalTrafficPolicy", "Near", "spec.externalTrafficPolicy"),
        (FULL, "spec/internalTrafficPolicy", 5, "spec.internalTrafficPolicy"),
        (FULL, "spec/healthCheckNodePort", 70000, "spec.healthCheckNodePort"),
        (FULL, "spec/publishNotReadyAddresses", "yes", "spec.publishNotReadyAddresses"),
        (FULL, "spec/sessionAffinity", "Cookie", "spec.sessionAffinity"),
        (FULL, "spec/sessionAffinityConfig/clientIP/timeoutSeconds", 0, "timeoutSeconds"),
        (FULL, "spec/sessionAffinityConfig/clientIP/timeoutSeconds", 86401, "86400"),
        (FULL, "spec/loadBalancerSourceRanges", ["10.0.0.0/33"], "loadBalancerSourceRanges"),
        (FULL, "spec/loadBalancerSourceRanges", "10.0.0.0/8", "loadBalancerSourceRanges"),
        (FULL, "spec/ports/0/port", 0, "spec.ports[0].port"),
        (FULL, "spec/ports/0/nodePort", -1, "spec.ports[0].nodePort"),
        (FULL, "spec/ports/0/targetPort", 70000, "spec.ports[0].targetPort"),
        (FULL, "spec/ports/1/protocol", "ICMP", "spec.ports[1].protocol"),
        (FULL, "spec/ports/1/name", "http", "spec.ports[1].name"),
        (FULL, "spec/ports/1", {"port": 53}, "spec.ports[1].name: is missing"),
        (FULL, "spec/ports/1", {"name": "x", "port": 80}, "spec.ports[1].port"),
        (FULL, "status/loadBalancer/ingress/0/ip", "x", "status.loadBalancer.ingress[0].ip"),
        (FULL, "status/loadBalancer/ingress/0/ipMode", "NAT", "ipMode"),
        (SLICE, "addressType", "IPv5", "addressType"),
        (SLICE, "addressType", "IPv6", "endpoints[0].addresses"),
        (SLICE, "endpoints/0/addresses", [], "endpoints[0].addresses"),
        (SLICE, "endpoints/1/addresses", ["169.254.0.5"], "endpoints[1].addresses"),
        (SLICE, "endpoints/0/conditions/ready", "maybe", "endpoints[0].conditions.ready"),
        (SLICE, "endpoints/0/hints/forZones", ["a"], "endpoints[0].hints.forZones"),
        (SLICE, "endpoints/0/nodeName", 5, "endpoints[0].nodeName"),
        (SLICE, "endpoints", [{"addresses": ["10.0.0.1"]}] * 1001, "1000"),
        (SLICE, "ports/0/port", 70000, "ports[0].port"),
        (SLICE, "ports/0/protocol", "tcp", "ports[0].protocol"),
    ],
)
def test_a_refusal_names_the_field(text, path, value, place):
    with pytest.raises(ManifestError) as caught:
        collect([changed(text, path, value)])
    assert place in str(caught.value)
    assert "web" in str(caught.value)


def test_weights_are_numbers():
    for weight in ("x", "-1", "70000", "1.5"):
        manifest = yaml.safe_load(SLICE)
        manifest["metadata"]["annotations"]["service.cilium.io/weight"] = weight
        with pytest.raises(ManifestError, match="weight"):
            collect([manifest])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("10.0.0.1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = [
    (FULL, path)
    for path in (
        "metadata", "spec", "status", "spec/ports", "spec/ports/0", "spec/clusterIPs",
        "spec/externalIPs", "spec/sessionAffinityConfig", "status/loadBalancer",
        "status/loadBalancer/ingress", "spec/loadBalancerSourceRanges", "spec/type",
    )
] + [
    (SLICE, path)
    for path in (
        "metadata", "addressType", "ports", "ports/0", "endpoints", "endpoints/0",
        "endpoints/0/addresses", "endpoints/0/conditions", "endpoints/0/hints",
        "endpoints/0/targetRef",
    )
]  # fmt: skip


@given(field=st.sampled_from(FIELDS), value=ANYTHING)
def test_nonsense_is_read_or_refused(field, value):
    try:
        collect([changed(*field, value)])
    except ManifestError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        ("0.0.0.0", False), ("127.0.0.1", False), ("169.254.1.1", False), ("224.0.0.1", False),
        ("255.255.255.255", False), ("1.0.0.1", True), ("223.255.255.255", True),
        ("169.253.0.1", True), ("::", False), ("::1", False), ("::10.0.0.1", False),
        ("::ffff:10.0.0.1", False), ("fe80::1", False), ("ff02::1", False), ("fc00::1", True),
        ("2001:db8::1", True), ("64:ff9b::a00:1", True),
    ],
)  # fmt: skip
def test_addresses_that_nobody_can_reach(address, plain):
    assert is_plain(ip_address(address)) == plain
