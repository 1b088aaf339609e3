"""Networks that mean something: a tree of prefixes of one family, and the addresses in it.

Rule: what a prefix has in common with its surroundings is copied when it is made, so that the
longest prefix of an address says everything.

Theory. Selected blocks and their exceptions, the cluster's networks and the world are nodes of one
tree, kept as a dict by (first address, length) and a sorted list of the same. All nodes and
addresses inside a prefix are a contiguous part of a sorted list. The longest prefix of an address
is found by trying the lengths in use; a node has as many as policies have written.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

from dataplane.objects.manifest import Address, Cidr
from xdp.abi import value

CIDR_FIRST = value("IDENTITY_CIDR_FIRST")
KEEP, CLUSTER = 1, 2  # roles of a prefix, inherited: sources are kept; part of the cluster
BITS = {4: 32, 6: 128}


class Node:
    """A prefix. blocks: selected blocks that it is in; sets: sets of addresses that have it."""

    __slots__ = (
        "block_hash", "blocks", "family", "kinds", "length", "number", "own_role", "refs", "role",
        "set_hash", "sets", "value",
    )  # fmt: skip

    def __init__(self, family: int, value: int, length: int) -> None:
        self.family, self.value, self.length = family, value, length
        self.refs = 0  # of policies: with any, it has an identity of its own
        self.number = 0  # that identity; 0: it has none
        self.own_role = self.role = 0
        self.blocks: set[int] = set()
        self.sets: set[int] = set()
        self.block_hash = self.set_hash = 0
        self.kinds: set[Any] = set()

    @property
    def cidr(self) -> Cidr:
        """The prefix as a network."""
        make = IPv4Network if self.family == 4 else IPv6Network
        return make((self.value, self.length))

    def __str__(self) -> str:
        return str(self.cidr)


def key(cidr: Cidr) -> tuple[int, int]:
    """Return first address and length of a network."""
    return int(cidr.network_address), cidr.prefixlen


class Family:
    """The prefixes and held addresses of a family."""

    def __init__(self, family: int) -> None:
        """The root, which is the world, is there."""
        self.family, self.bits = family, BITS[family]
        self.masks = [(1 << self.bits) - (1 << (self.bits - n)) for n in range(self.bits + 1)]
        self.nodes: dict[tuple[int, int], Node] = {}
        self._order: list[tuple[int, int]] = []
        self._counts: dict[int, int] = {}
        self._lengths: list[int] = []  # in use, longest first
        self.holders: dict[int, Any] = {}
        self._addresses: list[int] = []
        self._sorted = True
        self.add(0, 0)

    # --- prefixes ---------------------------------------------------------------------------------

    def find(self, address: int, below: int | None = None) -> Node:
        """Return the longest prefix that an address is in; below: of less bits than these."""
        for length in self._lengths:
            if below is None or length < below:
                node = self.nodes.get((address & self.masks[length], length))
                if node is not None:
                    return node
        raise AssertionError("the root is never taken away")

    def add(self, value: int, length: int) -> Node:
        """Make a node, as its surroundings are."""
        node = self.nodes[value, length] = Node(self.family, value, length)
        insort(self._order, (value, length))
        self._counts[length] = self._counts.get(length, 0) + 1
        if self._counts[length] == 1:
            self._lengths = sorted((*self._lengths, length), reverse=True)
        if length:
            parent = self.find(value, length)
            node.blocks, node.block_hash = set(parent.blocks), parent.block_hash
            node.role = parent.role
        return node

    def remove(self, node: Node) -> None:
        """Take a node away; never the root."""
        place = node.value, node.length
        del self.nodes[place]
        del self._order[bisect_left(self._order, place)]
        self._counts[node.length] -= 1
        if not self._counts[node.length]:
            self._lengths.remove(node.length)

    def subtree(self, value: int, length: int) -> Iterator[Node]:
        """Yield the nodes inside a prefix, itself among them, shorter before longer ones."""
        last = value | ((1 << self.bits) - 1) & ~self.masks[length]
        for at in range(bisect_left(self._order, (value, length)), len(self._order)):
            place = self._order[at]
            if place[0] > last:
                return
            yield self.nodes[place]

    # --- addresses --------------------------------------------------------------------------------

    def hold(self, address: int, holder: Any) -> None:
        """Say who holds an address."""
        if address not in self.holders:
            self._addresses.append(address)
            self._sorted = False
        self.holders[address] = holder

    def unhold(self, address: int) -> None:
        """Say that nobody holds an address any more."""
        del self.holders[address]
        addresses = self._in_order()
        del addresses[bisect_left(addresses, address)]

    def inside(self, value: int, length: int) -> list[int]:
        """Return the held addresses inside a prefix."""
        last = value | ((1 << self.bits) - 1) & ~self.masks[length]
        addresses = self._in_order()
        return addresses[bisect_left(addresses, value) : bisect_left(addresses, last + 1)]

    def _in_order(self) -> list[int]:
        if not self._sorted:  # nearly sorted: a pass over it
            self._addresses.sort()
            self._sorted = True
        return self._addresses


class Numbers:
    """Numbers of identities for prefixes: this node's own, the same after a restart if free."""

    def __init__(self) -> None:
        self._used: set[int] = set()

    def take(self, node: Node) -> int:
        """Return a number for a prefix."""
        text = f"{node.family} {node.value} {node.length}".encode()
        number = int.from_bytes(hashlib.blake2b(text, digest_size=3).digest(), "big")
        while number in self._used:
            number = (number + 1) & 0xFFFFFF
        self._used.add(number)
        return CIDR_FIRST + number

    def give(self, number: int) -> None:
        """Give a number back."""
        self._used.discard(number - CIDR_FIRST)


def number_of(address: Address) -> tuple[int, int]:
    """Return family and value of an address."""
    return address.version, int(address)


def address_of(family: int, number: int) -> Address:
    """Return the address of a family and value."""
    return IPv4Address(number) if family == 4 else IPv6Address(number)
