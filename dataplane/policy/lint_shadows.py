"""Rules that another makes superfluous, or that a deny rule defeats.

Rule: a rule is told only if another means at least the same subjects, peers and ports.

Theory. No pods are looked at: a selector with fewer conditions selects more, a block that contains
another contains its addresses, a range of ports another. So a finding holds whatever pods come; and
rules that merely happen to select the same today are not told. Rules are compared within a
namespace and direction, and with those of the whole cluster.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dataplane.objects.core import PORT_MOST
from dataplane.objects.policies import (
    ANY_PROTOCOL,
    DIRECTIONS,
    Block,
    Policy,
    PortMatch,
    Rule,
    Spec,
    inside,
)
from dataplane.objects.selectors import Selector
from dataplane.policy.findings import Finding, finding
from dataplane.policy.why import rule_name

COMPARED_MOST = 400  # rules of one namespace and direction
Where = tuple[Policy, Spec, Rule]


def shadows(policies: Mapping[Any, Policy]) -> Iterator[Finding]:
    """Yield the rules that are without effect."""
    groups: dict[tuple[str, int], list[Where]] = {}
    for _, policy in sorted(policies.items()):
        if policy.audit:
            continue
        for spec in policy.specs:
            for rule in spec.rules:
                if rule.peers != () and rule.ports != ():
                    key = policy.namespace, rule.direction
                    groups.setdefault(key, []).append((policy, spec, rule))
    for (namespace, direction), mine in groups.items():
        wide = groups.get(("", direction), []) if namespace else []
        if len(mine) + len(wide) > COMPARED_MOST:
            values = (len(mine), DIRECTIONS[direction], namespace or "*", COMPARED_MOST)
            yield finding(None, "", "not-compared", *values)
            continue
        for one in mine:
            yield from _shadow(one, [*mine, *wide])


def _shadow(one: Where, others: Iterable[Where]) -> Iterator[Finding]:
    policy, spec, rule = one
    where = f"{rule.section}[{rule.index}]"
    for other in others:
        if other[2] is rule or not _selects_more(other[1].subject, spec.subject):
            continue
        if (rule.deny and not other[2].deny) or not _says_more(other[2], rule):
            continue
        if rule.deny != other[2].deny:
            yield finding(policy, where, "defeated", rule_name(*other))
            return
        alike = _says_more(rule, other[2]) and _selects_more(spec.subject, other[1].subject)
        if alike and rule_name(*one) < rule_name(*other):
            continue  # twice the same is told of the second
        yield finding(policy, where, "shadowed", rule_name(*other))
        return


def _selects_more(wide: Selector, narrow: Selector) -> bool:
    return set(wide.requirements) <= set(narrow.requirements)


def _says_more(wide: Rule, narrow: Rule) -> bool:
    """Whether all that a rule means another means too."""
    if wide.names and not (narrow.names and set(narrow.names) <= set(wide.names)):
        return False
    if wide.peers is not None:
        if narrow.peers is None:
            return False
        if not all(any(_is_wider(w, n) for w in wide.peers) for n in narrow.peers):
            return False
    if wide.ports is None:
        return True
    return narrow.ports is not None and all(
        any(_has_ports(w, n) for w in wide.ports) for n in narrow.ports
    )


def _is_wider(wide: object, narrow: object) -> bool:
    """Whether an element of a rule's peers means all that another means."""
    if isinstance(wide, Selector) and isinstance(narrow, Selector):
        return _selects_more(wide, narrow)
    if isinstance(wide, Block) and isinstance(narrow, Block):
        holes = [part for part in wide.excepts if _touch(part, narrow)]
        return inside(narrow.cidr, wide.cidr) and not holes
    return wide == narrow


def _touch(hole: Any, block: Block) -> bool:
    """Whether a block has addresses in what another leaves out."""
    if any(inside(hole, part) for part in block.excepts):
        return False
    return inside(hole, block.cidr) or inside(block.cidr, hole)


def _has_ports(wide: PortMatch, narrow: PortMatch) -> bool:
    if wide.protocol == ANY_PROTOCOL or wide == narrow:
        return True
    if wide.protocol != narrow.protocol or wide.name:
        return False
    if narrow.name:
        return (wide.first, wide.last) == (0, PORT_MOST)
    return wide.first <= narrow.first and narrow.last <= wide.last
