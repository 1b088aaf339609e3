"""Leases and pools as values.

Rule: frozen; times are seconds of the epoch.

Theory. The key of a lease is what CNI calls an attachment: (network, container id, interface).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

Address = IPv4Address | IPv6Address
Cidr = IPv4Network | IPv6Network
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Lease:
    """The addresses of one attachment, by family."""

    key: Key
    addresses: Mapping[int, Address]
    created: float
    owner: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = ", ".join(str(address) for _, address in sorted(self.addresses.items()))
        return f"{text} for {'/'.join(self.key)}"
