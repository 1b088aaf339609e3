"""One layout for all: abi.h as the C compilers see it against the numpy dtypes."""

import re
import subprocess

import numpy as np
import pytest

from xdp import abi

TARGETS = {"host": [], "bpf": ["-target", "bpf"]}


def _assertions() -> str:
    lines = []
    for name, dtype in abi.DTYPE.items():
        lines.append(f"_Static_assert(sizeof(struct {name}) == {dtype.itemsize}, {name!r});")
        for field in dtype.names:
            base, offset = dtype.fields[field][:2]
            at, size = f"__builtin_offsetof(struct {name}, {field})", base.itemsize
            member = f"sizeof(((struct {name} *)0)->{field})"
            lines.append(f"_Static_assert({at} == {offset} && {member} == {size}, {field!r});")
    for members in abi.ENUM.values():
        lines += [f"_Static_assert({name} == {n}, {name!r});" for name, n in members.items()]
    lines += [f"_Static_assert({name} == {n}, {name!r});" for name, n in abi.CONST.items()]
    return "\n".join(lines).replace("'", '"')


@pytest.mark.parametrize("target", TARGETS)
def test_the_compiler_agrees_with_numpy(tmp_path, target):
    source = tmp_path / "layout.c"
    source.write_text(f'#include <linux/types.h>\n#include "{abi.HEADER}"\n{_assertions()}\n')
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout
    include = f"-I/usr/include/{machine.strip()}-linux-gnu"
    done = subprocess.run(
        ["clang", *TARGETS[target], include, "-fsyntax-only", str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_no_structure_has_a_hole():
    for name, dtype in abi.DTYPE.items():
        end = 0
        for field in dtype.names:
            base, offset = dtype.fields[field][:2]
            assert offset == end, f"struct {name}: hidden padding before {field}"
            end = offset + base.itemsize
        assert end == dtype.itemsize, f"struct {name}: hidden padding at its end"


def test_sizes_in_structures_are_the_limits():
    steering = abi.DTYPE["steering"]
    limits = {"local4_be": "LOCALS_MAX", "prefix4": "PREFIXES_MAX", "prefix6": "PREFIXES_MAX"}
    for field, limit in limits.items():
        assert steering[field].shape == (abi.CONST[limit],)
    assert steering["local6"].shape == (16 * abi.CONST["LOCALS_MAX"],)
    assert abi.DTYPE["rewrite"].itemsize == abi.CONST["HEADER_MAX"]
    assert abi.DTYPE["worker_stats"]["stage_ns"].shape == (abi.CONST["STAGES_MAX"],)
    assert max(abi.ENUM["stage"].values()) < abi.CONST["STAGES_MAX"]
    assert max(abi.ENUM["reason"].values()) < abi.CONST["REASONS_MAX"]


def test_every_structure_and_enumeration_of_the_header_is_there():
    text = abi.HEADER.read_text()
    assert set(abi.DTYPE) == set(re.findall(r"^struct (\w+) \{", text, re.MULTILINE))
    assert set(abi.ENUM) == set(re.findall(r"^enum (\w+) \{", text, re.MULTILINE))
    assert all(dtype.kind == "V" for dtype in map(np.dtype, abi.DTYPE.values()))


def test_reasons_have_texts_and_unknown_ones_a_number():
    assert set(abi.REASON_TEXT) == set(abi.ENUM["reason"].values())
    assert abi.reason_text(abi.value("REASON_INVALID_SOURCE_IP")) == "Invalid source ip"
    assert abi.reason_text(99) == "reason 99"
    with pytest.raises(KeyError, match="REASON_NONSENSE"):
        abi.value("REASON_NONSENSE")
