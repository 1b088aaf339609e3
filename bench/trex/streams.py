"""Streams as TRex's client sends them: checked, with what is not supported refused by name.

Rule: a stream that is accepted leaves exactly as it says.

Theory. The shapes follow TRex's stateless RPC (add_stream): a packet, a mode (continuous, a burst,
several), a field engine's program, a packet group. Unknown members are ignored, as a newer client
may send more than this server knows, but unknown modes, instructions and rules are errors.
"""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bench.layout import declared

LIMITS, LAYOUT = declared("streams.h")
FCS, GAP = 4, 20  # bytes on the wire that a frame in memory has not: check sequence; preamble, gap
LEAST = LIMITS["FRAME_LEAST"]


class StreamError(Exception):
    """A stream or a rate that cannot be sent; the message says why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Rate(_Model):
    """How fast, at a multiplier of one."""

    type: Literal["pps", "bps_L1", "bps_L2", "percentage"]
    value: float = Field(gt=0)

    def pps(self, length: int, line: float) -> float:
        """Return frames a second. length: in memory, bytes; line: of the port, bits a second."""
        if self.type == "pps":
            return self.value
        bits = 8 * (length + FCS + (0 if self.type == "bps_L2" else GAP))
        return (self.value * line / 100 if self.type == "percentage" else self.value) / bits


class Mode(_Model):
    """How many, and in what groups."""

    type: Literal["continuous", "single_burst", "multi_burst"]
    rate: Rate
    total_pkts: int = Field(0, ge=0, lt=1 << 63)
    pkts_per_burst: int = Field(0, ge=0, lt=1 << 63)
    count: int = Field(0, ge=0, lt=1 << 63, description="of bursts; 0: always")
    ibg: float = Field(0, ge=0, description="us between bursts")

    @model_validator(mode="after")
    def _counted(self) -> "Mode":
        if self.type == "single_burst" and not self.total_pkts:
            raise ValueError("total_pkts: a burst has at least one packet")
        if self.type == "multi_burst" and not self.pkts_per_burst:
            raise ValueError("pkts_per_burst: a burst has at least one packet")
        return self

    @property
    def bursts(self) -> tuple[int, int]:
        """Return (packets of a burst, bursts); 0 packets: no end."""
        if self.type == "continuous":
            return 0, 0
        if self.type == "single_burst":
            return self.total_pkts, 1
        return self.pkts_per_burst, self.count or (1 << 63) - 1


class FlowVar(_Model):
    """A variable that counts, or is random."""

    type: Literal["flow_var"]
    name: str
    size: Literal[1, 2, 4, 8]
    op: Literal["inc", "dec", "random"]
    init_value: int | None = Field(None, ge=0, lt=1 << 64)
    min_value: int = Field(0, ge=0, lt=1 << 64)
    max_value: int = Field(0, ge=0, lt=1 << 64)
    step: int = Field(1, ge=1, lt=1 << 63)
    value_list: list[Annotated[int, Field(ge=0, lt=1 << 64)]] = Field(default_factory=list)
    next_var: str | None = None


class FlowVarRandLimit(_Model):
    """A random variable that repeats itself."""

    type: Literal["flow_var_rand_limit"]
    name: str
    size: Literal[1, 2, 4, 8]
    limit: int = Field(ge=1, lt=1 << 63)
    seed: int = Field(0, ge=0, lt=1 << 63)
    min_value: int = Field(ge=0, lt=1 << 64)
    max_value: int = Field(ge=0, lt=1 << 64)
    next_var: str | None = None


class TupleFlowVar(_Model):
    """Clients with ports: NAME.ip and NAME.port."""

    type: Literal["tuple_flow_var"]
    name: str
    ip_min: int = Field(ge=0, lt=1 << 32)
    ip_max: int = Field(ge=0, lt=1 << 32)
    port_min: int = Field(ge=0, lt=1 << 16)
    port_max: int = Field(ge=0, lt=1 << 16)
    limit_flows: int = Field(0, ge=0)
    flags: int = 0


class WriteFlowVar(_Model):
    """A variable is written."""

    type: Literal["write_flow_var"]
    name: str
    pkt_offset: int = Field(ge=0)
    add_value: int = 0
    is_big_endian: bool = True


class WriteMaskFlowVar(_Model):
    """A part of a variable is written over a part of a field."""

    type: Literal["write_mask_flow_var"]
    name: str
    pkt_offset: int = Field(ge=0)
    pkt_cast_size: Literal[1, 2, 4]
    mask: int = Field(ge=0, lt=1 << 32)
    shift: int = Field(0, ge=-31, le=31)
    add_value: int = 0
    is_big_endian: bool = True


class FixIpv4(_Model):
    """The header's checksum is made again."""

    type: Literal["fix_checksum_ipv4"]
    pkt_offset: int = Field(ge=0)


class FixHw(_Model):
    """The header's and the transport's."""

    type: Literal["fix_checksum_hw"]
    l2_len: int = Field(ge=14, le=64)
    l3_len: int = Field(ge=20, le=128)
    l4_type: Literal[11, 13, 17]  # UDP, TCP, IP alone


class FixIcmpv6(_Model):
    """ICMPv6's."""

    type: Literal["fix_checksum_icmpv6"]
    l2_len: int = Field(ge=14, le=64)
    l3_len: int = Field(ge=40, le=128)


class Trim(_Model):
    """A variable is the packet's length."""

    type: Literal["trim_pkt_size"]
    name: str


Instruction = Annotated[
    FlowVar | FlowVarRandLimit | TupleFlowVar | WriteFlowVar | WriteMaskFlowVar
    | FixIpv4 | FixHw | FixIcmpv6 | Trim,
    Field(discriminator="type"),
]  # fmt: skip


class Program(_Model):
    """The field engine's."""

    instructions: list[Instruction] = Field(default_factory=list)


class FlowStats(_Model):
    """The packet group."""

    enabled: bool = False
    stream_id: int = Field(0, ge=0, lt=1 << 32)
    rule_type: str = "stats"
    vxlan: bool = False
    ieee_1588: bool = False

    @model_validator(mode="after")
    def _known(self) -> "FlowStats":
        if self.enabled and self.rule_type not in ("stats", "latency"):
            raise ValueError(f"rule {self.rule_type}: this server has stats and latency")
        if self.vxlan or self.ieee_1588:
            raise ValueError("vxlan and ieee_1588 are not supported")
        return self


class Packet(_Model):
    """The template."""

    binary: bytes

    @field_validator("binary", mode="before")
    @classmethod
    def _decoded(cls, text: Any) -> bytes:
        if isinstance(text, list):
            return bytes(text)
        return base64.b64decode(text, validate=True)

    @field_validator("binary")
    @classmethod
    def _sized(cls, data: bytes) -> bytes:
        if not 14 <= len(data) <= LIMITS["FRAME_MOST"]:
            most = LIMITS["FRAME_MOST"]
            raise ValueError(
                f"{len(data)} bytes: live frames have 14..{most}, a page less headroom"
            )
        return data.ljust(LEAST, b"\0")


class Stream(_Model):
    """A stream."""

    enabled: bool = True
    self_start: bool = True
    start_paused: bool = False
    isg: float = Field(0, ge=0, description="us before the first packet")
    action_count: int = Field(0, ge=0, lt=1 << 32)
    next_stream_id: int = -1
    flags: int = 0
    mode: Mode
    packet: Packet
    vm: Program = Field(default_factory=Program)
    flow_stats: FlowStats = Field(default_factory=FlowStats)

    @property
    def length(self) -> int:
        """Bytes in memory."""
        return len(self.packet.binary)


def parse(given: Any) -> Stream:
    """Return a stream; StreamError names each member that does not fit."""
    try:
        return Stream.model_validate(given)
    except ValidationError as error:
        found = [".".join(map(str, one["loc"])) + ": " + one["msg"] for one in error.errors()]
        raise StreamError("stream: " + "; ".join(found)) from error
