"""BPF_PROG_RUN: a program on one packet, or on millions.

Rule: without live frames nothing leaves the program; with them it is the fastest generator here.

Theory. Documentation/bpf/bpf_prog_run.rst. With BPF_F_TEST_XDP_LIVE_FRAMES the kernel carries out
the verdicts (XDP_TX, XDP_REDIRECT, XDP_PASS) on pages of its own, `repeat` times. A call costs tens
of milliseconds, so a measurement uses one long call and reads counters in its middle.
"""

from dataclasses import dataclass
from typing import Any

from xdp.errors import KernelError
from xdp.libbpf import ffi, lib
from xdp.object import Program

LIVE_FRAMES = 2  # BPF_F_TEST_XDP_LIVE_FRAMES
MARGIN = 512  # room in data_out for what a program adds


@dataclass(frozen=True)
class RunResult:
    """What a program did to a packet."""

    retval: int
    data: bytes
    duration_ns: int


def prog_run(
    program: Program,
    data: bytes,
    repeat: int = 1,
    ingress_ifindex: int | None = None,
    queue: int = 0,
) -> RunResult:
    """Run an XDP program on a packet and return its verdict, the packet, and ns a run."""
    context = None
    if ingress_ifindex is not None:
        context = ffi.new("struct xdp_md_in *")
        context.data_end = len(data)
        context.ingress_ifindex = ingress_ifindex
        context.rx_queue_index = queue
    return _run(program, data, repeat, context)


def prog_run_skb(
    program: Program, data: bytes, ifindex: int, segments: int = 0, segment_size: int = 0
) -> RunResult:
    """Run a program of tc on a packet that came in on ifindex; see prog_run.

    segments, segment_size: of a large packet, as its skb says (gso_segs, gso_size).
    """
    context = ffi.new("struct sk_buff_in *")
    context.ifindex, context.gso_segs, context.gso_size = ifindex, segments, segment_size
    return _run(program, data, 1, context)


def _run(program: Program, data: bytes, repeat: int, context: Any) -> RunResult:
    options = ffi.new("struct bpf_test_run_opts *")
    options.sz = ffi.sizeof("struct bpf_test_run_opts")
    source = ffi.from_buffer(data)
    target = ffi.new("char[]", len(data) + MARGIN)
    options.data_in, options.data_size_in = source, len(data)
    options.data_out, options.data_size_out = target, len(data) + MARGIN
    options.repeat = repeat
    if context is not None:
        options.ctx_in, options.ctx_size_in = context, ffi.sizeof(context[0])
    code = lib.bpf_prog_test_run_opts(program.fd, options)
    if code < 0:
        raise KernelError(f"BPF_PROG_RUN({program.name}, {len(data)} bytes)", code)
    out = bytes(ffi.buffer(target, options.data_size_out))
    return RunResult(options.retval, out, options.duration)


def live_frames(program: Program, frame: bytes, ifindex: int, repeat: int, batch: int = 64) -> None:
    """Send `repeat` copies of a frame through a program as if received on ifindex; blocks."""
    options = ffi.new("struct bpf_test_run_opts *")
    options.sz = ffi.sizeof("struct bpf_test_run_opts")
    source = ffi.from_buffer(frame)
    context = ffi.new("struct xdp_md_in *")
    context.data_end = len(frame)
    context.ingress_ifindex = ifindex
    options.data_in, options.data_size_in = source, len(frame)
    options.ctx_in, options.ctx_size_in = context, ffi.sizeof("struct xdp_md_in")
    options.repeat = repeat
    options.batch_size = batch
    options.flags = LIVE_FRAMES
    code = lib.bpf_prog_test_run_opts(program.fd, options)
    if code < 0:
        raise KernelError(f"live frames of {program.name} on ifindex {ifindex}", code)
