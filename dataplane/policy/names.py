"""Patterns of DNS names that policies of this node ask for, and their numbers.

Rule: a pattern without a number allows nothing, and is told as a problem.

Theory. Rules toFQDNs and rules.dns know names by the numbers of their patterns, which are rows of
shared memory (tables/names.py). A pattern is there as long as some rule asks for it. publish() has
names matched anew after a change: new patterns before the entries that ask for them, old ones gone
after. An engine that starts anew keeps the numbers that stand.
"""

from dataplane.objects.names import NamePattern
from dataplane.tables.errors import TableFull
from dataplane.tables.names import NameWriter
from xdp.abi import CONST

FIRST = CONST["FQDN_GROUP_FIRST"]


class Names:
    """Patterns in use, counted."""

    def __init__(self, writer: NameWriter | None = None) -> None:
        """writer: where patterns have their numbers; none: they have none."""
        self._writer = writer
        self._uses: dict[NamePattern, int] = {}
        self._unplaced: dict[NamePattern, str] = {}

    def use(self, one: NamePattern) -> int:
        """Return a pattern's number, in use once more; 0: it has none."""
        self._uses[one] = self._uses.get(one, 0) + 1
        if self._writer is None:
            return 0
        try:
            return self._writer.take(one.text)
        except TableFull as error:
            self._unplaced[one] = str(error)
            return 0

    def unuse(self, one: NamePattern) -> None:
        """Undo a use()."""
        self._uses[one] -= 1
        if not self._uses[one]:
            del self._uses[one]
            self._unplaced.pop(one, None)
            if self._writer is not None:
                self._writer.give(one.text)

    def keep(self) -> None:
        """Forget the patterns that stand and that nobody uses: a predecessor's."""
        if self._writer is not None:
            self._writer.keep(one.text for one in self._uses)

    def publish(self) -> bool:
        """Have names matched again if patterns have changed; return whether they have."""
        return self._writer is not None and self._writer.publish()

    def problems(self) -> list[str]:
        """Return what found no room."""
        whys = sorted(set(self._unplaced.values()))
        return [f"{len(self._unplaced)} DNS names allow nothing: {why}" for why in whys[:1]]
