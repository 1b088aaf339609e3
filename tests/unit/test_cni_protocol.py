"""Requests, answers and results of the CNI server, by the specification's rules."""

import json
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.cni import result
from dataplane.cni.errors import CniError, Code
from dataplane.cni.model import Attachment, NodeAddressing, host_name, macs
from dataplane.cni.portmap import PortMapping
from dataplane.cni.protocol import VERSIONS, error_body, parse, version_of

NODE = NodeAddressing(
    ip_address("10.1.0.1"),
    ip_address("fd00:1::1"),
    (ip_network("10.1.0.0/24"), ip_network("fd00:1::/64")),
    1450,
    "02:50:0a:00:00:01",
)


def framed(config, **environment) -> bytes:
    """A request as the shim sends it."""
    variables = b"".join(f"CNI_{k}={v}".encode() + b"\0" for k, v in environment.items())
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return variables + b"\0" + text


def add_request(**changes) -> bytes:
    environment = {"COMMAND": "ADD", "CONTAINERID": "c1", "NETNS": "/n", "IFNAME": "eth0"}
    config = {"cniVersion": "1.1.0", "name": "penstock"}
    for name, value in changes.items():
        (environment if name.isupper() else config)[name] = value
    return framed(config, **environment)


def refused(data: bytes) -> CniError:
    with pytest.raises(CniError) as caught:
        parse(data)
    return caught.value


def code_of(data: bytes) -> Code | None:
    """The code of the refusal, None when the request is read; anything else is a failure."""
    try:
        parse(data)
    except CniError as error:
        return error.code
    return None


def test_a_complete_request_is_read():
    request = parse(add_request(ARGS="IgnoreUnknown=1;K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop"))
    assert request.key == ("penstock", "c1", "eth0")
    assert request.netns == "/n"
    assert request.arguments["K8S_POD_NAME"] == "web"


@pytest.mark.parametrize(
    ("data", "code", "named"),
    [
        (b"", Code.IO_FAILURE, "cut off"),
        (b"CNI_COMMAND=ADD\0", Code.IO_FAILURE, "cut off"),
        (add_request(COMMAND="MOVE"), Code.INVALID_ENVIRONMENT, "MOVE"),
        (framed(b"{", COMMAND="ADD"), Code.DECODE_FAILURE, "JSON"),
        (framed(b"[" * 100_000, COMMAND="ADD"), Code.DECODE_FAILURE, "JSON"),
        (framed(b"[]", COMMAND="ADD"), Code.DECODE_FAILURE, "list"),
        (add_request(cniVersion="0.2.0"), Code.INCOMPATIBLE_VERSION, "0.2.0"),
        (add_request(cniVersion="2.0.0"), Code.INCOMPATIBLE_VERSION, "1.1.0"),
        (add_request(cniVersion=["1.1.0"]), Code.INCOMPATIBLE_VERSION, "1.1.0"),
        (add_request(COMMAND="GC", cniVersion="1.0.0"), Code.INCOMPATIBLE_VERSION, "GC"),
        (add_request(COMMAND="STATUS", cniVersion="1.0.0"), Code.INCOMPATIBLE_VERSION, "STATUS"),
        (add_request(COMMAND="CHECK", cniVersion="0.3.1"), Code.INCOMPATIBLE_VERSION, "CHECK"),
        (add_request(CONTAINERID=""), Code.INVALID_ENVIRONMENT, "CNI_CONTAINERID"),
        (add_request(CONTAINERID="../etc"), Code.INVALID_ENVIRONMENT, "../etc"),
        (add_request(NETNS=""), Code.INVALID_ENVIRONMENT, "CNI_NETNS"),
        (add_request(IFNAME="a" * 16), Code.INVALID_ENVIRONMENT, "15"),
        (add_request(IFNAME=".."), Code.INVALID_ENVIRONMENT, "CNI_IFNAME"),
        (add_request(ARGS="A=1;B"), Code.INVALID_ENVIRONMENT, "'B'"),
        (add_request(name=""), Code.INVALID_CONFIG, "name"),
        (add_request(name=7), Code.INVALID_CONFIG, "name"),
        (add_request(ipam={"type": "host-local"}), Code.UNSUPPORTED_FIELD, "host-local"),
        (add_request(ipMasq=True), Code.UNSUPPORTED_FIELD, "ipMasq"),
        (add_request(prevResult=[1]), Code.INVALID_CONFIG, "prevResult"),
        (add_request(prevResult={"ips": "x"}), Code.INVALID_CONFIG, "ips"),
        (add_request(COMMAND="CHECK"), Code.INVALID_CONFIG, "prevResult"),
        (add_request(COMMAND="GC"), Code.INVALID_CONFIG, "valid-attachments"),
    ],
)
def test_a_wrong_request_is_refused_with_the_code_and_the_value(data, code, named):
    error = refused(data)
    assert error.code == code
    assert named in str(error)


MAPPING = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}


def test_port_mappings_are_read():
    given = [
        MAPPING,
        {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "192.0.2.1"},
        {"hostPort": 53, "containerPort": 5353, "hostIP": "::"},
        {"hostPort": 9, "containerPort": 9, "protocol": "sctp"},
        MAPPING,
    ]
    request = parse(add_request(runtimeConfig={"portMappings": given, "mac": "x"}))
    assert request.port_mappings == (
        PortMapping(8080, 80, "TCP"),
        PortMapping(53, 5353, "UDP", ip_address("192.0.2.1")),
        PortMapping(53, 5353, "TCP"),
        PortMapping(9, 9, "SCTP"),
    )
    assert all(PortMapping.read(one.plain()) == one for one in request.port_mappings)
    assert parse(add_request(runtimeConfig=None)).port_mappings == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hostPort": 0}, "hostPort"),
        ({"hostPort": 65536}, "65536"),
        ({"containerPort": "80"}, "containerPort"),
        ({"protocol": "icmp"}, "icmp"),
        ({"protocol": 6}, "protocol"),
        ({"hostIP": "here"}, "here"),
        ({"hostIP": 7}, "hostIP"),
    ],
)
def test_a_wrong_port_mapping_is_refused_at_add_and_no_hindrance_to_del(changes, named):
    wrong = {"portMappings": [{**MAPPING, **changes}]}
    error = refused(add_request(runtimeConfig=wrong))
    assert error.code == Code.INVALID_CONFIG
    assert named in str(error)
    assert parse(add_request(COMMAND="DEL", runtimeConfig=wrong)).port_mappings == ()


@pytest.mark.parametrize("wrong", [[1], {"portMappings": {}}, {"portMappings": [1]}, "x"])
def test_runtime_configuration_of_another_shape_is_refused(wrong):
    assert code_of(add_request(runtimeConfig=wrong)) == (
        None if wrong == {"portMappings": {}} else Code.INVALID_CONFIG
    )


def test_gc_wants_pairs_of_strings():
    wrong = refused(add_request(COMMAND="GC", **{"cni.dev/valid-attachments": [{"ifname": "e"}]}))
    assert wrong.code == Code.INVALID_CONFIG
    entries = [{"containerID": "c1", "ifname": "eth0"}]
    request = parse(add_request(COMMAND="GC", **{"cni.dev/valid-attachments": entries}))
    assert request.valid_attachments == {("c1", "eth0")}


def test_delete_does_without_namespace_and_previous_result():
    assert parse(add_request(COMMAND="DEL", NETNS="")).command == "DEL"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "cniVersion", "prevResult", "ips", "cni.dev/valid-attachments"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(
    command=st.sampled_from(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", ""]),
    values=st.dictionaries(
        st.sampled_from(["CONTAINERID", "NETNS", "IFNAME", "ARGS"]), st.text(max_size=20)
    ),
    config=json_values | st.binary(max_size=40),
)
def test_any_input_is_read_or_refused(command, values, config):
    data = framed(config, COMMAND=command)
    data = "".join(f"CNI_{k}={v}\0" for k, v in values.items()).encode("utf-8", "ignore") + data
    code = code_of(data)
    body = error_body(version_of(data), CniError(code or Code.INTERNAL, "a message"))
    assert body["cniVersion"] in VERSIONS


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    assert code_of(b"CNI_COMMAND=" + data) != Code.INTERNAL


def attachment() -> Attachment:
    addresses = (ip_address("10.1.0.7"), ip_address("fd00:1::7"))
    return Attachment.plan("c1", "eth0", "/run/netns/c1", addresses, NODE, 2)


def test_the_newest_result_tells_everything():
    told = result.build("1.1.0", attachment())
    host, pod = told["interfaces"]
    assert host["name"] == host_name("c1", "eth0")
    assert "sandbox" not in host
    assert pod == {
        "name": "eth0",
        "mac": macs("c1", "eth0")[0],
        "mtu": 65000,
        "sandbox": "/run/netns/c1",
    }
    assert told["ips"] == [
        {"address": "10.1.0.7/32", "gateway": "10.1.0.1", "interface": 1},
        {"address": "fd00:1::7/128", "gateway": "fd00:1::1", "interface": 1},
    ]
    assert {"dst": "10.1.0.1/32", "scope": 253} in told["routes"]
    assert {"dst": "0.0.0.0/0", "gw": "10.1.0.1", "mtu": 1450} in told["routes"]
    assert {"dst": "fd00:1::/64", "gw": "fd00:1::1", "mtu": 65000} in told["routes"]


@pytest.mark.parametrize("version", VERSIONS)
def test_older_results_have_no_newer_field(version):
    told = result.build(version, attachment())
    assert told["cniVersion"] == version
    assert told["dns"] == {}
    assert all(("version" in ip) == (version < "1.0.0") for ip in told["ips"])
    if version < "1.1.0":
        assert all("mtu" not in part for part in told["interfaces"] + told["routes"])
        assert all("gw" in route and "scope" not in route for route in told["routes"])


def test_a_previous_result_is_kept():
    previous = {
        "interfaces": [{"name": "other"}],
        "ips": [{"address": "192.0.2.1/24", "interface": 0}],
        "dns": {"nameservers": ["192.0.2.53"]},
    }
    told = result.build("1.0.0", attachment(), previous)
    assert told["interfaces"][0] == {"name": "other"}
    assert told["ips"][0] == previous["ips"][0]
    assert {ip["interface"] for ip in told["ips"][1:]} == {2}
    assert told["dns"] == previous["dns"]


@given(st.text(max_size=64), st.text(max_size=15))
def test_names_and_macs_follow_from_the_key(container_id, ifname):
    name = host_name(container_id, ifname)
    assert len(name) == 11
    assert name.startswith("pst")
    mac, host_mac = macs(container_id, ifname)
    assert mac != host_mac
    for text in (mac, host_mac):
        first = int(text[:2], 16)
        assert first & 2  # locally administered
        assert not first & 1  # unicast


def test_a_family_without_router_is_left_out():
    node = NodeAddressing(NODE.router4, None, NODE.local_cidrs, 1500, NODE.gateway_mac)
    addresses = (ip_address("10.1.0.7"), ip_address("fd00:1::7"))
    kept = Attachment.plan("c", "eth0", "/n", addresses, node, 1)
    assert kept.addresses == addresses[:1]
    assert all(route.destination.version == 4 for route in kept.routes)
