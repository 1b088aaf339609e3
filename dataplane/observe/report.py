"""What the observer says of itself, in a file beside its socket.

Rule: a report is whole, and says when it was true.

Theory. Losses, rates and a disk that is full are of interest when it does not answer, too;
a file asks nobody. It is written anew every half second.
"""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataplane.observe.collector import Collector
    from dataplane.observe.history import History

FILE = "observer.json"
SILENT_S = 30.0  # a report as old as this is a dead one's


def write(path: Path, source: "Collector", history: "History | None") -> None:
    """Replace the file. Raises OSError."""
    found = {
        "pid": os.getpid(),
        "time": time.time(),
        "flows": min(len(source.store), source.store.capacity),
        "most": source.store.capacity,
        "seen": source.store.head,
        "rate": round(source.rate, 1),
        "lost": source.lost,
        "left_out": source.messages.left_out,
        "history": history is not None,
        "not_written": history.dropped if history is not None else 0,
        "problem": history.problem if history is not None else "",
    }
    fresh = path.with_name(f".{path.name}")
    fresh.write_text(json.dumps(found))
    fresh.rename(path)


def read(path: Path) -> dict[str, Any] | None:
    """Return the last report; None: there is no observer that works."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if time.time() - found["time"] < SILENT_S else None
