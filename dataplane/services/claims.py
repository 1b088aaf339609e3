"""Who has which frontend.

Rule: of those who want a frontend the one that sorts first has it, whoever came first here.

Theory. The order is rank, then age of the object, then name, so every node decides alike, also
after a restart. Almost every frontend is wanted once; the others are kept as short sorted lists,
and told as problems. Addresses as such (port 0) are shared by all ports of all services: that is
no conflict.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from dataplane.services.model import family_of
from dataplane.tables.frontends import Key

NO_AGE = "~"  # sorts behind every time: who says when it was made was there first
PROTOCOL_NAMES = {6: "TCP", 17: "UDP", 132: "SCTP"}


@dataclass(frozen=True, order=True, slots=True)
class Wish:
    """A claim with what decides about it. owner: what people call it."""

    rank: int
    created: str
    owner: str
    row: str


class Claims:
    """All wishes, by frontend."""

    def __init__(self) -> None:
        """Nobody wants anything yet."""
        self._wishes: dict[Key, list[Wish]] = {}
        self._contested: set[Key] = set()
        self.touched: set[Key] = set()

    def add(self, key: Key, wish: Wish) -> None:
        """Add a wish."""
        wishes = self._wishes.setdefault(key, [])
        insort(wishes, wish)
        self._note(key, wishes)

    def remove(self, key: Key, wish: Wish) -> None:
        """Take a wish back."""
        wishes = self._wishes[key]
        wishes.remove(wish)
        self._note(key, wishes)
        if not wishes:
            del self._wishes[key]

    def _note(self, key: Key, wishes: list[Wish]) -> None:
        self.touched.add(key)
        if len(wishes) > 1 and key[3]:
            self._contested.add(key)
        else:
            self._contested.discard(key)

    def row(self, key: Key) -> str:
        """Return the row that a frontend shall lead to; empty: nobody wants it."""
        wishes = self._wishes.get(key)
        return wishes[0].row if wishes else ""

    def wanted(self) -> Iterable[Key]:
        """Return every frontend that somebody wants."""
        return self._wishes

    def problems(self) -> list[str]:
        """Return who has lost to whom."""
        found = []
        for key in sorted(self._contested):
            first, *others = self._wishes[key]
            found += [
                f"{other.owner} wants {shown(key)}, but {first.owner} has it"
                for other in others
                if other.owner != first.owner
            ]
        return found


def shown(key: Key) -> str:
    """Return a frontend as people write it: 192.0.2.1:80/TCP, [2001:db8::1]:53/UDP."""
    hi, lo, port, protocol = key
    if family_of(hi, lo) == 4:
        text = str(IPv4Address(lo))
    else:
        six = str(IPv6Address(hi << 64 | lo))
        text = f"[{six}]" if protocol else six
    if not protocol:
        return text
    return f"{text}:{port}/{PROTOCOL_NAMES.get(protocol, protocol)}"
