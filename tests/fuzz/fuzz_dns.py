"""Random, mutated and spliced DNS messages through the parser and its twin.

`python -m tests.fuzz.fuzz_dns --messages 10000000`; the seed of a failure is printed.
"""

import random
import sys
import time

import click
import dns.message
import dns.name
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import numpy as np

from dataplane.kernels import dns_message as d
from dataplane.kernels.house import kernel
from dataplane.kernels.rows import Rows
from tests.naive import dns as twin

BATCH = 2048
MOST = 64  # addresses noted of an answer
SLOT = 1024  # bytes that a message has
LABELS = [b"www", b"MyBlobStorage", b"com", b"a", b"b-c", b"_tcp", b"x" * 63, b"\xff\0", b"a.b"]
BYTES = [0, 1, 2, 4, 12, 28, 63, 64, 0x80, 0xC0, 0xC0, 0xC1, 0xFF]
FIELDS = ("question", "addresses", "found")


@kernel
def _read_all(messages, sizes, count, name, offsets, question, addresses, found, room):
    """Read so many messages; results as of read_question and addresses, and what was found."""
    for n in range(count):
        message, size = messages.address + n * SLOT, sizes[n]
        packed = d.read_question(message, size, name.address, offsets.address)
        question[n] = packed
        addresses[n] = d.MALFORMED
        found[n] = 0
        if packed < 0:
            continue
        end = (packed & d.END_MASK) + d.QUESTION_TAIL
        records = d.load16be(message + d.ANSWERS)
        packed = d.addresses(message, size, end, records, np.int64(d.HEADER), room, np.int64(MOST))
        addresses[n] = packed
        if packed >= 0:
            mixed = np.uint64(0)
            for k in range(min(packed & d.FOUND_MASK, MOST)):
                mixed = (mixed * np.uint64(31) + room[k].lo) ^ room[k].hi
            found[n] = np.int64(mixed)


class Batches:
    """Room for the messages of a batch and what the parser says of them."""

    def __init__(self) -> None:
        self.messages = np.zeros(BATCH * SLOT + 64, np.uint8)
        self.sizes = np.zeros(BATCH, np.int64)
        self.results = {field: np.zeros(BATCH, np.int64) for field in FIELDS}
        rows = (self.messages, self.sizes)
        self._in = tuple(map(Rows, rows))
        scratch = (np.zeros(512, np.uint8), np.zeros(d.LABELS_MOST, np.uint8))
        self._out = tuple(map(Rows, (*scratch, *self.results.values(), np.zeros(MOST, d.ADDRESS))))

    def read(self, batch: list[bytes]) -> None:
        """Have the parser read them."""
        for n, data in enumerate(batch):
            at = n * SLOT
            self.messages[at : at + len(data)] = np.frombuffer(data, np.uint8)
            self.messages[at + len(data) : at + len(data) + 16] = 0xA5
            self.sizes[n] = len(data)
        _read_all(*self._in, len(batch), *self._out)


def expected(data: bytes) -> tuple[int, int, int]:
    """What the twin says, in the parser's terms."""
    try:
        asked = twin.question(data)
    except twin.Malformed:
        return d.MALFORMED, d.MALFORMED, 0
    wire, labels = len(asked.name.wire), len(asked.name.labels)
    question = (asked.end - 4) | wire << d.LENGTH_SHIFT | labels << d.LABELS_SHIFT
    question |= asked.name.odd << d.ODD_SHIFT
    try:
        told = twin.leads_to(data, asked)
    except twin.Malformed:
        return question, d.MALFORMED, 0
    addresses = len(told.addresses) | told.cnames << d.CNAMES_SHIFT | told.ttl << d.TTL_SHIFT
    mixed, mask = 0, (1 << 64) - 1
    for _, value in told.addresses[:MOST]:
        mixed = (mixed * 31 + (value & mask)) & mask ^ value >> 64
    return question, addresses, mixed - (1 << 64) if mixed >> 63 else mixed


def name(r: random.Random) -> dns.name.Name:
    labels = [r.choice(LABELS) for _ in range(r.randrange(4))]
    return dns.name.Name([*labels, b""])


def valid(r: random.Random) -> bytes:
    """A query or an answer: a chain of names and addresses, in order or not."""
    asked = name(r)
    query = dns.message.make_query(
        asked, r.choice(["A", "AAAA", "TXT"]), use_edns=r.choice([-1, 0])
    )
    if r.random() < 0.2:
        return query.to_wire()
    made, owner = dns.message.make_response(query), asked
    for _ in range(r.randrange(4)):
        target = name(r)
        made.answer.append(_record(r, owner, "CNAME", target.to_text()))
        owner = target
    for _ in range(r.randrange(5)):
        where = owner if r.random() < 0.8 else name(r)
        if r.random() < 0.6:
            made.answer.append(_record(r, where, "A", f"192.0.2.{r.randrange(256)}"))
        else:
            made.answer.append(_record(r, where, "AAAA", f"2001:db8::{r.randrange(65536):x}"))
    if r.random() < 0.3:
        r.shuffle(made.answer)
    return made.to_wire(max_size=65535)


def _record(r: random.Random, owner: dns.name.Name, kind: str, text: str) -> dns.rrset.RRset:
    return dns.rrset.from_text(owner, r.choice([0, 5, 300, 2**31 - 1]), "IN", kind, text)


def mutate(r: random.Random, data: bytes, other: bytes) -> bytes:
    """Overwrite, cut, repeat, splice; or point somewhere."""
    fresh = bytearray(data)
    for _ in range(r.randrange(5)):
        if not fresh:
            break
        at, how = r.randrange(len(fresh)), r.random()
        if how < 0.4:
            fresh[at] = r.choice(BYTES)
        elif how < 0.6:
            fresh[at : at + 2] = bytes(
                [0xC0 | r.randrange(2), r.randrange(min(256, len(fresh) + 4))]
            )
        elif how < 0.7:
            del fresh[at:]
        elif how < 0.8:
            fresh[at:at] = fresh[at : at + r.randrange(24)]
        elif how < 0.9:
            fresh[at:] = other[min(at, len(other)) :]
        else:
            fresh[at] = r.randrange(256)
    return bytes(fresh[: SLOT - 32])


def fuzz(messages: int, seed: int, quiet: bool = True) -> int:
    """Compare parser and twin on so many messages; return how many they could read."""
    r = random.Random(seed)
    pool = [valid(r) for _ in range(1000)]
    pool = [data for data in pool if len(data) < SLOT - 32]
    batches, done, good = Batches(), 0, 0
    began = last = time.monotonic()
    while done < messages:
        batch = []
        for _ in range(min(BATCH, messages - done)):
            data = r.choice(pool)
            batch.append(data if r.random() < 0.02 else mutate(r, data, r.choice(pool)))
        batches.read(batch)
        columns = zip(*(batches.results[field].tolist() for field in FIELDS), strict=True)
        for data, told in zip(batch, columns, strict=False):
            wanted = expected(data)
            assert told == wanted, f"seed {seed}: {data.hex()}: parser {told}, twin {wanted}"
            good += wanted[0] >= 0
        done += len(batch)
        if not quiet and time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{done} messages, {done / (last - began):.0f}/s", file=sys.stderr, flush=True)
    return good


@click.command()
@click.option("--messages", default=10_000_000, show_default=True)
@click.option("--seed", default=0, help="0: of the clock")
def main(messages: int, seed: int) -> None:
    """Compare parser and twin."""
    seed = seed or time.time_ns() & 0xFFFFFFFF
    began = time.monotonic()
    good = fuzz(messages, seed, quiet=False)
    print(f"seed {seed}: {messages} messages, {good} of them had a question that can be read, "
          f"no difference, {time.monotonic() - began:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
