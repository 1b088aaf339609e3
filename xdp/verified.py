"""What the verifier walks through for each BPF program, kept in the tree: xdp/bpf/verified.json.

Rule: a program that costs the verifier more than it did is seen in a review, not on a node.

Theory. The verifier follows every path until it finds a state that it knows, and gives up after a
million instructions (BPF_COMPLEXITY_LIMIT_INSNS, include/linux/bpf.h). So a harmless-looking branch
can double the walk and the next one end it, on a kernel older than ours first. The numbers of one
kernel and one compiler are exact; of others they are not: pruning gets better from release to
release, and clang lays branches out differently. `make verified` writes them again.
"""

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from xdp.artifacts import find
from xdp.object import BpfObject, ObjectSpec

KEPT = Path(__file__).parent / "bpf" / "verified.json"
LIMIT = 1_000_000
SAME, OTHER = 0.05, 1.0
"""How much more is accepted: on the same kernel series and compiler, where only the program itself
can have changed and a fix of a line or two moves less than a twentieth; on others, where twice as
much has been seen between neighbouring releases."""


def here() -> dict[str, str]:
    """Return the kernel series and the compiler that numbers depend on."""
    text = subprocess.run(["clang", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)", text)
    series = ".".join(platform.release().split(".")[:2])
    return {"kernel": series, "clang": found[1] if found else "unknown"}


def measured() -> dict[str, dict[str, int]]:
    """Load every object of the build; return instructions by object and program. Needs CAP_BPF."""
    counts = {}
    for path in sorted(find("penstock.bpf.o").parent.glob("*.bpf.o")):
        with BpfObject(ObjectSpec.load(path)) as loaded:
            counts[path.name] = {p.name: p.verified for p in loaded.programs.values()}
    return counts


def kept() -> dict[str, Any]:
    """Return what the tree says."""
    return json.loads(KEPT.read_text())


def main() -> None:
    """Write the file."""
    KEPT.write_text(json.dumps({**here(), "programs": measured()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
