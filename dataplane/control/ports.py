"""Ranges of ports: the kernel's ip_local_reserved_ports and what we add to it.

Rule: what stood there before us stays, and goes on standing there after us.

Theory. The kernel gives no socket a port of its own choice from the reserved ones; who binds to
one by name still gets it (ip-sysctl.rst). We add NodePorts and the ports of masquerading. What we
added, and only that, is kept in a record beside the tables, so cleaning up takes away no more; as
the record is written first, a crash between the two leaves nothing that is not known.
"""

from collections.abc import Iterable

from dataplane.control.model import Ranges


def parse(text: str) -> Ranges:
    """Read a list such as 80,3000-3010; empty: none. Raises ValueError."""
    found = []
    for part in text.replace("\n", "").split(","):
        if part.strip():
            first, _, last = part.partition("-")
            found.append((int(first), int(last or first)))
    return merged(found)


def shown(ranges: Ranges) -> str:
    """Write a list as the kernel does."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges in order, those that touch as one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def without(ranges: Ranges, other: Ranges) -> Ranges:
    """Return what of `ranges` is not in `other`."""
    left = list(ranges)
    for first, last in other:
        cut = []
        for a, b in left:
            if b < first or a > last:
                cut.append((a, b))
                continue
            if a < first:
                cut.append((a, first - 1))
            if b > last:
                cut.append((last + 1, b))
        left = cut
    return merged(left)
