"""Services, slowly: twin of kernels/service.py, without session affinity.

Rule: tables are read as xdp/abi.h says, with Python's integers, one word at a time.

Theory. A frontend is found by trying every slot of its run; which of the two lists counts depends
on where the client is; a Maglev table has the say where there is one.
"""

from ipaddress import ip_address

from dataplane.tables.shm import Shm
from xdp.abi import CONST, value

MASK64 = (1 << 64) - 1
SLOTS = CONST["FRONTEND_SLOTS"]
EMPTY, USED = value("SLOT_EMPTY"), value("SLOT_USED")
BACKEND_EMPTY = value("BACKEND_EMPTY")
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132, "any": 0}


def mix(hi: int, lo: int, port: int, protocol: int) -> int:
    """Hash of a frontend, as the module of the table says it."""
    h = (hi * 0x9E3779B97F4A7C15) & MASK64
    h ^= (lo * 0xC2B2AE3D27D4EB4F) & MASK64
    h ^= ((port << 8 | protocol) * 0xD6E8FEB86659FD93) & MASK64
    h ^= h >> 32
    h = (h * 0x9E3779B97F4A7C15) & MASK64
    return h ^ (h >> 29)


def find(shm: Shm, hi: int, lo: int, port: int, protocol: int) -> int:
    """Row of the service behind a frontend, 0: none."""
    first = mix(hi, lo, port, protocol)
    for probe in range(CONST["FRONTEND_PROBES_MAX"]):
        row = shm.frontends[(first + probe) % SLOTS]
        if row["state"] == EMPTY:
            return 0
        if row["state"] != USED:
            continue
        if (int(row["hi"]), int(row["lo"])) == (hi, lo):
            if (int(row["port"]), int(row["protocol"])) == (port, protocol):
                return int(row["service"])
    return 0


def may_come(shm: Shm, service: int, hi: int, lo: int) -> bool:
    """Whether a client outside may use a service, by its source ranges."""
    word = int(shm.services[service]["sources"])
    if word == 0:
        return True
    for n in range(word >> 32, (word >> 32) + (word & 0xFFFFFFFF)):
        row = shm.source_ranges[n]
        if hi & int(row["mask_hi"]) == int(row["hi"]) and lo & int(row["mask_lo"]) == int(
            row["lo"]
        ):
            return True
    return False


def choose(shm: Shm, service: int, outside: bool, flow_hash: int) -> int:
    """Row of the backend of a new connection, 0: none."""
    row = shm.services[service]
    side = "outside" if outside else "inside"
    part, table = int(row[side]), int(row[f"{side}_table"])
    count = part & 0xFFFFFFFF
    if count == 0:
        return 0
    number = flow_hash >> 32
    if table:
        backend = int(shm.maglev[(table >> 32) + number % (table & 0xFFFFFFFF)])
    else:
        backend = int(shm.backend_lists[(part >> 32) + number % count])
    return 0 if shm.backends[backend]["state"] == BACKEND_EMPTY else backend


def reach(
    shm: Shm, address: str, port: int, protocol: str, outside: bool = False, flow_hash: int = 0
) -> str:
    """Say what a packet meets: "10.0.0.1:80", "" for no frontend, "none" for no backend."""
    number = int(ip_address(address))
    service = find(shm, number >> 64, number & MASK64, port, PROTOCOLS[protocol])
    if not service:
        return ""
    backend = choose(shm, service, outside, flow_hash)
    if not backend:
        return "none"
    row = shm.backends[backend]
    hi, lo = int(row["hi"]), int(row["lo"])
    kind = 4 if hi == 0 and lo < 1 << 32 else 16
    target = ip_address((hi << 64 | lo).to_bytes(16, "big")[16 - kind :])
    return f"{target}:{int(row['port'])}"
