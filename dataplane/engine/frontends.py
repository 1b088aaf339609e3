"""Which services uplinks take packets for: the BPF map `frontends`, kept in line with the tables.

Rule: an uplink takes what clients outside may ask for, and nothing else; a ClusterIP is not of it.

Theory. The agent counts changes in control.frontends_generation; the forwarder then reads all
frontends whose service is for outside, compares with what the map has, and makes only the
differences. Additions come before deletions, so nothing is missing meanwhile. The count in the
steering row lets the XDP program pass over the map while it is empty.
"""

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import CONST, DTYPE, value
from xdp.errors import XdpError
from xdp.maps import Map

USED = value("SLOT_USED")
CLUSTER_IP = CONST["SERVICE_CLUSTER_IP"]
KEY_BYTES = DTYPE["frontend_key"].itemsize
TAKEN = 1


class SteeredFrontends:
    """Keeper of the map."""

    def __init__(self, entries: Map, row: np.ndarray, shm: Shm) -> None:
        """entries: the map `frontends`, empty; row: steering[1], the mmapped map."""
        assert entries.key_size == KEY_BYTES, f"not a map of frontends: {entries.key_size} bytes"
        self._entries, self._row, self._shm = entries, row[0], shm
        self._stands: set[bytes] = set()
        self._generation = -1
        self._row["frontend_count"] = 0
        self.error = ""

    def __len__(self) -> int:
        return len(self._stands)

    def sync(self) -> bool:
        """Follow the tables if they changed; return whether the map changed. See `error`."""
        generation = int(self._shm.control[0]["frontends_generation"])
        if generation == self._generation and not self.error:
            return False
        wanted = steered(self._shm)
        fresh, gone = wanted - self._stands, self._stands - wanted
        try:
            for key in fresh:
                self._entries.update(key, TAKEN)
                self._stands.add(key)
            self._row["frontend_count"] = len(self._stands)
            for key in gone:
                self._entries.delete(key)
                self._stands.discard(key)
            self.error = ""
            self._generation = generation
        except XdpError as error:
            self.error = f"uplinks do not take packets for all services: {error}"
        self._row["frontend_count"] = len(self._stands)
        return bool(fresh or gone)


def steered(shm: Shm) -> set[bytes]:
    """Return the keys that should be in the map, as struct frontend_key."""
    found: set[bytes] = set()
    for first, end in shm.extents("frontends"):
        part = shm.frontends[first:end]
        rows = part[part["state"] == USED]
        flags = shm.services["flags"][rows["service"]]
        rows = rows[flags & CLUSTER_IP == 0]
        raw = _keys(rows).tobytes()
        found.update(raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES))
    return found


def _keys(rows: np.ndarray) -> np.ndarray:
    keys = np.zeros(len(rows), DTYPE["frontend_key"])
    is_four = (rows["hi"] == 0) & (rows["lo"] < 1 << 32)
    four = rows["lo"][is_four].astype(">u4").view(np.uint8).reshape(-1, 4)
    keys["address"][np.flatnonzero(is_four)[:, None], np.arange(4)] = four
    halves = np.stack([rows["hi"][~is_four], rows["lo"][~is_four]], axis=1)
    keys["address"][~is_four] = halves.astype(">u8").view(np.uint8).reshape(-1, 16)
    keys["port_be"] = rows["port"].astype(">u2").view("<u2")
    keys["protocol"] = rows["protocol"]
    keys["family"] = np.where(is_four, 4, 6)
    return keys
