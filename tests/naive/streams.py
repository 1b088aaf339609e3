"""What frames a stream's field engine makes, from TRex's words: twin of xdp/bpf/streams.bpf.c.

Rule: instructions as the client sends them in, frames out; checksums are scapy's.

Theory. Every frame has the values of its turn written into it; then every variable that no other
drives goes on, and one that goes round takes the one it drives along (TRex: next_var). A tuple's
ports go on when its clients have gone round, and all begin again after limit_flows.
"""

from collections.abc import Iterator

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether


class Variable:
    """A value and how it goes on."""

    def __init__(self, values: list[int], down: bool, step: int, at: int) -> None:
        self.values, self.down, self.step, self.first = values, down, step, at
        self.at = at

    @property
    def value(self) -> int:
        return self.values[self.at]

    def advance(self) -> bool:
        """Whether it has gone round."""
        there = self.at + (-self.step if self.down else self.step)
        round_ = not 0 <= there < len(self.values)
        self.at = (len(self.values) - 1 if self.down else 0) if round_ else there
        return round_


def frames(template: bytes, instructions: list[dict]) -> Iterator[bytes]:
    """Yield the frames of a stream, for ever."""
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    drives: dict[str, str] = {}
    period = 0
    for one in instructions:
        if one["type"] == "flow_var":
            values = one.get("value_list") or list(range(one["min_value"], one["max_value"] + 1))
            down = one["op"] == "dec"
            if one.get("value_list"):
                at = len(values) - 1 if down else 0
            else:
                at = one["init_value"] - one["min_value"]
            variables[one["name"]] = Variable(values, down, one["step"], at)
            sizes[one["name"]] = one["size"]
            if one.get("next_var"):
                drives[one["name"]] = one["next_var"]
        elif one["type"] == "tuple_flow_var":
            ip, port = f"{one['name']}.ip", f"{one['name']}.port"
            ips, ports = (range(one[f"{w}_min"], one[f"{w}_max"] + 1) for w in ("ip", "port"))
            variables |= {ip: Variable([*ips], False, 1, 0), port: Variable([*ports], False, 1, 0)}
            sizes |= {ip: 4, port: 2}
            drives[ip], period = port, one["limit_flows"]
    turn = 0
    while True:
        yield _written(template, instructions, variables, sizes)
        turn += 1
        if period and turn % period == 0:
            for variable in variables.values():
                variable.at = variable.first
            continue
        for name, variable in variables.items():
            if name not in drives.values():
                while variable.advance() and name in drives:
                    name = drives[name]
                    variable = variables[name]


def _written(template: bytes, instructions: list[dict], variables: dict, sizes: dict) -> bytes:
    body = bytearray(template)
    for one in instructions:
        order = "big" if one.get("is_big_endian", True) else "little"
        at = one.get("pkt_offset", 0)
        if one["type"] == "write_flow_var":
            width = sizes[one["name"]]
            value = (variables[one["name"]].value + one["add_value"]) % (1 << 8 * width)
            body[at : at + width] = value.to_bytes(width, order)
        elif one["type"] == "write_mask_flow_var":
            width, mask, shift = one["pkt_cast_size"], one["mask"], one["shift"]
            mask &= (1 << 8 * width) - 1
            value = variables[one["name"]].value + one["add_value"]
            value = value << shift if shift > 0 else value >> -shift
            old = int.from_bytes(body[at : at + width], order)
            body[at : at + width] = (old & ~mask | value & mask).to_bytes(width, order)
    return summed(bytes(body), {one["type"] for one in instructions})


def summed(body: bytes, words: set[str]) -> bytes:
    """Have scapy make the checksums that the instructions ask for."""
    frame = Ether(body)
    if IP in frame and words & {"fix_checksum_ipv4", "fix_checksum_hw"}:
        del frame[IP].chksum
    if "fix_checksum_hw" in words:
        for layer in (UDP, TCP):
            if layer in frame:
                del frame[layer].chksum
    assert IP in frame or IPv6 in frame
    return bytes(frame)
