"""All subjects, in the order in which they take turns.

Rule: a subject is named once, here.

Theory. Penstock stands first, what it is compared with most directly next to it.
"""

from bench.subjects.base import Subject
from bench.subjects.kernel import Kernel, KernelNft, KernelNftEach, KernelSteered
from bench.subjects.ours import Penstock, PenstockVector, PenstockXdp
from bench.subjects.ovs import Ovs, OvsTracked
from bench.subjects.wires import Ceiling, Redirect, TestpmdPacket, TestpmdXdp

SUBJECTS: tuple[type[Subject], ...] = (
    Penstock,
    PenstockXdp,
    PenstockVector,
    KernelNft,
    Kernel,
    KernelNftEach,
    KernelSteered,
    OvsTracked,
    Ovs,
    TestpmdXdp,
    TestpmdPacket,
    Redirect,
    Ceiling,
)
NAMES = tuple(kind.name for kind in SUBJECTS)
OURS = Penstock.name
