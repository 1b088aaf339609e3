"""A stream becomes a row and a body for the generator's program (xdp/bpf/streams.bpf.c).

Rule: pure; no clock, no kernel. What the program cannot do is a StreamError here.

Theory. The packet's flags of TRex's stream (source and destination MAC from the port or from the
packet) are settled in the body. Variables that drive others (`next_var`, tuples) come before these,
since the program walks through them once. A transport's checksum is the sum of what may change (up
to WRITE_REACH bytes, summed again for each frame) and of the rest, summed here.
"""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from bench.traffic import total
from bench.trex.streams import (
    LAYOUT,
    LEAST,
    LIMITS,
    FixHw,
    FixIcmpv6,
    FixIpv4,
    FlowVar,
    FlowVarRandLimit,
    Stream,
    StreamError,
    Trim,
    TupleFlowVar,
    WriteFlowVar,
    WriteMaskFlowVar,
)

REACH = LIMITS["WRITE_REACH"]
SHIFT = 16
ALWAYS = 0xFFFFFFFF
WORD = (1 << 64) - 1
KINDS = {"inc": "VARIABLE_UP", "dec": "VARIABLE_DOWN", "random": "VARIABLE_RANDOM"}
CHECKS = {17: 6, 6: 16, 58: 2}  # offset of the checksum by protocol
BY_PACKET = 1  # in a stream's flags: bit 0 of the source, the value of bits 1-2 of the target


@dataclass(frozen=True)
class Compiled:
    """What the maps get."""

    row: np.ndarray  # stream
    body: bytes
    values: list[int]  # of the lists; the row's indices count from 0


@dataclass(frozen=True)
class Variable:
    """A variable before it has a place."""

    name: str
    size: int
    kind: str
    least: int
    most: int
    first: int
    step: int = 1
    limit: int = 0
    seed: int = 0
    values: tuple[int, ...] = ()
    drives: str | None = None


def compiled(stream: Stream, macs: tuple[bytes, bytes], group: int | None) -> Compiled:
    """Return a stream's row. macs: (target, source) of the port; group: its number; None: none."""
    body = bytearray(stream.packet.binary)
    if stream.flags >> 1 & 3 != BY_PACKET:
        body[0:6] = macs[0]
    if not stream.flags & BY_PACKET:
        body[6:12] = macs[1]
    if group is not None:
        _mark(body, group)
    row = np.zeros((), LAYOUT["stream"])
    row["length"] = len(body)
    row["burst"], row["bursts"] = stream.mode.bursts
    row["delay"] = round(stream.isg * 1000) << SHIFT
    row["rest"] = round(stream.mode.ibg * 1000) << SHIFT
    row["follows"] = stream.action_count or ALWAYS
    if group is not None and stream.flow_stats.rule_type == "latency":
        row["timed"] = 1
    row["group"] = group or 0
    places, values = _variables(stream, row)
    _writes(stream, row, places)
    _sums(stream, row, body)
    return Compiled(row, bytes(body), values)


def _mark(body: bytearray, group: int) -> None:
    """Write a group's mark where `arrive` looks for it."""
    kind, at = int.from_bytes(body[12:14], "big"), 14
    if kind == 0x8100:
        kind, at = int.from_bytes(body[16:18], "big"), 18
    mark = (LIMITS["GROUP_MARK"] + group).to_bytes(2, "big")
    if kind == 0x0800:
        body[at + 4 : at + 6] = mark
        size = (body[at] & 15) * 4
        body[at + 10 : at + 12] = b"\0\0"
        body[at + 10 : at + 12] = (0xFFFF - total(bytes(body[at : at + size]))).to_bytes(2, "big")
    elif kind == 0x86DD:
        body[at + 2 : at + 4] = mark
    else:
        raise StreamError(f"flow_stats: over IPv4 and IPv6, not over Ethernet type {kind:#06x}")


# --- variables ------------------------------------------------------------------------------------


def _variables(stream: Stream, row: np.ndarray) -> tuple[dict[str, int], list[int]]:
    """Place the variables; return their index by name, and the values of lists."""
    found = []
    for one in stream.vm.instructions:
        if isinstance(one, TupleFlowVar):
            found += _tuple(one)
            row["period"] = one.limit_flows
        elif isinstance(one, FlowVar | FlowVarRandLimit):
            found.append(_variable(one))
    if len(found) > LIMITS["VARIABLES_MAX"]:
        raise StreamError(f"{len(found)} variables: at most {LIMITS['VARIABLES_MAX']}")
    ordered = _ordered(found)
    places = {one.name: n for n, one in enumerate(ordered)}
    if len(places) < len(ordered):
        raise StreamError("two variables have one name")
    values: list[int] = []
    for n, placed in enumerate(ordered):
        kept = row["variables"][n]
        kept["value"] = kept["first"] = placed.first
        kept["least"], kept["most"], kept["step"] = placed.least, placed.most, placed.step
        kept["kind"], kept["limit"], kept["seed"] = LIMITS[placed.kind], placed.limit, placed.seed
        if placed.values:
            kept["values"] = len(values) + 1
            values += placed.values
        if placed.drives is not None:
            row["variables"][places[placed.drives]]["driver"] = n + 1
    row["variable_count"] = len(ordered)
    return places, values


def _variable(one: FlowVar | FlowVarRandLimit) -> Variable:
    limit = 1 << (8 * one.size)
    least, most = one.min_value, one.max_value
    if isinstance(one, FlowVarRandLimit):
        _range(one.name, least, most, limit)
        kind, first = "VARIABLE_HASHED", _hashed(one.seed, least, most)
        more = {"limit": one.limit, "seed": one.seed, "drives": one.next_var}
        return Variable(one.name, one.size, kind, least, most, first, **more)  # type: ignore[arg-type]
    if one.value_list:
        if max(one.value_list) >= limit:
            raise StreamError(f"variable {one.name}: {max(one.value_list)} has more than its size")
        least, most = 0, len(one.value_list) - 1
        first = most if one.op == "dec" else 0
    else:
        _range(one.name, least, most, limit)
        first = least if one.init_value is None else one.init_value
        if not least <= first <= most:
            raise StreamError(f"variable {one.name}: begins at {first}, not in {least}..{most}")
    values = tuple(one.value_list)
    return Variable(
        one.name, one.size, KINDS[one.op], least, most, first, one.step,
        values=values, drives=one.next_var,
    )  # fmt: skip


def _range(name: str, least: int, most: int, limit: int) -> None:
    if not least <= most < limit:
        raise StreamError(f"variable {name}: {least}..{most} is no range below {limit}")


def _hashed(seed: int, least: int, most: int) -> int:
    """The program's first value: splitmix64 (Steele et al. 2014) of the seed."""
    x = (seed + 0x9E3779B97F4A7C15) & WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    x ^= x >> 31
    width = most - least + 1
    return least + (x % width if width <= WORD else x)


def _tuple(one: TupleFlowVar) -> list[Variable]:
    """Every client in turn, then the next port."""
    up = "VARIABLE_UP"
    _range(one.name, one.ip_min, one.ip_max, 1 << 32)
    _range(one.name, one.port_min, one.port_max, 1 << 16)
    ip, port = f"{one.name}.ip", f"{one.name}.port"
    return [
        Variable(ip, 4, up, one.ip_min, one.ip_max, one.ip_min, drives=port),
        Variable(port, 2, up, one.port_min, one.port_max, one.port_min),
    ]


def _ordered(found: list[Variable]) -> list[Variable]:
    """Those that drive others first; StreamError for a ring or a name that is not there."""
    names = {one.name for one in found}
    driven = [one.drives for one in found if one.drives is not None]
    if missing := set(driven) - names:
        raise StreamError(f"next_var {min(missing)}: there is no such variable")
    if len(set(driven)) < len(driven):
        raise StreamError("two variables have the same next_var")
    by, ordered = {one.name: one for one in found}, []
    for one in found:
        if one.name in driven:
            continue
        follower: Variable | None = one
        while follower is not None:
            ordered.append(follower)
            follower = by[follower.drives] if follower.drives is not None else None
    if len(ordered) < len(found):
        raise StreamError("next_var: variables drive each other in a ring")
    return ordered


# --- what is written ------------------------------------------------------------------------------


def _writes(stream: Stream, row: np.ndarray, places: dict[str, int]) -> None:
    sizes = _sizes(stream)
    count = 0
    for one in stream.vm.instructions:
        if not isinstance(one, WriteFlowVar | WriteMaskFlowVar | Trim):
            continue
        if one.name not in places:
            raise StreamError(f"{one.type}: there is no variable {one.name}")
        if isinstance(one, Trim):
            _trim(stream, row, places[one.name])
            continue
        if count == LIMITS["WRITES_MAX"]:
            raise StreamError(f"more than {count} writes")
        width, shift = sizes[one.name], 0
        mask = (1 << 8 * width) - 1
        if isinstance(one, WriteMaskFlowVar):
            width, shift, mask = one.pkt_cast_size, one.shift, one.mask
        end = one.pkt_offset + width
        if end > min(REACH, stream.length):
            raise StreamError(
                f"{one.type} of {one.name}: bytes {one.pkt_offset}..{end - 1}: "
                f"must be below {min(REACH, stream.length)}"
            )
        row["writes"][count] = (
            one.add_value & WORD,
            mask,
            one.pkt_offset,
            width,
            places[one.name],
            not one.is_big_endian,
            max(0, shift),
            max(0, -shift),
            0,
        )
        count += 1
    row["write_count"] = count


def _sizes(stream: Stream) -> dict[str, int]:
    """Return the width of each variable by name."""
    found: dict[str, int] = {}
    for one in stream.vm.instructions:
        if isinstance(one, FlowVar | FlowVarRandLimit):
            found[one.name] = one.size
        elif isinstance(one, TupleFlowVar):
            found |= {f"{one.name}.ip": 4, f"{one.name}.port": 2}
    return found


def _trim(stream: Stream, row: np.ndarray, place: int) -> None:
    variable = row["variables"][place]
    if variable["values"]:
        raise StreamError("trim_pkt_size: by a list of values is not supported")
    if not variable["least"] >= LEAST or variable["most"] > stream.length:
        raise StreamError(
            f"trim_pkt_size: {variable['least']}..{variable['most']}: "
            f"must be within {LEAST}..{stream.length}, the packet's length"
        )
    row["trim"] = place + 1


# --- checksums ------------------------------------------------------------------------------------


def _sums(stream: Stream, row: np.ndarray, body: bytearray) -> None:
    for one in stream.vm.instructions:
        if isinstance(one, FixIpv4):
            _ipv4(row, body, one.pkt_offset)
        elif isinstance(one, FixHw | FixIcmpv6):
            if body[one.l2_len] >> 4 == 4:
                _ipv4(row, body, one.l2_len)
            if not isinstance(one, FixHw) or one.l4_type != 17:
                _transport(row, body, one.l2_len, one.l3_len)


def _ipv4(row: np.ndarray, body: bytearray, at: int) -> None:
    if at + 20 > min(len(body), REACH) or body[at] != 0x45:
        raise StreamError(f"IPv4 checksum at {at}: there is no IPv4 header without options")
    row["ip_at"] = at


def _transport(row: np.ndarray, body: bytearray, l2: int, l3: int) -> None:
    """A checksum over addresses, protocol, length and all from the transport's header on."""
    if row["trim"]:
        raise StreamError("fix_checksum_hw with trim_pkt_size is not supported")
    family, at = body[l2] >> 4, l2 + l3
    if l3 != (4 * (body[l2] & 15) if family == 4 else 40):
        raise StreamError(f"checksum at {at}: no UDP, TCP or ICMPv6 behind {l3} bytes of header")
    if family == 4:
        protocol, length = body[l2 + 9], int.from_bytes(body[l2 + 2 : l2 + 4], "big") - l3
        row["pseudo_at"], row["pseudo_size"] = l2 + 12, 8
    else:
        protocol, length = body[l2 + 6], int.from_bytes(body[l2 + 4 : l2 + 6], "big") + 40 - l3
        row["pseudo_at"], row["pseudo_size"] = l2 + 8, 32
    if protocol not in CHECKS or not 8 <= length <= len(body) - at:
        raise StreamError(f"checksum at {at}: no UDP, TCP or ICMPv6 of {length} bytes there")
    check = at + CHECKS[protocol]
    if check + 2 > min(len(body), REACH):
        raise StreamError(f"checksum at {check}: must be below {REACH}")
    stamp = LIMITS["STAMP_SIZE"] if row["timed"] else 0
    if stamp and (at + length != len(body) or length < stamp + 8):
        raise StreamError(f"latency: the packet must end with {stamp} bytes of payload")
    window = min(length - stamp, REACH) & ~3
    if not stamp and length <= REACH and not any(body[at + length : at + length + 3]):
        window = (length + 3) & ~3  # the program's body is zero behind the packet
    rest = body[at : at + length]
    rest[:window] = bytes(min(window, length))
    rest[length - stamp :] = bytes(stamp)
    row["l4_at"], row["l4_check"], row["l4_window"] = at, check, window
    row["l4_zero"], row["stamp_odd"] = protocol == 17, (length - stamp) & 1
    whole = total(bytes(rest)) + protocol + length
    whole = (whole & 0xFFFF) + (whole >> 16)
    row["l4_rest"] = int.from_bytes(whole.to_bytes(2, "big"), "little")
    for write in row["writes"][: row["write_count"]]:
        if at + window < write["offset"] + write["width"] <= at + length - stamp:
            raise StreamError("a variable in the last bytes that a checksum covers: pad the packet")


def offsets(found: list[Compiled]) -> list[int]:
    """Return where each stream's values begin in the lists; StreamError when they are too many."""
    ends = list(accumulate((len(one.values) for one in found), initial=0))
    if ends[-1] > LIMITS["VALUES_MAX"]:
        raise StreamError(f"{ends[-1]} values in lists: at most {LIMITS['VALUES_MAX']}")
    return ends[:-1]
