"""What the uplink's XDP program takes from the wire, and the heartbeat that keeps it doing so.

Rule: without a fresh heartbeat the uplink passes everything to the kernel; the node's own traffic
never depends on us.

Theory. The single value of the map "steering" is mmapped: writing it takes no system call and the
program sees it with its next packet. The agent says what to steer in RUN_DIR/shm/steering.json
(written atomically), because addresses and prefixes of the node are its business; the forwarder
alone vouches for itself with the heartbeat.
"""

import ipaddress
import json
import time
from pathlib import Path

import numpy as np

from xdp.abi import CONST, DTYPE

FILE = "steering.json"


class Steering:
    """Writer of the mmapped steering value."""

    def __init__(self, row: np.ndarray, file: Path, watchdog_ms: int) -> None:
        """row: steering[1], the mmapped map; watchdog_ms: heartbeat timeout, 0 for never."""
        assert row.dtype == DTYPE["steering"], f"not a steering map: {row.dtype}"
        self._row = row[0]
        self._file = file
        self.error = ""
        self.beat()
        self._row["timeout_ns"] = watchdog_ms * 1_000_000

    def beat(self) -> None:
        """Say that the forwarder is alive."""
        self._row["heartbeat_ns"] = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

    def sync(self) -> None:
        """Follow the agent's file; a missing or broken one leaves what stands, and `error` set."""
        try:
            wanted = json.loads(self._file.read_text())
            locals_ = [ipaddress.ip_address(text) for text in wanted["locals"]]
            prefixes = [ipaddress.ip_network(text) for text in wanted["prefixes"]]
            port = int(wanted["tunnel_port"])
            nat = [ipaddress.ip_address(text) for text in wanted["nat"]]
        except FileNotFoundError:
            self.error = f"{self._file} is not there yet: the agent has not run"
            return
        except (ValueError, KeyError, TypeError) as error:
            self.error = f"{self._file}: {error}; the steering that stands is kept"
            return
        self.error = self._write(port, locals_, prefixes, nat)

    def _write(self, port: int, locals_: list, prefixes: list, nat: list) -> str:
        row = self._row
        over = ""
        for family, size in ((4, 4), (6, 16)):
            mine = [address for address in locals_ if address.version == family]
            if len(mine) > CONST["LOCALS_MAX"]:
                over = f"{len(mine)} underlay addresses of family {family}, limit 32: rest ignored"
                mine = mine[: CONST["LOCALS_MAX"]]
            raw = np.frombuffer(b"".join(address.packed for address in mine), np.uint8)
            if family == 4:
                row["local4_be"].view(np.uint8)[: len(raw)] = raw
            else:
                row["local6"][: len(raw)] = raw
            row[f"local{family}_count"] = len(mine)
            nets = [net for net in prefixes if net.version == family][: CONST["PREFIXES_MAX"]]
            for index, net in enumerate(nets):
                entry = row[f"prefix{family}"][index]
                entry["address"][:size] = np.frombuffer(net.network_address.packed, np.uint8)
                entry["mask"][:size] = np.frombuffer(net.netmask.packed, np.uint8)
            row[f"prefix{family}_count"] = len(nets)
        four, six = (next((ip for ip in nat if ip.version == version), None) for version in (4, 6))
        row["nat4_be"] = int.from_bytes(four.packed, "little") if four else 0
        row["nat6"][:] = np.frombuffer(six.packed if six else bytes(16), np.uint8)
        row["tunnel_port_be"] = int.from_bytes(port.to_bytes(2, "big"), "little")
        return over

    def clear(self) -> None:
        """Steer nothing: the last act before the forwarder lets go of the uplinks."""
        self._row["timeout_ns"] = 1
        self._row["heartbeat_ns"] = 0
