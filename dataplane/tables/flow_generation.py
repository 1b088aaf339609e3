"""The agent's word in the flow table's generation.

Rule: whoever has changed a table advances the generation afterwards, before it says that the change
is in force.

Theory. XDP forwards established flows by itself, from entries that hold for the sum of two words of
the forwarder's `steering` map (xdp/abi.h). One is the forwarder's, this one is the agent's: so a
change of policy stops flows at once, though every worker sleeps, and though no forwarder runs to
be told. The forwarder writes the map's number into the tables, and the agent maps its memory.
"""

import os
import threading

import numpy as np

from dataplane.tables.shm import Shm
from xdp.abi import DTYPE
from xdp.errors import KernelError

_ADVANCING = threading.Lock()  # a word that went back would make old entries good again


class FlowGeneration:
    """Advances the generation of the present forwarder's flow table."""

    def __init__(self, shm: Shm) -> None:
        """shm: the node's tables."""
        self._shm = shm
        self._number = 0
        self._row: np.ndarray | None = None

    def advance(self) -> None:
        """Make every entry stale. Without a map there is no entry."""
        with _ADVANCING:
            number = int(self._shm.control[0]["steering_map"])
            if number != self._number:
                self._row, self._number = _open(number), number
            if self._row is not None:
                self._row["flow_tables"] += 1


def _open(number: int) -> np.ndarray | None:
    """Map steering[1]; None: no forwarder has run, or its map has gone with its programs."""
    from xdp.maps import Map, open_by_id  # not for readers of tables: it loads libbpf

    if number == 0:
        return None
    try:
        fd = open_by_id(number)
    except KernelError:
        return None
    try:
        return Map.taken(fd).mmap(DTYPE["steering"])
    finally:
        os.close(fd)
