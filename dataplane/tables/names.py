"""The one writer of name patterns: the selectors by which policies know DNS names.

Rule: a pattern's row is its number; a row that is in use is not changed, and rests before it is
another pattern's; what readers find by it changes its meaning only with `generation`.

Theory. A pattern is found by the hash of its literal end (kernels/dns_names.py computes the same
hash of a name's ends; a test compares). Rows and slots are written first, `generation` last: names
that were matched before it are matched again by whoever needs them next. After a restart patterns
are read back, so numbers stay what policy entries say. Names and learned addresses are the
workers'; `setting` is the configuration's.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import numpy as np

from dataplane.tables.errors import TableFull
from dataplane.tables.policies import Numbers
from dataplane.tables.shm import Shm
from xdp.abi import CONST, value

MASK64 = (1 << 64) - 1
MIX = 0x9E3779B97F4A7C15
SLOTS_MASK = CONST["NAME_PATTERN_SLOTS"] - 1
PROBES = CONST["NAME_PROBES_MAX"]
DEEP, ANY = CONST["PATTERN_DEEP"], CONST["PATTERN_ANY"]
NXDOMAIN, BY_IDENTITY = CONST["NAMING_NXDOMAIN"], CONST["NAMING_BY_IDENTITY"]
EMPTY, USED, DELETED = value("SLOT_EMPTY"), value("SLOT_USED"), value("SLOT_DELETED")
FIX = "fewer distinct names in toFQDNs and rules.dns"


@dataclass(frozen=True)
class NamingOptions:
    """How names are treated. Values as in the configuration's section `dns`."""

    nxdomain: bool = False
    by_identity: bool = False
    least_s: int = 0
    grace_s: int = 60
    addresses_most: int = 1000
    domain: str = "cluster.local"  # at most 62 characters; "": none


def wire(labels: Iterable[str]) -> bytes:
    """Return labels as on the wire, without the root."""
    return b"".join(bytes([len(label)]) + label.encode() for label in labels)


def hash_labels(labels: Iterable[bytes], seed: int) -> int:
    """Return the hash of a name of these labels; of the root: the seed."""
    hashed = seed
    for label in reversed(list(labels)):
        data = bytes([len(label)]) + label
        for at in range(0, len(data), 8):
            word = int.from_bytes(data[at : at + 8], "little")
            hashed = (hashed ^ word) * MIX & MASK64
            hashed ^= hashed >> 32
    return hashed


def spelled(text: bytes) -> str:
    """Return a name that stands on the wire as people write it, with a dot at its end.

    Bytes that are none of a host name's are escaped (RFC 1035 5.1).
    """
    labels, at = [], 0
    while at < len(text) and text[at]:
        label = text[at + 1 : at + 1 + text[at]]
        labels.append("".join(_character(byte) for byte in label))
        at += 1 + text[at]
    return ".".join(labels) + "."


def _character(byte: int) -> str:
    if byte in b'."\\();@$':
        return "\\" + chr(byte)
    return chr(byte) if 0x21 <= byte <= 0x7E else f"\\{byte:03}"


@dataclass(frozen=True, slots=True)
class Shape:
    """A pattern as names are compared with it. literal: labels at its end without a star."""

    labels: tuple[str, ...]
    literal: int
    deep: bool
    any: bool


def shape(text: str) -> Shape:
    """Return the shape of a pattern in its one spelling (objects/names.py)."""
    if text == "*":
        return Shape((), 0, False, True)
    deep = text.startswith("**.")
    labels = tuple(text.removeprefix("**.").split("."))
    stars = [n for n, label in enumerate(labels) if "*" in label]
    return Shape(labels, len(labels) - 1 - stars[-1] if stars else len(labels), deep, False)


def pattern_of(row: np.void) -> str:
    """Return the pattern of a row of name_patterns, as it is spelled."""
    flags = int(row["flags"])
    if flags & ANY:
        return "*"
    text = spelled(row["text"].tobytes()[: int(row["length"])]).removesuffix(".")
    return ("**." if flags & DEEP else "") + text


class NameWriter:
    """Writer of patterns and settings in a writable Shm."""

    def __init__(self, shm: Shm, clock: Callable[[], float] = time.monotonic) -> None:
        """Read back what stands."""
        self.shm = shm
        self._rows: dict[str, int] = {}
        if shm.writable and not shm.naming[0]["seed"]:
            shm.naming[0]["seed"] = secrets.randbits(64) | 1
            shm.naming[0]["generation"] = 1
        for row in np.flatnonzero(shm.name_patterns["state"] == USED).tolist():
            self._rows[pattern_of(shm.name_patterns[row])] = row
        span = range(1, CONST["NAME_PATTERNS_MAX"])
        self._numbers = Numbers("row for a name pattern", FIX, self._rows.values(), span, clock)
        self._changed = False

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Mapping[str, int]:
        """Patterns that stand -> their numbers."""
        return self._rows

    def take(self, one: str) -> int:
        """Return the number of a pattern, written where it does not stand. Raises TableFull."""
        known = self._rows.get(one)
        if known is not None:
            return known
        found = shape(one)
        labels = found.labels
        literal = [label.encode() for label in labels[len(labels) - found.literal :]]
        hashed = hash_labels(literal, int(self.shm.naming[0]["seed"]))
        slot = self._free_slot(hashed, one)
        row = self._numbers.take()
        text = wire(labels)
        place = self.shm.name_patterns[row]
        place["hash"], place["literal"], place["labels"] = hashed, found.literal, len(labels)
        place["flags"] = DEEP * found.deep | ANY * found.any
        place["length"] = len(text)
        place["text"][: len(text)] = np.frombuffer(text, np.uint8)
        place["state"] = USED
        entry = self.shm.name_pattern_slots[slot]
        entry["hash"], entry["row"] = hashed, row
        entry["state"] = USED
        self.shm.naming[0]["depths"][found.literal >> 6] |= np.uint64(1 << (found.literal & 63))
        self._rows[one] = row
        self._changed = True
        return row

    def _free_slot(self, hashed: int, one: str) -> int:
        for probe in range(PROBES):
            slot = (hashed + probe) & SLOTS_MASK
            if self.shm.name_pattern_slots[slot]["state"] != USED:
                return slot
        raise TableFull(
            f"no slot within {PROBES} probes (NAME_PROBES_MAX) for the name pattern {one}: fewer "
            "patterns that end in the same labels"
        )

    def give(self, one: str) -> None:
        """Forget a pattern."""
        row = self._rows.pop(one, None)
        if row is None:
            return
        hashed = int(self.shm.name_patterns[row]["hash"])
        for probe in range(PROBES):
            slot = (hashed + probe) & SLOTS_MASK
            found = self.shm.name_pattern_slots[slot]
            if found["state"] == USED and int(found["row"]) == row:
                after = self.shm.name_pattern_slots[(slot + 1) & SLOTS_MASK]["state"]
                found["state"] = EMPTY if after == EMPTY else DELETED
                break
        self.shm.name_patterns[row]["state"] = DELETED
        self._numbers.give(row)
        self._changed = True

    def keep(self, wanted: Iterable[str]) -> bool:
        """Forget all but these; return whether there were others."""
        gone = self._rows.keys() - set(wanted)
        for one in gone:
            self.give(one)
        return bool(gone)

    def publish(self) -> bool:
        """Have names matched again if patterns have changed; return whether they have."""
        changed, self._changed = self._changed, False
        if changed:
            depths = [0, 0]
            for literal in {shape(one).literal for one in self._rows}:
                depths[literal >> 6] |= 1 << (literal & 63)
            self.shm.naming[0]["depths"] = depths
            self.shm.naming[0]["generation"] += 1
        return changed

    def configure(self, options: NamingOptions) -> None:
        """Write how names are treated."""
        labels = options.domain.split(".") if options.domain else []
        domain = wire(labels)
        row = self.shm.naming[0]
        row["least_s"], row["grace_s"] = options.least_s, options.grace_s
        row["addresses_most"] = options.addresses_most
        row["flags"] = NXDOMAIN * options.nxdomain | BY_IDENTITY * options.by_identity
        row["domain_length"] = 0  # nobody compares with half of it
        row["domain"][: len(domain)] = np.frombuffer(domain, np.uint8)
        row["domain_labels"] = len(labels)
        row["domain_length"] = len(domain)

    def set_proxy(self, addresses: Mapping[int, IPv4Address | IPv6Address]) -> None:
        """Say by which addresses, one a family, the route to the DNS proxy is found; none: away."""
        row, six = self.shm.naming[0], int(addresses.get(6, 0))
        row["proxy4"] = int(addresses.get(4, 0))
        row["proxy6_hi"], row["proxy6_lo"] = six >> 64, six & MASK64
