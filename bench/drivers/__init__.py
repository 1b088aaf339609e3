"""Drivers: who makes the packets of a measurement, and counts those that arrive.

Rule: measurements know only this interface; a driver is a module of this package with
`open_session`.

Theory. A driver opens a session for a subject and a case, within the subject's turn. `flood` sends
as fast as it can and reads rates in the middle; `trial` sends at a rate for a time and counts to
the last packet, as RFC 2544 does; `burst` sends so many back to back. A session may keep what is
costly to make (loaded programs, connections to a server) until it is closed. `options` are the
words of the command line that only a driver understands, such as the server of a remote generator.
"""

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from bench.histogram import NONE, Histogram
from bench.lab import LabError
from bench.scenario import Case
from bench.subjects.base import Subject
from bench.usage import Usage

DRIVERS = {
    "frames": "XDP live frames (BPF_PROG_RUN), the fastest here",
    "pcap": "packets of a file or of the case, by AF_PACKET",
    "trex": "TRex's client and a TRex server (--server HOST; without: our own)",
}


@dataclass(frozen=True)
class Trial:
    """What one sending brought."""

    rate: float  # intended, frames a second; 0: as fast as it can
    sent: int
    arrived: int
    seconds: float  # of sending, or of the window that was looked at
    left_out: int = 0  # what the rate asked for and the driver could not send
    times: Histogram = field(default_factory=lambda: NONE)  # one way, ns
    usage: Usage | None = None

    @property
    def loss(self) -> float:
        """Share of what was sent that did not arrive."""
        return max(0.0, 1 - self.arrived / self.sent) if self.sent else 0.0

    @property
    def offered(self) -> float:
        """Frames a second that were sent."""
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def delivered(self) -> float:
        """Frames a second that arrived."""
        return self.arrived / self.seconds if self.seconds else 0.0


class Session(Protocol):
    """A subject under one kind of traffic."""

    def flood(self, seconds: float) -> Trial:
        """Send as fast as possible; counts are of a window in the middle."""

    def trial(self, rate: float, seconds: float, stamp: bool = False) -> Trial:
        """Send at a rate for a time and wait for the last frame; stamp: also take times."""

    def burst(self, frames: int) -> Trial:
        """Send frames back to back and wait for the last one."""


class Driver(Protocol):
    """A module of this package."""

    def open_session(
        self, subject: Subject, case: Case, options: Mapping[str, str]
    ) -> AbstractContextManager[Session]:
        """Prepare a case; LabError for what the driver cannot do."""


def driver(name: str) -> Driver:
    """Return a driver by name; LabError when it is none, or what it needs is missing."""
    if name not in DRIVERS:
        raise LabError(f"no driver {name}: {', '.join(DRIVERS)}")
    try:
        found = importlib.import_module(f"bench.drivers.{name}")
    except ImportError as error:
        raise LabError(f"driver {name}: {error}") from error
    return found  # type: ignore[return-value]
