"""The arithmetic of one pool: which addresses pods may have, and which comes next.

Rule: pure; never enumerates a network (an IPv6 pool has more addresses than memory).

Theory. Of IPv4 the network and broadcast addresses are left out, of IPv6 the subnet-router anycast
address (RFC 4291 2.6.1); reserved addresses (the router's) too. Fresh addresses are handed out in
order; when the end is reached, those released longest ago come again, after a rest, so that stale
connections and caches do not meet a new pod.
"""

from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address

from ipam.errors import PoolRefused
from ipam.model import Address, Cidr


def bounds(cidr: Cidr) -> tuple[int, int]:
    """Return the first and last usable address as integers; empty when last < first."""
    first, last = int(cidr.network_address), int(cidr.broadcast_address)
    if cidr.prefixlen >= cidr.max_prefixlen - 1:
        return first, last
    return first + 1, last - (1 if cidr.version == 4 else 0)


def router_address(cidr: Cidr) -> Address:
    """Return the pods' gateway: the first usable address of a pod CIDR."""
    return type(cidr.network_address)(bounds(cidr)[0])


def check(cidr: Cidr, family: int, reserved: Collection[Address]) -> None:
    """Raise PoolRefused for a pool of the wrong family or without an address for a pod."""
    if cidr.version != family:
        raise PoolRefused(f"pool {cidr} stands under family {family}, it is IPv{cidr.version}")
    if size(cidr, reserved) < 1:
        raise PoolRefused(
            f"pool {cidr} has no address for a pod besides the router's: a node CIDR must be /30 "
            "or larger in IPv4, /126 or larger in IPv6"
        )


def size(cidr: Cidr, reserved: Collection[Address]) -> int:
    """Return how many pods the pool has addresses for."""
    first, last = bounds(cidr)
    inside = {a for a in reserved if a.version == cidr.version and first <= int(a) <= last}
    return max(0, last - first + 1 - len(inside))


def following(cidr: Cidr, after: int | None, taken: Collection[int]) -> Address | None:
    """Return the first address behind `after` that is not taken; None at the end of the pool."""
    first, last = bounds(cidr)
    candidate = first if after is None or after < first else after + 1
    while candidate <= last:
        if candidate not in taken:
            return IPv4Address(candidate) if cidr.version == 4 else IPv6Address(candidate)
        candidate += 1
    return None
