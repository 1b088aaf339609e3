"""Objects, programs on devices, maps and runs, against the kernel and iproute2."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.netns.wire import Wire, eventually, frame, sh
from xdp import artifacts, device, features
from xdp.abi import CONST, DTYPE
from xdp.errors import KernelError, VerifierError
from xdp.link import attach_link, attach_netlink, detach_netlink, query
from xdp.object import BpfObject, ObjectSpec
from xdp.run import live_frames, prog_run
from xdp.tc import attach_ingress, detach_ingress, query_ingress

pytestmark = [pytest.mark.root, pytest.mark.net]

DROP, PASS = 1, 2
COUNT = np.dtype([("packets", np.uint64), ("bytes", np.uint64)])


SMALL = {"flow_entries": 256, "flow_tags": 32}


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def wire(stack):
    """A wire whose near namespace the test runs in."""
    wire = Wire()
    stack.callback(wire.close)
    stack.enter_context(wire.inside(wire.near))
    return wire


@pytest.fixture
def bpf(stack):
    return stack.enter_context(BpfObject(ObjectSpec.load(artifacts.find("pass.bpf.o"))))


def link_modes(wire) -> tuple[int, bool] | None:
    """(program id, native) by iproute2."""
    found = wire.program()
    return (found["prog"]["id"], found["mode"] == 1) if found else None


@pytest.mark.parametrize("native", [True, False], ids=["native", "generic"])
def test_a_link_attaches_and_detaches(wire, bpf, native):
    link = attach_link(bpf.programs["pass"], wire.ifindex, native)
    found = query(wire.ifindex)
    assert link.native == native
    assert link_modes(wire) == (found.program_id, found.native)
    assert found.native == native
    link.close()
    link.close()
    assert query(wire.ifindex) is None
    assert link_modes(wire) is None


def test_netlink_attaches_in_the_place_of_the_old(wire, bpf):
    first = attach_netlink(bpf.programs["pass"], wire.ifindex)
    second = attach_netlink(bpf.programs["drop"], wire.ifindex)
    assert first.native
    assert second.native
    assert first.program_id != second.program_id
    assert link_modes(wire) == (second.program_id, True)
    detach_netlink(wire.ifindex)
    detach_netlink(wire.ifindex)
    assert query(wire.ifindex) is None


def test_at_tc_a_program_attaches_in_the_place_of_the_old(wire):
    spec = ObjectSpec.load(artifacts.find("penstock.bpf.o"))
    with wire.inside(wire.near), BpfObject(spec, SMALL) as first, BpfObject(spec, SMALL) as second:
        detach_ingress(wire.ifindex)  # nothing there yet, not even the qdisc
        assert query_ingress(wire.ifindex) is None
        attach_ingress(first.programs["pod_tc"], wire.ifindex)
        before = query_ingress(wire.ifindex)
        attach_ingress(second.programs["pod_tc"], wire.ifindex)
        assert before and query_ingress(wire.ifindex) not in (None, before)
        shown = sh("tc", "-n", wire.near, "filter", "show", "dev", "here", "ingress")
        assert shown.count("handle 0x1") == 1
        for _ in range(2):
            detach_ingress(wire.ifindex)
            assert query_ingress(wire.ifindex) is None
        with pytest.raises(KernelError, match="ifindex 9999"):
            attach_ingress(first.programs["pod_tc"], 9999)


@pytest.mark.parametrize("standing", [True, False], ids=["native", "generic"])
def test_a_takeover_keeps_the_mode_that_stands(wire, bpf, standing):
    attach_netlink(bpf.programs["pass"], wire.ifindex, native=standing)
    taken = attach_netlink(bpf.programs["drop"], wire.ifindex, native=not standing)
    assert taken.native == standing
    assert link_modes(wire) == (taken.program_id, standing)
    detach_netlink(wire.ifindex)
    assert query(wire.ifindex) is None


def test_nobody_takes_a_device_from_a_link(wire, bpf):
    with contextlib.closing(attach_link(bpf.programs["pass"], wire.ifindex)):
        for attach in (attach_link, attach_netlink):
            with pytest.raises(KernelError, match=f"ifindex {wire.ifindex}") as caught:
                attach(bpf.programs["drop"], wire.ifindex)
            assert caught.value.errno == errno.EBUSY


def test_a_driver_without_xdp_gets_it_generic(wire, bpf):
    loopback = socket.if_nametoindex("lo")
    with contextlib.closing(attach_link(bpf.programs["pass"], loopback)) as link:
        assert not link.native
    assert not attach_netlink(bpf.programs["pass"], loopback).native


def test_a_veth_with_too_few_queues_gets_it_generic(stack, bpf):
    wire = Wire(queues=1, peer_queues=2)
    stack.callback(wire.close)
    stack.enter_context(wire.inside(wire.near))
    assert not attach_netlink(bpf.programs["pass"], wire.ifindex).native


def test_a_device_that_is_gone_is_an_error_and_its_link_closes(wire, bpf):
    link = attach_link(bpf.programs["pass"], wire.ifindex)
    sh("ip", "link", "del", "here")
    link.close()
    assert query(wire.ifindex) is None
    detach_netlink(wire.ifindex)
    for attach in (attach_link, attach_netlink):
        with pytest.raises(KernelError, match=f"ifindex {wire.ifindex}: no device") as caught:
            attach(bpf.programs["pass"], wire.ifindex)
        assert caught.value.errno == errno.ENODEV


HOLDER = """
import sys, time
from xdp import artifacts
from xdp.link import attach_link, attach_netlink
from xdp.object import BpfObject, ObjectSpec
bpf = BpfObject(ObjectSpec.load(artifacts.find("penstock.bpf.o")))
attach = {"link": attach_link, "netlink": attach_netlink}[sys.argv[1]]
kept = attach(bpf.programs["uplink_rx"], int(sys.argv[2]))
print("attached", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["link", "netlink"])
def test_a_killed_process_leaves_nothing_on_an_uplink_but_a_pods_program(wire, how):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, how, str(wire.ifindex)],
        stdout=subprocess.PIPE, text=True, cwd=artifacts.ROOT,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "attached\n"
        assert link_modes(wire)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if how == "link":
        assert eventually(lambda: link_modes(wire) is None)
    else:
        assert link_modes(wire)


def test_the_verifiers_refusal_is_its_last_useful_lines(tmp_path):
    source = tmp_path / "bad.c"
    source.write_text(
        "#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n"
        'SEC("xdp") int careless(struct xdp_md *ctx)\n'
        "{ return *(char *)(long)ctx->data; }\n"
        'char _license[] SEC("license") = "GPL";\n'
    )
    include = f"/usr/include/{os.uname().machine}-linux-gnu"
    sh("clang", "-target", "bpf", "-O2", "-g", f"-I{include}", "-c", str(source),
       "-o", str(tmp_path / "bad.bpf.o"))  # fmt: skip
    with pytest.raises(VerifierError) as caught:
        BpfObject(ObjectSpec.load(tmp_path / "bad.bpf.o"))
    message = str(caught.value)
    assert message.startswith("bad.bpf.o: Permission denied")
    assert "invalid access to packet" in message
    assert "processed" not in message
    assert len(message.splitlines()) <= VerifierError.LINES + 1
    assert "processed" in caught.value.log


def test_a_file_that_is_no_object_is_refused(tmp_path):
    bad = tmp_path / "bad.o"
    bad.write_bytes(b"not an ELF file")
    with pytest.raises(KernelError, match=r"bad\.o"):
        BpfObject(ObjectSpec.load(bad))
    with pytest.raises(FileNotFoundError, match="make build"):
        ObjectSpec.load(tmp_path / "none.o")


def test_a_map_is_written_read_listed_and_full():
    with BpfObject(ObjectSpec.load(artifacts.find("penstock.bpf.o"))) as bpf:
        ports = bpf.maps["xdp_ports"]
        assert (ports.key_size, ports.value_size) == (4, DTYPE["xdp_port"].itemsize)
        assert ports.lookup(1) is None
        entry = np.zeros((), DTYPE["xdp_port"])
        for key in range(ports.max_entries):
            entry["socket_base"] = key
            ports.update(np.uint32(key), entry[()])
        with pytest.raises(KernelError, match="limit 1024 entries") as caught:
            ports.update(ports.max_entries, entry.tobytes())
        assert caught.value.errno == errno.E2BIG
        listed = {int.from_bytes(k, "little"): v for k, v in ports.items()}
        assert sorted(listed) == list(range(CONST["PORTS_MAX"]))
        assert np.frombuffer(listed[7], DTYPE["xdp_port"])["socket_base"][0] == 7
        assert ports.delete(7)
        assert not ports.delete(7)
        for key, value in ((-1, b""), (1 << 32, b""), (b"short", b""), (1, b"short")):
            with pytest.raises(ValueError, match="xdp_ports"):
                ports.update(key, value or entry.tobytes())


def test_an_array_in_memory_is_the_map_and_outlives_the_object():
    with BpfObject(ObjectSpec.load(artifacts.find("penstock.bpf.o"))) as bpf:
        steering = bpf.maps["steering"]
        rows = steering.mmap(DTYPE["steering"])
        rows[0]["local4_be"][3] = 0x01020304
        assert steering.lookup(0) == rows[0].tobytes()
        rows[0]["timeout_ns"] = 5
        steering.update(0, rows[0])
        with pytest.raises(ValueError, match="bytes a value"):
            steering.mmap(DTYPE["node"])
        with pytest.raises(KernelError, match="mmap of map xdp_ports"):
            bpf.maps["xdp_ports"].mmap(DTYPE["xdp_port"])
    with pytest.raises(KernelError, match="Bad file descriptor"):
        steering.lookup(0)
    rows[0]["heartbeat_ns"] = 9
    assert (rows[0]["heartbeat_ns"], rows[0]["timeout_ns"]) == (9, 5)


def test_a_map_per_cpu_is_summed_not_overrun(bpf):
    counters = bpf.maps["counters"]
    for call in (lambda: counters.lookup(0), lambda: counters.update(0, bytes(16))):
        with pytest.raises(ValueError, match="lookup_per_cpu"):
            call()
    with pytest.raises(ValueError, match="use lookup"):
        bpf.maps["flows_mask"].lookup_per_cpu(0, np.dtype(np.uint64))
    before = counters.lookup_per_cpu(0, COUNT)
    prog_run(bpf.programs["count_drop"], bytes(1000), repeat=5)
    after = counters.lookup_per_cpu(0, COUNT)
    assert after["packets"].sum() - before["packets"].sum() == 5
    assert after["bytes"].sum() - before["bytes"].sum() == 5000


def test_a_run_returns_verdict_packet_and_time(bpf):
    packet = frame(bytes(range(100)))
    for name, verdict in (("pass", PASS), ("drop", DROP)):
        result = prog_run(bpf.programs[name], packet, repeat=1000)
        assert (result.retval, result.data) == (verdict, packet)
        assert result.duration_ns >= 0
    with pytest.raises(KernelError, match="3 bytes"):
        prog_run(bpf.programs["pass"], b"abc")


def test_live_frames_go_through_a_device_and_all_their_buffers_count(stack, wire):
    near = stack.enter_context(BpfObject(ObjectSpec.load(artifacts.find("pass.bpf.o"))))
    far = stack.enter_context(BpfObject(ObjectSpec.load(artifacts.find("pass.bpf.o"))))
    with wire.inside(wire.far):
        attach_netlink(far.programs["count_drop"], wire.far_ifindex)
    near.maps["devices"].update(1, wire.ifindex)
    packet = frame(bytes(46))
    live_frames(near.programs["redirect"], packet, wire.ifindex, 200)

    def arrived() -> tuple[int, int]:
        rows = far.maps["counters"].lookup_per_cpu(0, COUNT)
        return int(rows["packets"].sum()), int(rows["bytes"].sum())

    assert eventually(lambda: arrived()[0] >= 200)
    assert arrived() == (200, 200 * len(packet))


def test_the_checksum_switch_and_the_channels_are_ethtools(wire):
    assert device.driver("here") == "veth"
    assert device.channels("here") == 1
    assert device.checksum_is_on("here")
    device.checksum_off("here")
    assert not device.checksum_is_on("here")
    assert "tx-checksumming: off" in sh("ethtool", "-k", "here")
    for name in ("none", "a-name-beyond-all-limits"):
        with pytest.raises(OSError):
            device.driver(name)


def test_a_tag_stands_in_the_packet_once_the_offload_is_off(wire):
    def offload() -> str:
        shown = sh("ip", "netns", "exec", wire.near, "ethtool", "-k", "here")
        return shown.split("tx-vlan-offload: ")[1].split()[0]

    assert offload() == "on"
    with wire.inside(wire.near):
        for _ in range(2):
            device.tags_inline("here")
            assert offload() == "off"


def test_every_feature_is_probed_and_nothing_stays_behind(wire):
    before = os.readlink("/proc/self/ns/net")
    found = {feature.name: feature for feature in features.probe_all()}
    assert os.readlink("/proc/self/ns/net") == before
    for name in ("XDP programs", "XDP links", "XSKMAP", "AF_XDP"):
        assert found[name].state == "yes", found[name]
    for feature in found.values():
        assert feature.since
        assert feature.detail
        assert bool(feature.fix) == (feature.state != "yes")
