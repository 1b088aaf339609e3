"""The first packet of a connection, and the first one after a change of policy.

Rule: nothing passes here that a policy has not allowed; a record exists only for what may pass.

Theory. The order is Cilium's (bpf/bpf_lxc.c): service, then policies on the translated tuple, then
the source. `track` has put on the list what it could not settle: new connections, ICMP errors, and
live ones that were judged by older policies; those keep their record and are judged again, and one
that may no longer pass keeps it too, so that its packets are refused at once. A packet from outside
the cluster that belongs to no connection and no service goes to the node's own stack untouched.
"""

import numpy as np

from dataplane.kernels import wire
from dataplane.kernels.ahead import CHUNK, ask_all
from dataplane.kernels.batch import (
    FLAG_AUDITED,
    FLAG_ECHO,
    FLAG_ICMP_ERROR,
    FLAG_LATER_FRAGMENT,
    FLAG_NAT,
    FLAG_OUTSIDE,
    FLAG_RELATED,
    WAY_ORIGINAL,
)
from dataplane.kernels.connections import (
    CLAIMED,
    FLAGS,
    GENERATION,
    JUDGEMENT,
    LINE,
    LIVE,
    MASK,
    OWNER,
    RECORD,
    TICK,
    WORD,
    WORKERS,
    allocate,
    count_port,
    find,
    offset,
    publish,
    release,
    remove,
    unlink,
)
from dataplane.kernels.dns_lead import DNS, TO_PROXY, lead
from dataplane.kernels.events import begin
from dataplane.kernels.house import inline, kernel, load8, load32, load64, swap32
from dataplane.kernels.nat import (
    NAT_SOURCE,
    NO_PORT,
    PORT_TAKEN,
    new_source,
    note_exhausted,
    take_port,
)
from dataplane.kernels.parse import drop, is_echo, is_reply, mix, tuple_word
from dataplane.kernels.refuse import deny, prohibit, reject, served
from dataplane.kernels.rejudge import judge_again
from dataplane.kernels.related import find_related
from dataplane.kernels.route import lookup
from dataplane.kernels.service import choose, find_frontend, may_come
from dataplane.kernels.states import first_state
from dataplane.kernels.track import count, is_new, note_dns, settle, translated
from dataplane.kernels.verdict import judge_both
from xdp.abi import CONST, value

PORT_POD, PORT_HOST, PORT_UPLINK = (value(f"PORT_{name}") for name in ("POD", "HOST", "UPLINK"))
ADJACENCY_POD = value("ADJACENCY_POD")
ADJACENCY_HOST = value("ADJACENCY_HOST")
ADJACENCY_GATEWAY = value("ADJACENCY_GATEWAY")
ADJACENCY_NEXTHOP = value("ADJACENCY_NEXTHOP")
ADJACENCY_TUNNEL = value("ADJACENCY_TUNNEL")

CT_INVALID = value("REASON_CT_INVALID")
INSERTION_FAILED = value("REASON_CT_INSERTION_FAILED")
NO_BACKEND = value("REASON_NO_BACKEND")
NO_NAT_MAPPING = value("REASON_NO_NAT_MAPPING")
NAT_UNSUPPORTED = value("REASON_NAT_UNSUPPORTED")
IS_CLUSTER_IP = value("REASON_IS_CLUSTER_IP")
SOURCE_RANGE = value("REASON_SOURCE_RANGE")
PROXY_UNSUPPORTED = value("REASON_PROXY_UNSUPPORTED")

NODE_REJECT = CONST["NODE_REJECT"]
SERVICE_CLUSTER_IP = CONST["SERVICE_CLUSTER_IP"]
NAT_TARGET = CONST["CONNECTION_FLAG_NAT_TARGET"]
DENIED = CONST["CONNECTION_FLAG_DENIED"]
AUDITED = CONST["CONNECTION_FLAG_AUDITED"]
OUTSIDE = CONST["CONNECTION_FLAG_OUTSIDE"]

REFUSAL, REASON = offset("refusal"), offset("reason")
ZERO = np.uint64(0)


@inline
def _to_service(b, t, k, i):
    """Row of the service that packet i is for, after the target has become a backend's.

    0: for none; -1: refused, or answered. Returns (service, backend, port), the port of the target.
    """
    none = np.int64(0)
    port = b.target_port[i]
    frontends = t.frontends.address
    hi, lo, protocol = b.target_hi[i], b.target_lo[i], b.protocol[i]
    transport = protocol == wire.TCP or protocol == wire.UDP or protocol == wire.SCTP
    service = find_frontend(frontends, hi, lo, port, protocol) if transport else none
    outside = (b.flags[i] & FLAG_OUTSIDE) != 0
    if service == 0:
        service = find_frontend(frontends, hi, lo, none, none)
        if service == 0:
            return none, none, port
        if outside and t.services[service].flags & SERVICE_CLUSTER_IP:
            drop(b, i, IS_CLUSTER_IP)
        elif is_echo(b, i):
            b.flags[i] |= FLAG_ECHO
        else:
            _no_backend(b, t, i)
        return np.int64(-1), none, port
    row = t.services[service]
    if outside:
        if row.flags & SERVICE_CLUSTER_IP:
            drop(b, i, IS_CLUSTER_IP)
            return np.int64(-1), none, port
        if row.sources != ZERO and not may_come(t, row.sources, b.source_hi[i], b.source_lo[i]):
            drop(b, i, SOURCE_RANGE)
            return np.int64(-1), none, port
    source_hi, source_lo = b.source_hi[i], b.source_lo[i]
    backend = choose(t, service, outside, source_hi, source_lo, b.hashes[i], k.words[TICK])
    if backend == 0:
        served(b, i, service, b.target_hi[i], b.target_lo[i], port)
        _no_backend(b, t, i)
        return np.int64(-1), none, port
    b.target_hi[i] = t.backends[backend].hi
    b.target_lo[i] = t.backends[backend].lo
    return service, backend, np.int64(t.backends[backend].port)


@inline
def _no_backend(b, t, i):
    if t.node[0].flags & NODE_REJECT:
        reject(b, i, NO_BACKEND)
    else:
        drop(b, i, NO_BACKEND)


@inline
def _l4(b, i, port):
    """What policies see in the place of a port: the port, or the ICMP type."""
    if b.protocol[i] == wire.ICMP or b.protocol[i] == wire.ICMP6:
        if b.flags[i] & FLAG_LATER_FRAGMENT:
            return np.int64(0)
        return load8(b.address[i] + b.l4[i])
    return port


@inline
def _write(t, k, record, b, i, flags, hi, lo, target_hi, target_lo, own_port, port, verdict):
    """Fill a CLAIMED record. target_*: as received; hi, lo, own_port: the source on its way out."""
    c = t.connections[record]
    kind, protocol = b.kind[i], b.protocol[i]
    c.source_hi, c.source_lo = b.source_hi[i], b.source_lo[i]
    c.target_hi, c.target_lo = target_hi, target_lo
    c.word = b.word[i]
    c.reply_source_hi, c.reply_source_lo = b.target_hi[i], b.target_lo[i]
    c.reply_target_hi, c.reply_target_lo = hi, lo
    c.reply_word = tuple_word(port, own_port, protocol, kind)
    c.egress_rule, c.ingress_rule = verdict.egress, verdict.ingress
    c.source_identity = t.peers[verdict.source].identity
    c.target_identity = t.peers[verdict.target].identity
    c.created = k.words[TICK] | 1  # 0: never used
    c.port = b.ingress[i]
    c.icmp_type = _l4(b, i, 0)
    c.generation = k.words[JUDGEMENT]
    c.state = first_state(protocol, b.address[i] + b.l4[i])
    c.flags, c.names = flags & 0xFF, flags >> 8
    c.tcp_original = c.tcp_reply = 0
    if protocol == wire.TCP:
        c.tcp_original = load8(b.address[i] + b.l4[i] + wire.TCP_FLAGS)
    c.refusal = c.reason = 0
    c.last_original = c.last_reply = k.words[TICK]
    c.packets_original = c.bytes_original = c.packets_reply = c.bytes_reply = ZERO


@inline
def _has_way(b, t, i, service, adjacency):
    """Whether `judge` will let a new connection's packet go on by its adjacency."""
    kind = t.adjacencies[adjacency].kind
    if kind == ADJACENCY_POD or kind == ADJACENCY_HOST or kind == ADJACENCY_GATEWAY:
        return True
    if kind != ADJACENCY_NEXTHOP and kind != ADJACENCY_TUNNEL:
        return False
    return service != 0 or t.ports[b.ingress[i]].kind != PORT_UPLINK


@inline
def _create(b, t, k, i):
    """Decide about the first packet of a connection, and make its record."""
    target_hi, target_lo = b.target_hi[i], b.target_lo[i]
    if is_reply(b, i):
        _unasked(b, t, i)
        return
    service, backend, port = _to_service(b, t, k, i)
    if service < 0:
        return
    adjacency = lookup(t, b.kind[i], b.target_hi[i], b.target_lo[i])
    if service == 0 and b.flags[i] & FLAG_OUTSIDE:
        if t.adjacencies[adjacency].kind == ADJACENCY_HOST:
            return  # the node's own
    verdict = judge_both(
        t, b.kind[i], b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i],
        b.protocol[i], _l4(b, i, port), b.identity[i], k.words[TICK],
    )  # fmt: skip
    b.source_identity[i] = np.int64(t.peers[verdict.source].identity)
    b.target_identity[i] = np.int64(t.peers[verdict.target].identity)
    reason, word = verdict.reason, verdict.word
    led = lead(b, t, i, verdict.egress, port)
    if reason == 0 and led < 0:
        reason, word = PROXY_UNSUPPORTED, verdict.egress
    if reason:
        if service:
            served(b, i, service, b.target_hi[i], b.target_lo[i], port)
        b.target_hi[i], b.target_lo[i] = target_hi, target_lo
        deny(b, i, reason, word)
        return
    if not _has_way(b, t, i, service, adjacency):
        return  # `judge` says why; nothing is remembered of what goes nowhere
    if led >> 8 == TO_PROXY:  # who goes on to the backend from there
        b.target_hi[i], b.target_lo[i] = target_hi, target_lo
        flags, hi, lo = led, b.source_hi[i], b.source_lo[i]
        own, port = b.source_port[i], b.target_port[i]
    else:
        flags, hi, lo = new_source(b, t, i, service, adjacency)
        own = take_port(
            t, k, b.kind[i], b.protocol[i], hi, lo, b.target_hi[i], b.target_lo[i], port,
            b.source_port[i], (flags & PORT_TAKEN) != 0, b.hashes[i],
        )  # fmt: skip
        if own < 0:
            if own == NO_PORT:
                note_exhausted(k, b.target_hi[i], b.target_lo[i], port, b.protocol[i], b.now_ns[0])
            b.target_hi[i], b.target_lo[i] = target_hi, target_lo
            # RFC 5508 REQ-8
            prohibit(b, i, NO_NAT_MAPPING if own == NO_PORT else NAT_UNSUPPORTED)
            return
        flags |= led
        if own != b.source_port[i]:
            flags |= NAT_SOURCE
        if service:
            flags |= NAT_TARGET
    if b.flags[i] & FLAG_OUTSIDE:
        flags |= OUTSIDE
    if verdict.audited:
        flags |= AUDITED
        b.flags[i] |= FLAG_AUDITED
    _insert(b, t, k, i, flags, hi, lo, target_hi, target_lo, own, port, service, backend, verdict)


@inline
def _insert(
    b, t, k, i, flags, hi, lo, target_hi, target_lo, own, port, service, backend, verdict
):  # fmt: skip
    """Make the record of a connection that may pass, and let its packet through."""
    index, records = t.connection_index.address, t.connections.address
    words, ports = k.words.address, k.nat_ports.address
    number = allocate(index, records, words, k.places.address, k.counters.address)
    if number < 0:
        k.counters[0].refused += np.uint64(1)
        drop(b, i, INSERTION_FAILED)
        return
    _write(t, k, number, b, i, flags, hi, lo, target_hi, target_lo, own, port, verdict)
    t.connections[number].service = service
    t.connections[number].backend = backend
    record = records + number * RECORD
    reply = mix(
        b.target_hi[i], b.target_lo[i], hi, lo, np.uint64(load64(record + LINE + WORD))
    )  # fmt: skip
    if flags & PORT_TAKEN:
        count_port(ports, record, 1)
    b.target_hi[i], b.target_lo[i] = target_hi, target_lo  # as received: `settle` translates
    if not publish(index, records, k.words[MASK], number, b.hashes[i], reply):
        if flags & PORT_TAKEN:
            count_port(ports, record, -1)
        release(records, number, k.words[TICK])
        k.counters[0].refused += np.uint64(1)
        drop(b, i, INSERTION_FAILED)
        return
    made = number
    if k.words[WORKERS] > 1:
        number = _first(b, t, k, i, number)
    k.counters[0].created += np.uint64(1)
    b.connection[i] = number
    b.way[i] = WAY_ORIGINAL
    _pass(b, i, records + number * RECORD, WAY_ORIGINAL, k.words[TICK])
    if number == made:
        begin(k.ring.address, record)


@inline
def _pass(b, i, record, way, tick):
    count(b, i, record, way, tick)
    flags = load8(record + FLAGS)
    if flags & (NAT_SOURCE | NAT_TARGET) and not translated(b, i, record, way):
        drop(b, i, INSERTION_FAILED)
    elif flags & DNS:
        note_dns(b, i)


@inline
def _first(b, t, k, i, number):
    """Where two workers made the same connection: the record that stands first; ours goes."""
    index, records = t.connection_index.address, t.connections.address
    found = find(
        index, records, k.words[MASK],
        b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], b.word[i], b.hashes[i],
    )  # fmt: skip
    if found < 0 or found & 1 or found >> 1 == number:
        return number
    if swap32(records + number * RECORD + OWNER, LIVE, CLAIMED):
        unlink(index, records, k.words[MASK], number, k.places.address)
        release(records, number, k.words[TICK])
    return found >> 1


@inline
def _unasked(b, t, i):
    """What belongs to no connection and opens none is the node's own, or dropped."""
    if b.flags[i] & FLAG_OUTSIDE:
        adjacency = lookup(t, b.kind[i], b.target_hi[i], b.target_lo[i])
        if t.adjacencies[adjacency].kind == ADJACENCY_HOST:
            return
    drop(b, i, CT_INVALID)


@inline
def _relate(b, t, k, i):
    """Let an ICMP error pass with the connection that it is about, or drop it."""
    found = find_related(b, t, k, i)
    if found < 0:
        _unasked(b, t, i)
        return
    number, way = found >> 1, found & 1
    record = t.connections.address + number * RECORD
    if not _comes_back(b, t, i, record + way * LINE):
        drop(b, i, CT_INVALID)
        return
    if t.connections[number].generation != k.words[JUDGEMENT] and not judge_again(t, k, number):
        drop(b, i, CT_INVALID)
        return
    flags = load8(record + FLAGS)
    if flags & DENIED:
        deny(b, i, load32(record + REASON), load32(record + REFUSAL))
        return
    b.connection[i], b.way[i] = number, way
    b.flags[i] |= FLAG_RELATED
    if flags & (NAT_SOURCE | NAT_TARGET):
        _relate_addresses(b, i, record, way)


@inline
def _comes_back(b, t, i, mine):
    """Whether an error goes to who has sent what it quotes; mine: tuple of its direction.

    Else a quote of one's own connection would open the way to everybody. A pod is no router: it
    speaks only of what it has received itself.
    """
    to_hi, to_lo = np.uint64(load64(mine + 16)), np.uint64(load64(mine + 24))
    if to_hi != b.target_hi[i] or to_lo != b.target_lo[i]:
        return False
    return t.ports[b.ingress[i]].kind != PORT_POD or _is_from(b, i, mine)


@inline
def _is_from(b, i, mine):
    """Whether packet i comes from the source of a tuple."""
    hi, lo = np.uint64(load64(mine)), np.uint64(load64(mine + 8))
    return hi == b.source_hi[i] and lo == b.source_lo[i]


@inline
def _relate_addresses(b, i, record, way):
    """The outer addresses of an error become those of the connection's other side."""
    mine, other = record + way * LINE, record + (1 - way) * LINE
    b.nat_source_hi[i], b.nat_source_lo[i] = b.source_hi[i], b.source_lo[i]
    if _is_from(b, i, mine):  # from the end itself; a router between keeps its name
        b.nat_source_hi[i] = np.uint64(load64(other + 16))
        b.nat_source_lo[i] = np.uint64(load64(other + 24))
    b.nat_target_hi[i] = np.uint64(load64(other))
    b.nat_target_lo[i] = np.uint64(load64(other + 8))
    b.target_hi[i], b.target_lo[i] = b.nat_target_hi[i], b.nat_target_lo[i]
    b.flags[i] |= FLAG_NAT


@inline
def _look_again(b, t, k, i):
    """Find packet i's connection, which an earlier packet of the vector may have made or ended."""
    found = find(
        t.connection_index.address, t.connections.address, k.words[MASK],
        b.source_hi[i], b.source_lo[i], b.target_hi[i], b.target_lo[i], b.word[i], b.hashes[i],
    )  # fmt: skip
    b.connection[i] = found >> 1  # -1 >> 1 is -1
    b.way[i] = found & 1


@inline
def _one(b, t, k, i):
    if b.flags[i] & FLAG_ICMP_ERROR:
        _relate(b, t, k, i)
        return
    _look_again(b, t, k, i)
    number = b.connection[i]
    if number >= 0:
        record = t.connections.address + number * RECORD
        stale = load32(record + GENERATION) != k.words[JUDGEMENT]
        if not is_new(b, i, record) and (not stale or judge_again(t, k, number)):
            places, ring = k.places.address, k.ring.address
            if settle(b, i, record, b.way[i], k.words[TICK], places, ring):
                return
        else:
            remove(
                t.connection_index.address, t.connections.address,
                k.words.address, k.places.address, number,
            )  # fmt: skip
        b.connection[i] = -1
    _create(b, t, k, i)


@kernel
def connect(b, t, k):
    """Decide about every packet of the list `todo`. k: Tracker."""
    for first in range(0, b.todo_count[0], CHUNK):
        end = min(first + CHUNK, b.todo_count[0])
        ask_all(b, t, k, first, end)
        for n in range(first, end):
            _one(b, t, k, b.todo[n])
