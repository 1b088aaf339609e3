"""DNS messages: the question, and the addresses that an answer leads to.

Rule: nothing is read outside of the message, and everything ends, whatever it holds.

Theory. RFC 1035 4.1. A name is read into a buffer of its own in lower case (RFC 4343), so that all
that follows sees one spelling. A pointer has to point backwards, behind the header (4.1.4: a prior
occurrence), so a chain of them ends. Of an answer only the chain counts that begins at the
question: a CNAME of the present owner leads on, addresses of the present owner are the result
(1034 3.6.2); records are gone through in order, and again where a pass has led on after others had
been passed over, since no RFC orders them. Other records are skipped. A message of which the answer
section does not parse leads nowhere. Addresses of memory are int64; results of several
numbers are packed into one.
"""

import numpy as np

from dataplane.kernels.house import inline, load8, load16be, load32be, load64be, outline, store8

ID, FLAGS, QUESTIONS, ANSWERS, AUTHORITIES, ADDITIONALS = 0, 2, 4, 6, 8, 10
HEADER = 12
QR, OPCODE, AA, TC, RD, RA, CD = 0x8000, 0x7800, 0x0400, 0x0200, 0x0100, 0x0080, 0x0010
RCODE = 0x000F
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, REFUSED = 0, 1, 2, 3, 5
IN = 1
A, CNAME, PTR, TXT, AAAA, SRV, OPT, SVCB, HTTPS = 1, 5, 12, 16, 28, 33, 41, 64, 65
QUESTION_TAIL = 4  # type and class
RECORD_HEAD = 10  # type, class, TTL, length of data
POINTER = 0xC0
LABEL_MOST = 63
NAME_MOST = 255  # bytes on the wire, the root's included
LABELS_MOST = 128  # the root's included
POINTERS_MOST = 32  # of one name
CHAIN_MOST = 16  # CNAMEs that are followed
TTL_MOST = (1 << 31) - 1  # RFC 2181 8: what is larger is 0
MALFORMED = -1
ODD = 0x100  # in SPELL: no pattern matches this byte


def _spell() -> np.ndarray:
    """Lower case of every byte; ODD with those that are not in [-a-z0-9_]."""
    table = np.arange(256, dtype=np.int64)
    table[65:91] += 32
    good = [*b"-_", *range(48, 58), *range(97, 123), *range(65, 91)]
    table[[byte for byte in range(256) if byte not in good]] |= ODD
    return table


SPELL = _spell()

# Where things are in a packed result of `question`.
END_MASK = 0xFFFF  # offset behind the name
LENGTH_SHIFT = 16  # 9 bits: bytes of the name
LABELS_SHIFT = 32  # 8 bits
ODD_SHIFT = 40


@outline
def read_name(message, size, at, name, offsets):
    """Read the name at offset `at` in lower case; MALFORMED, or packed as above.

    name: uint8[DNS_TEXT]; offsets: uint8[LABELS_MOST], of its labels; both memory addresses.
    """
    end = np.int64(-1)  # behind the name, where reading has left it
    limit = at  # pointers have to point before this
    length = labels = odd = np.int64(0)
    for _ in range(LABELS_MOST + POINTERS_MOST):
        if at >= size:
            return np.int64(MALFORMED)
        count = load8(message + at)
        if count >= POINTER:
            if at + 2 > size:
                return np.int64(MALFORMED)
            if end < 0:
                end = at + 2
            at = load16be(message + at) & 0x3FFF
            if at >= limit or at < HEADER:
                return np.int64(MALFORMED)
            limit = at
            continue
        if count > LABEL_MOST or at + 1 + count > size or length + 1 + count > NAME_MOST:
            return np.int64(MALFORMED)
        store8(name + length, count)
        if count == 0:
            if end < 0:
                end = at + 1
            return end | (length + 1) << LENGTH_SHIFT | labels << LABELS_SHIFT | odd << ODD_SHIFT
        store8(offsets + labels, length)
        labels += 1
        for n in range(1, count + 1):
            spelled = SPELL[load8(message + at + n)]
            odd |= spelled >> 8
            store8(name + length + n, spelled)
        length += 1 + count
        at += 1 + count
    return np.int64(MALFORMED)


@outline
def skip_name(message, size, at):
    """Offset behind the name at `at`, MALFORMED for a label of no known kind or a stray end."""
    length = np.int64(0)
    for _ in range(LABELS_MOST):
        if at >= size:
            return np.int64(MALFORMED)
        count = load8(message + at)
        if count >= POINTER:
            return at + 2 if at + 2 <= size else np.int64(MALFORMED)
        length += 1 + count
        if count > LABEL_MOST or at + 1 + count > size or length > NAME_MOST:
            return np.int64(MALFORMED)
        at += 1 + count
        if count == 0:
            return at
    return np.int64(MALFORMED)


@inline
def _follow(message, size, at, limit):
    """Offset that the pointer at `at` leads to, MALFORMED when that is not before `limit`."""
    if at + 2 > size:
        return np.int64(MALFORMED)
    target = load16be(message + at) & 0x3FFF
    return target if HEADER <= target < limit else np.int64(MALFORMED)


@outline
def same_name(message, size, one, other):
    """Whether the names at two offsets are the same, whatever their case and compression."""
    limit_one, limit_other = one, other
    for _ in range(LABELS_MOST + 2 * POINTERS_MOST):
        if one == other:
            return True
        if one < 0 or other < 0 or one >= size or other >= size:
            return False
        count = load8(message + one)
        if count >= POINTER:
            one = limit_one = _follow(message, size, one, limit_one)
            continue
        if load8(message + other) >= POINTER:
            other = limit_other = _follow(message, size, other, limit_other)
            continue
        if count != load8(message + other) or count > LABEL_MOST:
            return False
        if one + count >= size or other + count >= size:
            return False
        if count == 0:
            return True
        for n in range(1, count + 1):
            if SPELL[load8(message + one + n)] != SPELL[load8(message + other + n)]:
                return False
        one += 1 + count
        other += 1 + count
    return False


# Where things are in a packed result of `addresses`.
FOUND_MASK = 0xFFFF
CNAMES_SHIFT = 16
TTL_SHIFT = 24


@inline
def _emit(message, kind, data, found, found_most, count):
    """Note an address as found[count]; one that does not fit is only counted."""
    if count < found_most:
        if kind == A:
            found[count].hi = np.uint64(0)
            found[count].lo = np.uint64(load32be(message + data))
            found[count].family = 4
        else:
            found[count].hi = load64be(message + data)
            found[count].lo = load64be(message + data + 8)
            found[count].family = 6
    return count + 1


@outline
def addresses(message, size, at, records, question, found, most):
    """Collect the addresses that a question leads to; MALFORMED, or packed as above.

    at: offset of the answer section with so many records; question: offset of the name asked for.
    found: Rows of ADDRESS: the first `most` are noted, all are counted. TTL: the chain's least.
    """
    owner, ttl = question, np.int64(TTL_MOST)
    count = cnames = np.int64(0)
    for _ in range(CHAIN_MOST + 1):
        missed = again = False
        here, count = at, np.int64(0)
        for _ in range(records):
            start = here
            here = skip_name(message, size, here)
            if here < 0 or here + RECORD_HEAD > size:
                return np.int64(MALFORMED)
            kind, data = load16be(message + here), here + RECORD_HEAD
            of_internet = load16be(message + here + 2) == IN
            life, length = load32be(message + here + 4), load16be(message + here + 8)
            here = data + length
            if here > size:
                return np.int64(MALFORMED)
            if not of_internet or (kind != A and kind != AAAA and kind != CNAME):
                continue
            if kind == CNAME:
                if skip_name(message, size, data) != here:
                    return np.int64(MALFORMED)
            elif length != (4 if kind == A else 16):
                return np.int64(MALFORMED)
            if not same_name(message, size, start, owner):
                missed = True
                continue
            life = life if life <= TTL_MOST else 0
            ttl = life if life < ttl else ttl
            if kind == CNAME:
                cnames += 1
                if cnames > CHAIN_MOST:
                    return np.int64(MALFORMED)
                owner = data
                again |= missed
            else:
                count = _emit(message, kind, data, found, most, count)
        if not again:
            break
    if count > FOUND_MASK:
        count = np.int64(FOUND_MASK)
    return count | cnames << CNAMES_SHIFT | ttl << TTL_SHIFT


ADDRESS = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("family", "<i8")])
"""What `addresses` finds."""


@outline
def read_question(message, size, name, offsets):
    """Read the one question of a message, as read_name; MALFORMED also when there is not one."""
    if size < HEADER or load16be(message + QUESTIONS) != 1:
        return np.int64(MALFORMED)
    packed = read_name(message, size, np.int64(HEADER), name, offsets)
    if packed >= 0 and (packed & END_MASK) + QUESTION_TAIL > size:
        return np.int64(MALFORMED)
    return packed
