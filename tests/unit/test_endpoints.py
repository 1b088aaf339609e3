"""Endpoint records: whole on disk, told to listeners, read back equal."""

import os
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.cni.endpoints import Endpoint, Endpoints
from dataplane.cni.portmap import PortMapping, host_ports
from dataplane.services.model import HostPort

SAMPLE = Endpoint(
    number=1,
    network="penstock",
    container_id="c1",
    ifname="eth0",
    netns="/run/netns/c1",
    host_ifname="pst00000001",
    host_ifindex=7,
    mac="0a:00:00:00:00:01",
    host_mac="0e:00:00:00:00:01",
    mtu=65000,
    queue_count=2,
    address4=IPv4Address("10.0.0.2"),
    address6=IPv6Address("fd00::2"),
    pod_namespace="shop",
    pod_name="web",
)


def numbered(number: int) -> Endpoint:
    return replace(SAMPLE, number=number, container_id=f"c{number}", host_ifname=f"pst{number:08x}")


def test_what_is_saved_is_there_after_a_restart(tmp_path):
    endpoints = Endpoints(tmp_path)
    for number in (2, 1):
        endpoints.save(numbered(number))
    assert list(Endpoints(tmp_path)) == [numbered(1), numbered(2)]
    assert Endpoints(tmp_path).get(SAMPLE.key) == SAMPLE
    assert endpoints.delete(SAMPLE.key) == SAMPLE
    assert endpoints.delete(SAMPLE.key) is None
    assert list(Endpoints(tmp_path)) == [numbered(2)]


def test_numbers_are_the_smallest_free(tmp_path):
    endpoints = Endpoints(tmp_path)
    assert endpoints.next_number() == 1
    for number in (1, 2, 3):
        endpoints.save(numbered(number))
    assert endpoints.next_number() == 4
    endpoints.delete(numbered(2).key)
    assert endpoints.next_number() == 2


def test_listeners_hear_of_changes_only(tmp_path):
    endpoints, heard = Endpoints(tmp_path), []
    endpoints.on_change(lambda: heard.append(len(endpoints)))
    endpoints.save(SAMPLE)
    endpoints.delete(SAMPLE.key)
    endpoints.delete(SAMPLE.key)
    assert heard == [1, 0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"number": "1"}', '{"address4": "x"}'])
def test_a_broken_file_is_reported_and_kept(tmp_path, text):
    Endpoints(tmp_path).save(numbered(2))
    (tmp_path / "endpoints/pst00000001.json").write_text(text)
    endpoints = Endpoints(tmp_path)
    assert list(endpoints.broken) == ["pst00000001"]
    assert list(endpoints) == [numbered(2)]
    assert (tmp_path / "endpoints/pst00000001.json").exists()


def test_an_interrupted_write_is_removed(tmp_path):
    Endpoints(tmp_path).save(SAMPLE)
    (tmp_path / "endpoints/.pst00000009").write_text("{")
    assert list(Endpoints(tmp_path)) == [SAMPLE]
    assert os.listdir(tmp_path / "endpoints") == ["pst00000001.json"]


def test_a_disk_that_refuses_changes_nothing(tmp_path, monkeypatch):
    endpoints = Endpoints(tmp_path)
    endpoints.save(SAMPLE)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        endpoints.save(replace(SAMPLE, host_ifindex=8))
    assert endpoints.get(SAMPLE.key) == SAMPLE
    assert list(Endpoints(tmp_path)) == [SAMPLE]
    assert os.listdir(tmp_path / "endpoints") == ["pst00000001.json"]


kinds = {
    int: st.integers(0, 2**31),
    str: st.text(max_size=20),
    IPv4Address | None: st.none() | st.ip_addresses(v=4),
    IPv6Address | None: st.none() | st.ip_addresses(v=6),
    tuple[PortMapping, ...]: st.lists(
        st.builds(
            PortMapping,
            st.integers(1, 65535),
            st.integers(1, 65535),
            st.sampled_from(["TCP", "UDP", "SCTP"]),
            st.none() | st.ip_addresses().filter(lambda at: not at.is_unspecified),
        ),
        max_size=3,
    ).map(tuple),
}


@given(st.fixed_dictionaries({f.name: kinds[f.type] for f in fields(Endpoint)}))
def test_any_record_survives_its_text(values):
    endpoint = Endpoint(**values)
    assert Endpoint.from_json(endpoint.to_json()) == endpoint


def test_records_of_an_older_version_have_no_port_mappings():
    text = SAMPLE.to_json().replace('"port_mappings": []', '"unknown": 1')
    assert Endpoint.from_json(text) == SAMPLE


def test_port_mappings_become_host_ports():
    node = IPv4Address("192.0.2.1")
    mappings = (PortMapping(8080, 80, "TCP"), PortMapping(53, 5353, "UDP", node))
    pods = (SAMPLE.address4, SAMPLE.address6)
    assert host_ports([replace(SAMPLE, port_mappings=mappings), SAMPLE]) == [
        HostPort("shop/web", 8080, "TCP", 80, pods),
        HostPort("shop/web", 53, "UDP", 5353, pods, node),
    ]
    nameless = replace(SAMPLE, pod_name="", address6=None, port_mappings=mappings[:1])
    assert host_ports([nameless]) == [HostPort("container c1", 8080, "TCP", 80, pods[:1])]


def test_fields_of_a_newer_version_are_ignored():
    text = SAMPLE.to_json().replace("{", '{"later": 1,', 1)
    assert Endpoint.from_json(text) == SAMPLE
