"""Which selectors fit which labels, in both directions and quickly.

Rule: an index only narrows down; holds() decides.

Theory. A selector is filed under one thing that it needs, a label value or a label's presence: the
one that fewest others need. So a new set of labels meets few of 100 k selectors, and a new selector
few of 10 k sets (those in the smallest set among its label values). Of a pod whose object is not
there yet most labels are not known: `certain` is what holds whatever they are, `possible` what may
hold.
"""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from dataplane.objects.selectors import EXISTS, IN, NAMESPACE, NOT_IN, Selector
from dataplane.policy.labels import Labels, is_unknown

T = TypeVar("T")
K = TypeVar("K")


def holds(selector: Selector, labels: Labels) -> bool:
    """Return whether a selector selects these labels."""
    for one in selector.requirements:
        value = labels.get(one.key)
        operator = one.operator
        if operator == IN:
            if value not in one.values:
                return False
        elif operator == NOT_IN:
            if value is not None and value in one.values:
                return False
        elif (value is not None) != (operator == EXISTS):
            return False
    return True


def split(selector: Selector) -> tuple[Selector, bool]:
    """Return the part of a selector that can be judged of an unknown pod, and whether it is all."""
    known = tuple(one for one in selector.requirements if not is_unknown(one.key))
    return Selector(known), len(known) == len(selector.requirements)


def certain(selector: Selector, labels: Labels) -> bool:
    """Return whether a selector selects an unknown pod, whatever its labels are."""
    known, whole = split(selector)
    return whole and holds(known, labels)


def possible(selector: Selector, labels: Labels) -> bool:
    """Return whether a selector may select an unknown pod."""
    return holds(split(selector)[0], labels)


class SelectorIndex(Generic[T]):
    """Things with selectors, found by labels."""

    def __init__(self) -> None:
        """Empty."""
        self._pairs: dict[tuple[str, str], set[T]] = {}
        self._keys: dict[str, set[T]] = {}
        self._rest: set[T] = set()
        self._namespaces: dict[str | None, set[T]] = {}
        self._filed: dict[T, list[set[T]]] = {}

    def _places(self, selector: Selector) -> Iterator[set[T]]:
        """Yield the sets that a thing of this selector belongs into, the emptiest that do."""
        namespace = None
        best: list[set[T]] = [self._rest]
        least = None
        for one in selector.requirements:
            found: list[set[T]]
            if one.operator == IN:
                if one.key == NAMESPACE and len(one.values) == 1:
                    namespace = one.values[0]
                found = [self._pairs.setdefault((one.key, v), set()) for v in one.values]
            elif one.operator == EXISTS:
                found = [self._keys.setdefault(one.key, set())]
            else:
                continue
            count = sum(map(len, found)), one.operator == EXISTS
            if least is None or count < least:
                best, least = found, count
        yield self._namespaces.setdefault(namespace, set())
        yield from best

    def add(self, selector: Selector, thing: T) -> None:
        """File a thing."""
        places = self._filed[thing] = list(self._places(selector))
        for place in places:
            place.add(thing)

    def remove(self, thing: T) -> None:
        """Take a thing out."""
        for place in self._filed.pop(thing):
            place.discard(thing)

    def candidates(self, labels: Labels) -> Iterator[T]:
        """Yield things whose selector may fit these labels, each once."""
        yield from self._rest
        for pair in labels.items():
            if found := self._pairs.get(pair):
                yield from found
            if found := self._keys.get(pair[0]):
                yield from found

    def candidates_of_unknown(self, labels: Labels) -> Iterator[T]:
        """Yield things whose selector may fit an unknown pod."""
        yield from self._namespaces.get(None, ())
        yield from self._namespaces.get(labels.get(NAMESPACE), ()) if NAMESPACE in labels else ()


class LabelIndex(Generic[T]):
    """Things with labels, found by a selector."""

    def __init__(self) -> None:
        """Empty."""
        self._all: dict[T, Labels] = {}
        self._pairs: dict[tuple[str, str], set[T]] = {}
        self._keys: dict[str, set[T]] = {}

    def add(self, labels: Labels, thing: T) -> None:
        """File a thing."""
        self._all[thing] = labels
        for pair in labels.items():
            self._pairs.setdefault(pair, set()).add(thing)
            self._keys.setdefault(pair[0], set()).add(thing)

    def remove(self, thing: T) -> None:
        """Take a thing out."""
        for pair in self._all.pop(thing).items():
            _drop(self._pairs, pair, thing)
            _drop(self._keys, pair[0], thing)

    def find(self, selector: Selector) -> list[T]:
        """Return the things that a selector selects."""
        narrow: list[Iterable[T]] = [self._all]
        size = len(self._all)
        for one in selector.requirements:
            found: list[set[T]]
            if one.operator == IN:
                found = [self._pairs.get((one.key, value), set()) for value in one.values]
            elif one.operator == EXISTS:
                found = [self._keys.get(one.key, set())]
            else:
                continue
            if (count := sum(map(len, found))) < size:
                narrow, size = list(found), count
        return [thing for part in narrow for thing in part if holds(selector, self._all[thing])]


def _drop(index: dict[K, set[T]], key: K, thing: T) -> None:
    found = index[key]
    found.discard(thing)
    if not found:
        del index[key]
