"""Where compiled kernels are kept.

Rule: a compiled kernel is never older than any line it was made from.

Theory. numba's own cache keys a function by the time stamp of its file and does not see the
functions and constants that it calls. So the cache folder itself carries a digest of every source
that kernels are made from (dataplane/kernels, dataplane/engine, xdp/abi.h, xdp/abi.py) and of the
versions of numba, llvmlite and Python: another source is another folder. Old folders are removed
by `collect` once nobody needs them.
"""

import hashlib
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("dataplane/kernels",)
# What is compiled of the engine.
COMPILED = ("account", "loop", "occupancy", "rings", "transmit", "warm")
FILES = ("xdp/abi.h", "xdp/abi.py", *(f"dataplane/engine/{name}.py" for name in COMPILED))
KEEP = 3  # digests kept beside the present one: branches that one switches between


def digest() -> str:
    """Return 16 hex digits that change with any source or tool that kernels are compiled from."""
    mixed = hashlib.blake2s()
    sources = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
    for path in [*sources, *(ROOT / name for name in FILES)]:
        mixed.update(path.name.encode())
        mixed.update(path.read_bytes())
    for package in ("numba", "llvmlite", "numpy"):
        mixed.update(version(package).encode())
    mixed.update(sys.version.encode())
    return mixed.hexdigest()[:16]


def folder() -> Path:
    """Return this version's cache folder: $PENSTOCK_CACHE_DIR (or build/cache) / digest."""
    return Path(os.environ.get("PENSTOCK_CACHE_DIR") or ROOT / "build" / "cache") / digest()


def collect() -> int:
    """Remove all but the newest cache folders; return how many went."""
    present = folder()
    if not present.parent.is_dir():
        return 0
    others = [path for path in present.parent.iterdir() if path.is_dir() and path != present]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[KEEP:]:
        shutil.rmtree(path, ignore_errors=True)
    return len(others[KEEP:])


def settle() -> Path:
    """Point numba at the folder; must run before numba is imported."""
    present = folder()
    present.mkdir(parents=True, exist_ok=True)
    os.environ["NUMBA_CACHE_DIR"] = str(present)
    return present
