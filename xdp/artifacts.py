"""Where compiled programs lie.

Rule: one search order for BPF objects and for the small C programs.

Theory. An installed Penstock says where they are by PENSTOCK_LIB_DIR; a checkout has them in
build/.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find(name: str) -> Path:
    """Return the path of `penstock.bpf.o`, `penstock-cni`, ...; FileNotFoundError says the fix."""
    folders = [ROOT / "build" / name for name in ("bpf", "bin", "proto")]
    if given := os.environ.get("PENSTOCK_LIB_DIR"):
        folders.insert(0, Path(given))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"{name} is in none of {looked}: run `make build`")
