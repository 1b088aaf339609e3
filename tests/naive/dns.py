"""DNS messages read slowly: labels as Python objects, one question, one chain of names.

What RFC 1035 leaves open is answered as dataplane/kernels/dns_message.py says at its top.
"""

import struct
from dataclasses import dataclass, field

CHARACTERS = frozenset(b"-_0123456789abcdefghijklmnopqrstuvwxyz")
A, CNAME, AAAA = 1, 5, 28
POINTERS, STEPS, CHAIN = 32, 128 + 2 * 32, 16


class Malformed(Exception):
    """Nobody can say what this means."""


@dataclass
class Name:
    """labels: lower case; end: offset behind it where it stands."""

    labels: tuple[bytes, ...]
    end: int

    @property
    def wire(self) -> bytes:
        return b"".join(bytes([len(label)]) + label for label in self.labels) + b"\0"

    @property
    def odd(self) -> bool:
        return not CHARACTERS.issuperset(b"".join(self.labels))

    def __str__(self) -> str:
        return b".".join(self.labels).decode("latin-1") + "."


@dataclass
class Question:
    id: int
    flags: int
    name: Name
    type: int
    klass: int
    records: int  # of the answer section, which begins at `end`
    end: int


@dataclass
class Found:
    """Where a question leads."""

    addresses: list[tuple[int, int]] = field(default_factory=list)  # family, value
    cnames: int = 0
    ttl: int = 2**31 - 1


def pointer(data: bytes, at: int, before: int) -> int:
    """Where the pointer at an offset leads."""
    if at + 2 > len(data):
        raise Malformed("half a pointer")
    target = struct.unpack_from(">H", data, at)[0] & 0x3FFF
    if not 12 <= target < before:
        raise Malformed(f"a pointer to {target}")
    return target


def label(data: bytes, at: int) -> bytes:
    if at >= len(data) or data[at] > 63 or at + 1 + data[at] > len(data):
        raise Malformed(f"no label at {at}")
    return data[at + 1 : at + 1 + data[at]]


def name(data: bytes, at: int) -> Name:
    """The name at an offset."""
    labels: list[bytes] = []
    end, before, pointers = None, at, 0
    while True:
        if at >= len(data):
            raise Malformed("the end")
        if data[at] >= 0xC0:
            pointers += 1
            end = end or at + 2
            at = before = pointer(data, at, before)
            continue
        one = label(data, at)
        at += 1 + len(one)
        if not one:
            break
        labels.append(one.lower())
        if sum(len(label) + 1 for label in labels) >= 255:
            raise Malformed("a long name")
    if len(labels) + 1 + pointers > 128 + POINTERS:
        raise Malformed("too many steps")
    return Name(tuple(labels), end or at)


def behind(data: bytes, at: int) -> int:
    """The offset behind a name that is not looked at."""
    length = 0
    while True:
        if at < len(data) and data[at] >= 0xC0:
            if at + 2 > len(data):
                raise Malformed("half a pointer")
            return at + 2
        one = label(data, at)
        at, length = at + 1 + len(one), length + 1 + len(one)
        if length > 255:
            raise Malformed("a long name")
        if not one:
            return at


def same(data: bytes, one: int, other: int) -> bool:
    """Whether two names are the same; a step is a pointer or a pair of labels."""
    places, limits = [one, other], [one, other]
    for _ in range(STEPS):
        if places[0] == places[1]:
            return True
        if max(places) >= len(data):
            return False
        pointing = [n for n in (0, 1) if data[places[n]] >= 0xC0]
        try:
            if pointing:
                n = pointing[0]
                places[n] = limits[n] = pointer(data, places[n], limits[n])
                continue
            left, right = (label(data, at) for at in places)
        except Malformed:
            return False
        if left.lower() != right.lower():
            return False
        if not left:
            return True
        places = [at + 1 + len(left) for at in places]
    return False


def question(data: bytes) -> Question:
    """The one question of a message."""
    if len(data) < 12:
        raise Malformed("no header")
    number, flags, questions, records, _, _ = struct.unpack_from(">6H", data)
    if questions != 1:
        raise Malformed(f"{questions} questions")
    found = name(data, 12)
    if found.end + 4 > len(data):
        raise Malformed("half a question")
    kind, klass = struct.unpack_from(">HH", data, found.end)
    return Question(number, flags, found, kind, klass, records, found.end + 4)


def leads_to(data: bytes, asked: Question) -> Found:
    """The addresses that an answer gives for its question."""
    found, owner = Found(), 12
    records = list(_records(data, asked))
    for _ in range(CHAIN + 1):
        missed = again = False
        found.addresses.clear()
        for start, kind, klass, ttl, at, length in records:
            if klass != 1 or kind not in (A, AAAA, CNAME):
                continue
            if not same(data, start, owner):
                missed = True
                continue
            found.ttl = min(found.ttl, ttl if ttl < 2**31 else 0)
            if kind == CNAME:
                found.cnames += 1
                if found.cnames > CHAIN:
                    raise Malformed("a long chain")
                owner, again = at, again or missed
            else:
                value = int.from_bytes(data[at : at + length], "big")
                found.addresses.append((4 if kind == A else 6, value))
        if not again:
            break
    return found


def _records(data: bytes, asked: Question):
    at = asked.end
    for _ in range(asked.records):
        start = at
        at = behind(data, at)
        if at + 10 > len(data):
            raise Malformed("half a record")
        kind, klass, ttl, length = struct.unpack_from(">HHIH", data, at)
        at += 10 + length
        if at > len(data):
            raise Malformed("half a record's data")
        if klass == 1 and kind in (A, AAAA) and length != (4 if kind == A else 16):
            raise Malformed("an address of the wrong length")
        if klass == 1 and kind == CNAME and behind(data, at - length) != at:
            raise Malformed("something behind a CNAME")
        yield start, kind, klass, ttl, at - length, length
