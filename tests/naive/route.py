"""Longest prefix match, slowly: twin of kernels/route.py.

Rule: all prefixes are tried; the longest that holds the address wins.

Theory. The definition of RFC 1812 5.2.4.3, in the terms of the ipaddress module.
"""

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network


def longest(
    routes: Mapping[IPv4Network | IPv6Network, int], address: IPv4Address | IPv6Address
) -> int:
    """Return what the longest matching prefix maps to, 0 when none matches."""
    matching = [network for network in routes if address in network]
    if not matching:
        return 0
    return routes[max(matching, key=lambda network: network.prefixlen)]
