"""The network configuration list that tells the runtime of Penstock.

Rule: it is there, whole, exactly while the node is ready.

Theory. Runtimes take the first file of their folder in sort order as soon as it appears, so it is
written beside under a name that they ignore, synced and renamed, and only when its content differs.
"cniVersion" is what old runtimes know; newer ones choose the highest of "cniVersions" (CNI
specification 1.1.0, "Network configuration format").
"""

import json
import os
from pathlib import Path

from dataplane.cni.portmap import CAPABILITY

FILE = "05-penstock.conflist"


def content(socket: Path, deletes: Path, name: str = "penstock") -> str:
    """The configuration list as text."""
    conflist = {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
        "name": name,
        "plugins": [
            {
                "type": "penstock-cni",
                "capabilities": {CAPABILITY: True},
                "socket": str(socket),
                "deletes": str(deletes),
            }
        ],
    }
    return json.dumps(conflist, indent=2) + "\n"


def write(conf_dir: Path, socket: Path, deletes: Path, name: str = "penstock") -> bool:
    """Put the file into conf_dir; False when it stood there already. Raises OSError."""
    conf_dir = Path(conf_dir)
    text = content(socket, deletes, name)
    final = conf_dir / FILE
    if final.is_file() and final.read_text() == text:
        return False
    conf_dir.mkdir(parents=True, exist_ok=True)
    temporary = conf_dir / f".{FILE}.new"
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(final)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return True


def remove(conf_dir: Path) -> bool:
    """Take the file away; False when it was not there. Raises OSError."""
    try:
        (Path(conf_dir) / FILE).unlink()
    except FileNotFoundError:
        return False
    return True
