"""States of connections: the kernel against its twin, and what the RFCs say of them.

RFC 9293 3.3.2 (TCP), RFC 5382 5 and RFC 7857 2 (what a NAT makes of it), RFC 9260 4 (SCTP).
"""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataplane.kernels import states as kernel_states
from dataplane.kernels.house import kernel
from tests.naive import states as twin
from tests.segments import (
    ABORT,
    ACK,
    COOKIE_ACK,
    COOKIE_ECHO,
    DATA,
    FIN,
    INIT,
    INIT_ACK,
    RST,
    SCTP,
    SHUTDOWN,
    SHUTDOWN_ACK,
    SHUTDOWN_COMPLETE,
    SYN,
    TCP,
    UDP,
)
from xdp.abi import ENUM

NUMBERS = {name[len("CONNECTION_") :]: n for name, n in ENUM["connection_state"].items()}
NAMES = {number: name for name, number in NUMBERS.items()}
THERE, BACK = 0, 1


@kernel
def _first(protocol, at):
    return kernel_states.first_state(protocol, at)


@kernel
def _advance(record, protocol, at, way):
    kernel_states.advance(record, record + 1, protocol, at, way)


@kernel
def _reopens(state, protocol, at):
    return kernel_states.reopens(state, protocol, at)


class Story:
    """A connection from its first packet on, in the kernel's own bytes."""

    def __init__(self, protocol: int, mark: int) -> None:
        self.protocol = protocol
        self.record, self.header = np.zeros(3, np.uint8), np.zeros(64, np.uint8)
        self.record[0] = _first(protocol, self._at(mark))
        self.record[1] = mark if protocol == TCP else 0

    def _at(self, mark: int) -> int:
        self.header[13 if self.protocol == TCP else 12] = mark
        return self.header.ctypes.data

    def then(self, way: int, mark: int = 0) -> str:
        """One more packet; return the state."""
        _advance(self.record.ctypes.data, self.protocol, self._at(mark), way)
        return self.state

    def all(self, *packets: tuple[int, int]) -> str:
        for way, mark in packets:
            self.then(way, mark)
        return self.state

    @property
    def state(self) -> str:
        return NAMES[int(self.record[0])]

    def opens_anew(self, mark: int) -> bool:
        return bool(_reopens(int(self.record[0]), self.protocol, self._at(mark)))


MARKS = {
    TCP: st.sampled_from([SYN, SYN | ACK, ACK, FIN | ACK, RST, 0, 63]) | st.integers(0, 255),
    SCTP: st.integers(0, 15),
    UDP: st.just(0),
    1: st.sampled_from([0, 8]),
    47: st.just(0),
}  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(data=st.data(), protocol=st.sampled_from(sorted(MARKS)))
def test_states_are_their_twin(data, protocol):
    marks = MARKS[protocol]
    mark = data.draw(marks)
    story, seen = Story(protocol, mark), [mark if protocol == TCP else 0, 0]
    state = twin.first(protocol, mark)
    assert story.state == state
    for way, mark in data.draw(st.lists(st.tuples(st.integers(0, 1), marks), max_size=20)):
        assert story.opens_anew(mark) == twin.opens_anew(state, protocol, mark)
        state = twin.after(state, protocol, mark, way, (seen[0], seen[1]))
        seen[way] |= mark if protocol == TCP else 0
        assert story.then(way, mark) == state
        if protocol == TCP:
            # What an established connection's usual packets carry is not written down.
            assert int(story.record[1 + way]) & ~seen[way] == 0


# --- TCP ----------------------------------------------------------------------------------------

HANDSHAKE = ((BACK, SYN | ACK), (THERE, ACK))


def opened() -> Story:
    story = Story(TCP, SYN)
    assert story.all(*HANDSHAKE) == "ESTABLISHED"
    return story


def test_a_handshake_is_three_packets():
    story = Story(TCP, SYN)
    assert story.state == "SYN_SENT"
    assert story.then(THERE, SYN) == "SYN_SENT"  # again
    assert story.then(BACK, SYN | ACK) == "SYN_RECEIVED"
    assert story.then(BACK, SYN | ACK) == "SYN_RECEIVED"
    assert story.then(THERE, ACK) == "ESTABLISHED"


def test_simultaneous_open():
    """RFC 9293 3.5 figure 7; RFC 5382 REQ-2: both sides send a SYN."""
    story = Story(TCP, SYN)
    assert story.then(BACK, SYN) == "SYN_SENT"
    story.all((THERE, SYN | ACK), (BACK, SYN | ACK), (THERE, ACK))
    assert story.state == "ESTABLISHED"


@pytest.mark.parametrize("first", [THERE, BACK])
def test_a_connection_ends_when_both_sides_have_closed(first):
    story = opened()
    assert story.then(first, FIN | ACK) == "CLOSING"
    assert story.then(1 - first, ACK) == "CLOSING"  # half closed: data may flow for long
    assert story.then(1 - first, FIN | ACK) == "CLOSED"
    assert story.then(first, ACK) == "CLOSED"  # the last acknowledgement
    assert story.opens_anew(SYN)
    assert not story.opens_anew(SYN | ACK)


def test_one_side_cannot_close_for_both():
    story = opened()
    assert story.all((THERE, FIN | ACK), (THERE, FIN | ACK)) == "CLOSING"


def test_a_reset_may_be_forged():
    """RFC 7857 2.2: what goes on after a reset is not forgotten in seconds."""
    story = opened()
    assert story.then(BACK, RST) == "CLOSED"
    assert story.then(BACK, ACK) == "CLOSING"


@pytest.mark.parametrize("flags", [ACK, ACK | FIN, 0, 63, SYN | ACK])
def test_one_side_alone_never_establishes(flags):
    """A flood of invented packets stays half open, however many there are of each connection."""
    for first, *rest in product([SYN, ACK, 0, SYN | ACK], [flags], [ACK, SYN, flags], [ACK]):
        story = Story(TCP, first)
        story.all(*((THERE, mark) for mark in rest))
        assert story.state != "ESTABLISHED"


def test_a_connection_is_taken_up_in_its_middle():
    """After a restart without records: either side may speak first."""
    story = Story(TCP, ACK)
    assert story.state == "SYN_SENT"
    assert story.all((BACK, ACK), (THERE, ACK)) == "ESTABLISHED"


def test_what_goes_first_is_in_the_order_of_states():
    names = ["CLOSED", "SYN_SENT", "INIT", "UNREPLIED", "ICMP", "SYN_RECEIVED", "CLOSING",
             "REPLIED", "ESTABLISHED"]  # fmt: skip
    assert all(NUMBERS[a] < NUMBERS[b] for a, b in pairwise(names))


# --- SCTP ---------------------------------------------------------------------------------------


def test_an_association_opens_and_shuts_down():
    story = Story(SCTP, INIT)
    assert story.then(BACK, INIT_ACK) == "INIT"
    assert story.then(THERE, COOKIE_ECHO) == "INIT"
    assert story.then(BACK, COOKIE_ACK) == "ESTABLISHED"
    assert story.then(THERE, DATA) == "ESTABLISHED"
    assert story.then(THERE, SHUTDOWN) == "CLOSING"
    assert story.then(BACK, SHUTDOWN_ACK) == "CLOSING"
    assert story.then(THERE, SHUTDOWN_COMPLETE) == "CLOSED"
    assert story.opens_anew(INIT)


@pytest.mark.parametrize("chunk", [*range(16)])
def test_one_side_alone_never_establishes_an_association(chunk):
    for first in (INIT, DATA, COOKIE_ECHO):
        story = Story(SCTP, first)
        story.all((THERE, chunk), (THERE, COOKIE_ACK), (THERE, chunk))
        assert story.state != "ESTABLISHED"


def test_an_abort_ends_an_association():
    assert Story(SCTP, ABORT).state == "CLOSED"
    story = Story(SCTP, INIT)
    assert story.all((BACK, INIT_ACK), (THERE, COOKIE_ECHO), (BACK, ABORT)) == "CLOSED"


# --- the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [UDP, 47, 50, 136])
def test_what_has_no_states_is_answered_or_not(protocol):
    story = Story(protocol, 0)
    assert story.state == "UNREPLIED"
    assert story.then(THERE) == "UNREPLIED"
    assert story.then(BACK) == "REPLIED"
    assert story.then(THERE) == "REPLIED"
    assert not story.opens_anew(SYN)


@pytest.mark.parametrize("protocol", [1, 58])
def test_a_query_is_a_query(protocol):
    story = Story(protocol, 8)
    assert story.state == "ICMP"
    assert story.then(BACK) == "ICMP"
