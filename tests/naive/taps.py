"""What a tap takes of a vector, slowly.

Rule: written from docs/capture.md; the filter is libpcap's own machine.

Theory. A packet is what came, what left, and what was decided; a tap is asked about each of the two
points in turn.
"""

from dataclasses import dataclass

import numpy as np

from dataplane.capture.filters import accepts

IN, OUT = 1, 2
ETHERNET, UDP, VXLAN = 14, 8, 8


@dataclass(frozen=True)
class Passed:
    """A packet after all stages. left: None when it did not."""

    came: bytes
    left: bytes | None
    ingress: int
    egress: int
    reason: int
    from_tunnel: bool
    into_tunnel: bool


@dataclass(frozen=True)
class Tap:
    """What a tap asks for. port None: anywhere."""

    points: int
    snap: int
    port: int | None
    reasons: frozenset[int]
    program: np.ndarray


def inner(frame: bytes) -> bytes:
    """The frame in a VXLAN packet."""
    ip = 40 if frame[ETHERNET] >> 4 == 6 else (frame[ETHERNET] & 15) * 4
    return frame[ETHERNET + ip + UDP + VXLAN :]


def taken(packets: list[Passed], tap: Tap) -> list[tuple[int, int, int, bytes, int]]:
    """Return (point, port, reason, bytes, length), in order."""
    found = []
    for one in packets:
        points = [(IN, one.ingress, one.came, one.from_tunnel)]
        if one.left is not None:
            points.append((OUT, one.egress, one.left, one.into_tunnel))
        for point, port, frame, tunneled in points:
            if not tap.points & point or one.reason not in tap.reasons:
                continue
            if tap.port is not None and tap.port != port:
                continue
            fits = accepts(tap.program, frame)
            if not fits and tunneled and len(inner(frame)):
                fits = accepts(tap.program, inner(frame))
            if fits:
                found.append((point, port, one.reason, frame[: tap.snap], len(frame)))
    return found
