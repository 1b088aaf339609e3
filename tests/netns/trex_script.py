"""A script as TRex's users write them: nothing in it knows whose server answers.

    python trex_script.py < streams.json

Reads what is to be done as JSON, prints what the client saw as JSON.
"""

import json
import sys
import time

import lbr_trex_client  # noqa: F401  makes `trex` importable
from trex.stl.api import (
    IP,
    UDP,
    CTRexVmInsFixHwCs,
    Ether,
    STLClient,
    STLError,
    STLFlowLatencyStats,
    STLFlowStats,
    STLPktBuilder,
    STLScVmRaw,
    STLStream,
    STLTXCont,
    STLTXMultiBurst,
    STLTXSingleBurst,
    STLVmFixChecksumHw,
    STLVmFixIpv4,
    STLVmFlowVar,
    STLVmTupleGen,
    STLVmWrFlowVar,
    STLVmWrMaskFlowVar,
)

PAIR, FAR = [0], [2]


def packet(*words, size=64):
    base = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    base /= IP(src="16.0.0.1", dst="48.0.0.1") / UDP(sport=1025, dport=12)
    body = base / ("x" * (size - 4 - len(base)))
    fix = STLVmFixChecksumHw("IP", "UDP", CTRexVmInsFixHwCs.L4_TYPE_UDP)
    return STLPktBuilder(pkt=body, vm=STLScVmRaw([*words, fix] if words else []))


def engine():
    """Clients with ports, a field below a mask, a number that goes down."""
    return packet(
        STLVmTupleGen("t", "16.0.0.1", "16.0.0.3", 1025, 1027, limit_flows=7),
        STLVmFlowVar("down", 14, 10, 14, 2, 2, "dec"),
        STLVmFlowVar("low", 0, 0, 3, 1, 1, "inc"),
        STLVmWrFlowVar("t.ip", "IP.src"),
        STLVmWrFlowVar("t.port", "UDP.sport"),
        STLVmWrFlowVar("down", "UDP.dport"),
        STLVmWrMaskFlowVar("low", "IP.tos", 1, 0x0C, 2),
        size=103,
    )


def fields(client):
    """To the far end, where every byte is looked at."""
    single = STLTXSingleBurst(pps=5000, total_pkts=20)
    several = STLTXMultiBurst(pps=5000, pkts_per_burst=3, ibg=1000.0, count=4)
    client.add_streams(
        [
            STLStream(name="a", packet=engine(), mode=single, next="b"),
            STLStream(name="b", packet=packet(size=1518), mode=several, self_start=False),
        ],
        ports=FAR,
    )
    client.start(ports=FAR)
    client.wait_on_traffic(ports=FAR)
    return client.get_stats()[FAR[0]]["opackets"]


def rates(client):
    """From port 0 to port 1: groups, latency, pause, another rate."""
    up = STLVmFlowVar("n", 1025, 1025, 2000, 2, 1, "inc")
    one = packet(up, STLVmWrFlowVar("n", "UDP.sport"), STLVmFixIpv4("IP"))
    client.add_streams(
        [
            STLStream(packet=one, mode=STLTXCont(pps=2000), flow_stats=STLFlowStats(5)),
            STLStream(packet=one, mode=STLTXCont(pps=500), flow_stats=STLFlowLatencyStats(7)),
        ],
        ports=PAIR,
    )
    client.start(ports=PAIR, mult="2", duration=0.4)
    client.wait_on_traffic(ports=PAIR)
    seen = {"stats": client.get_stats(), "groups": client.get_pgid_stats([5, 7])}
    client.clear_stats()
    client.start(ports=PAIR, mult="5kpps")
    time.sleep(0.1)
    client.pause(ports=PAIR)
    seen["paused"] = [client.get_stats()[0]["opackets"] for _ in range(2)]
    client.resume(ports=PAIR)
    client.update(ports=PAIR, mult="20kpps")
    time.sleep(0.2)
    client.stop(ports=PAIR)
    seen["after"] = client.get_stats()[0]["opackets"]
    return seen


def refusals(client):
    """What is not supported is an error with a word."""
    found = []
    for stream in (
        STLStream(packet=packet(size=9000), mode=STLTXCont(pps=1)),
        STLStream(packet=packet(), mode=STLTXCont(pps=1), flow_stats=STLFlowStats(9, vxlan=True)),
    ):
        try:
            client.add_streams([stream], ports=PAIR)
        except STLError as error:
            found.append(str(error))
    return found


def main():
    client = STLClient(
        server="127.0.0.1", sync_port=int(sys.argv[1]), async_port=int(sys.argv[2]),
        verbose_level="error",
    )  # fmt: skip
    client.connect()
    try:
        client.reset(ports=[0, 1, 2])
        seen = {"ports": client.get_all_ports(), "version": client.get_server_version()["mode"]}
        for part in (fields, rates, refusals):
            seen[part.__name__] = part(client)
            client.reset(ports=[0, 1, 2])
    finally:
        client.disconnect()
    print("SEEN " + json.dumps(seen, default=str))


if __name__ == "__main__":
    main()
