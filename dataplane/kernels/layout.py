"""Where the members of struct connection stand, for kernels that work by memory address.

Rule: nothing here is a number: all follows from xdp/abi.h.

Theory. The table of connections and the events about them (connections.py, events.py) read the same
records; this is what both know of them.
"""

from xdp.abi import DTYPE


def offset_of(struct: str, field: str) -> int:
    """Return the offset of a structure's member."""
    fields = DTYPE[struct].fields
    assert fields is not None
    return int(fields[field][1])


def offset(field: str) -> int:
    """Return the offset of a member of struct connection."""
    return offset_of("connection", field)


LINE = 64  # the reply's tuple stands one cache line behind the original direction's
WORD = offset("word")
STATE = offset("state")
FLAGS = offset("flags")
TCP_SEEN = offset("tcp_original")
PACKETS = offset("packets_original")
CREATED = offset("created")
