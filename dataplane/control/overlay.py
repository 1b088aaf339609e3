"""Numbers of the overlay: MACs, overheads, MTU.

Rule: what two nodes must agree on without talking is computed here, from the Node objects alone.

Theory. The inner destination MAC of a node is its annotation penstock.io/vtep-mac, or derived
from its underlay address: 02:50 and four bytes (the IPv4 address, or a digest of the IPv6
address). The path MTU is the uplink's less what the tunnel adds: 14 inner Ethernet, 8 VXLAN or
Geneve, 8 UDP, and 20 or 40 of IP: 50 or 70 bytes.
"""

import hashlib

from dataplane.objects.core import MAC_ANNOTATION, Node
from dataplane.objects.manifest import Address, ManifestError
from xdp.abi import value

OVERHEAD = {4: 50, 6: 70}
TUNNELS = {"vxlan": value("TUNNEL_VXLAN"), "geneve": value("TUNNEL_GENEVE")}


def vtep_mac(node: Node, underlay: Address) -> bytes:
    """Return the MAC of a node in the overlay. Raises ManifestError for a bad annotation."""
    given = node.annotations.get(MAC_ANNOTATION)
    if given:
        try:
            raw = bytes.fromhex(given.replace(":", ""))
        except ValueError:
            raw = b""
        if len(raw) != 6 or raw[0] & 1:
            raise ManifestError(f"Node {node.name}: {MAC_ANNOTATION} {given!r} is no unicast MAC")
        return raw
    if underlay.version == 4:
        return b"\x02\x50" + underlay.packed
    return b"\x02\x50" + hashlib.blake2s(underlay.packed, digest_size=4).digest()


def path_mtu(uplink_mtu: int, underlay_family: int | None, configured: int) -> int:
    """Return the largest IP packet between nodes; underlay_family None: no tunnel."""
    possible = uplink_mtu - (OVERHEAD[underlay_family] if underlay_family else 0)
    return min(configured, possible) if configured else possible
