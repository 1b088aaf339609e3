"""The BPF programs cost the verifier what the tree says they do, and stay far from its limit."""

import pytest

from xdp import verified

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def counts():
    return verified.measured()


def test_the_tree_knows_every_program(counts):
    listed = {name: set(programs) for name, programs in verified.kept()["programs"].items()}
    built = {name: set(programs) for name, programs in counts.items()}
    assert listed == built, "a program came or went: make verified"


def test_no_program_costs_much_more_than_it_did(counts):
    kept, here = verified.kept(), verified.here()
    same = all(kept[name] == text for name, text in here.items())
    room = verified.SAME if same else verified.OTHER
    for name, programs in counts.items():
        for program, count in programs.items():
            before = kept["programs"][name][program]
            assert count, f"{program}: this kernel does not say (verified_insns: Linux 5.16)"
            assert count <= before * (1 + room) + 16, (
                f"{name} {program}: {count} instructions, {before} before: if it has to be, "
                "`make verified` and say why"
            )
            assert count < verified.LIMIT / 2, f"{program}: no room for an older kernel's verifier"


def test_what_costs_much_less_is_written_down_too(counts):
    kept, here = verified.kept(), verified.here()
    if any(kept[name] != text for name, text in here.items()):
        pytest.skip(f"numbers of {kept['kernel']}, clang {kept['clang']}: here it is {here}")
    for name, programs in counts.items():
        for program, count in programs.items():
            before = kept["programs"][name][program]
            assert count >= before * (1 - verified.SAME) - 16, f"{program}: make verified"
