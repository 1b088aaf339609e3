"""Worlds shared by the tests of one module: making one maps 200 MB of sparse tables."""

import pytest

from tests.worlds import World


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Return a function that makes (once) a World of given arguments."""
    made: dict[tuple, World] = {}

    def make(*arguments, **named) -> World:
        key = (arguments, tuple(sorted(named.items())))
        if key not in made:
            made[key] = World(tmp_path_factory.mktemp("world"), *arguments, **named)
        return made[key]

    yield make
    for world in made.values():
        world.close()


@pytest.fixture
def world(worlds):
    """A node with VXLAN over IPv4."""
    return worlds()
