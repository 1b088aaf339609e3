"""Names of addresses in flows: what pods have asked for, and still when its time is over."""

import pytest

from dataplane.observe import names
from dataplane.observe.names import KnownNames
from tests.dns_world import ELSEWHERE, NAME, STORE, STORY, DnsWorld
from tests.worlds import SECOND


@pytest.fixture
def story(world):
    made = DnsWorld(world)
    made.apply(STORY)
    yield made
    made.engine.close()


def of(known: KnownNames, address) -> tuple[str, ...]:
    number = int(address)
    return known.of(address.version, number >> 64, number & ((1 << 64) - 1))


@pytest.mark.parametrize(("family", "kind"), [(4, "A"), (6, "AAAA")])
def test_an_address_has_the_names_that_led_to_it(world, story, family, kind):
    known = KnownNames(world.shm, lambda: world.now)
    known.turn()
    assert of(known, STORE[family]) == ()
    world.now += 3 * SECOND
    story.learn(NAME, f"{kind} {STORE[family]}", kind=kind, family=family)
    known.turn()
    assert of(known, STORE[family]) == (NAME.rstrip("."),)
    assert of(known, ELSEWHERE[family]) == ()
    world.now += 100_000 * SECOND
    known.turn()
    assert of(known, STORE[family]) == (NAME.rstrip("."),), "flows of that time are still shown"


def test_what_is_remembered_is_bounded(world, story, monkeypatch):
    monkeypatch.setattr(names, "KEPT", 1)
    known = KnownNames(world.shm, lambda: world.now)
    story.learn(NAME, f"A {STORE[4]}")
    known.turn()
    world.now += 100_000 * SECOND
    story.learn(NAME, f"A {ELSEWHERE[4]}", identifier=9)
    known.turn()
    assert of(known, STORE[4]) == ()
    assert of(known, ELSEWHERE[4]) == (NAME.rstrip("."),)
