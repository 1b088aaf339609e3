"""What rules say of one group of peers: a chain of entries, in the kernel's terms.

Rule: the first entry that a lookup hits, from the longest port prefix down to "any protocol", says
what all rules of the chain together say.

Theory. A range of ports becomes prefixes (at most 30). A code is match << 16 | port, the part of
an entry that row and group are not in (xdp/abi.h). Where entries overlap, the verdict of the
shorter one is folded into the longer: deny wins, then allow; between rules that say the same, the
lower rule number names it. Names that may be asked for (rules.dns) are looked at where some rule
asks for it, and restricted where all do; each is an entry of its own, with its selector in the
code. An entry that says no more than the shorter one behind it is left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from dataplane.objects.policies import ANY_PROTOCOL, PortMatch
from xdp.abi import CONST

ALLOW, DENY = CONST["POLICY_ALLOW"], CONST["POLICY_DENY"]
ACTION = CONST["POLICY_ACTION_MASK"]
LOG, RULE_SHIFT = CONST["POLICY_LOG"], CONST["POLICY_RULE_SHIFT"]
ANSWER_SHIFT = CONST["POLICY_ANSWER_SHIFT"]
NAMES, NAMES_ONLY = CONST["POLICY_NAMES"], CONST["POLICY_NAMES_ONLY"]
ASKS = LOG | NAMES | NAMES_ONLY
ANY_BIT = 1 << CONST["POLICY_DEPTH_ANY"]
EXACT = 16  # bits of a port
_DIRECTION = 1 << 23  # of a code: bit 7 of match
_ANY = ANY_PROTOCOL << 24 | 1 << 16
_SELECTOR = 32  # of a code: where the selector of a name begins


@dataclass(frozen=True, slots=True)
class Chain:
    """Codes and verdict words, sorted by code. depths: bits as in struct policy."""

    codes: tuple[int, ...]
    verdicts: tuple[int, ...]
    depths: int

    def __len__(self) -> int:
        return len(self.codes)


def word(deny: bool, answer: int, log: bool, rule: int) -> int:
    """Return a verdict word. answer: enum refusal; rule: its number."""
    action = DENY if deny else ALLOW
    return action | (answer << ANSWER_SHIFT if deny else 0) | LOG * log | rule << RULE_SHIFT


def codes(port: PortMatch, direction: int) -> list[int]:
    """Return the codes of a port range; direction: enum direction. Not for a name."""
    turn = _DIRECTION * direction
    if port.protocol == ANY_PROTOCOL:
        return [_ANY | turn]
    found = []
    for first, depth in prefixes(port.first, port.last):
        found.append(port.protocol << 24 | (depth + 1) << 16 | turn | first)
    return found


def exact(protocol: int, port: int, direction: int) -> int:
    """Return the code of one port."""
    return protocol << 24 | (EXACT + 1) << 16 | _DIRECTION * direction | port


def naming(some: Iterable[int], selectors: Iterable[int]) -> list[int]:
    """Return the codes under which names of these selectors may be asked for at these codes."""
    numbers = list(selectors)
    return [number << _SELECTOR | code for code in some for number in numbers]


def protocol_of(code: int) -> int:
    """Return the protocol of a code."""
    return code >> 24 & 0xFF


def everything(direction: int) -> list[int]:
    """Return the codes of any port of any protocol."""
    return [_ANY | _DIRECTION * direction]


def prefixes(first: int, last: int) -> list[tuple[int, int]]:
    """Cut a range of ports into (port, leading bits), in order."""
    found = []
    while first <= last:
        size = first & -first or 1 << EXACT
        while first + size - 1 > last:
            size >>= 1
        found.append((first, EXACT - size.bit_length() + 1))
        first += size
    return found


def _covering(code: int) -> Iterable[int]:
    """Yield the codes that a lookup would try after this one, longest prefix first."""
    protocol, match, port = protocol_of(code), code >> 16 & 0xFF, code & 0xFFFF
    if protocol == ANY_PROTOCOL:
        return
    name, turn, depth = code >> _SELECTOR << _SELECTOR, match & 0x80, (match & 0x7F) - 1
    for shorter in range(depth - 1, -1, -1):
        shift = EXACT - shorter
        yield name | protocol << 24 | (turn | shorter + 1) << 16 | port >> shift << shift
    yield name | _ANY | turn << 16


def merge(one: int, other: int) -> int:
    """Return the verdict word of two rules that say something of the same."""
    if one & ACTION != other & ACTION:
        return max(one, other, key=lambda verdict: (verdict & ACTION) == DENY)
    first = min(one, other, key=lambda verdict: verdict >> RULE_SHIFT)
    return first & ~NAMES_ONLY | (one | other) & (LOG | NAMES) | one & other & NAMES_ONLY


def _fold(verdict: int, behind: Iterable[int]) -> int:
    """Return an entry's verdict word with what shorter ones, which allow too, ask for."""
    every = reduce(merge, behind, verdict)
    return verdict & ~ASKS | every & ASKS


def chain(parts: Iterable[tuple[Sequence[int], int]]) -> Chain | None:
    """Return the chain of (codes, verdict word) of several rules; None: they say nothing."""
    said: dict[int, int] = {}
    for some, verdict in parts:
        for code in some:
            known = said.get(code)
            said[code] = verdict if known is None else merge(known, verdict)
    if not said:
        return None
    kept = said if len(said) == 1 else _needed(said)
    depths = 0
    for code in kept:
        any_protocol = protocol_of(code) == ANY_PROTOCOL
        depths |= ANY_BIT if any_protocol else 1 << ((code >> 16 & 0x7F) - 1)
    return Chain(tuple(kept), tuple(kept.values()), depths)


def _needed(said: dict[int, int]) -> dict[int, int]:
    """Return the entries that say more than what a lookup would find behind them, in order."""
    kept = {}
    for code in sorted(said):
        verdict = said[code]
        behind = [said[shorter] for shorter in _covering(code) if shorter in said]
        if any(one & ACTION == DENY for one in behind):
            continue
        if behind and verdict & ACTION == ALLOW:
            verdict = _fold(verdict, behind)
            if verdict & ASKS == _fold(behind[0], behind[1:]) & ASKS:
                continue
        kept[code] = verdict
    return kept
