"""pcap filter expressions as programs of classic BPF.

Rule: the language is libpcap's own (pcap-filter(7)): nothing of it is parsed here.

Theory. libpcap compiles an expression for Ethernet; a worker runs the program (kernels/bpf.py). The
library is loaded when a filter is first asked for, so that all else works without it.
"""

from typing import Any

import cffi
import numpy as np

from xdp.abi import CONST, DTYPE

LIBRARY = "libpcap.so.0.8"
ETHERNET = 1  # DLT_EN10MB
MOST = CONST["TAP_INSTRUCTIONS_MAX"]
INSTRUCTION = DTYPE["tap_instruction"]

_ffi = cffi.FFI()
_ffi.cdef("""
    struct bpf_insn { unsigned short code; unsigned char jt; unsigned char jf; unsigned int k; };
    struct bpf_program { unsigned int bf_len; struct bpf_insn *bf_insns; };
    struct timeval { long tv_sec; long tv_usec; };
    struct pcap_pkthdr { struct timeval ts; unsigned int caplen; unsigned int len; };
    typedef struct pcap pcap_t;
    pcap_t *pcap_open_dead(int linktype, int snaplen);
    int pcap_compile(pcap_t *, struct bpf_program *, const char *, int, unsigned int);
    char *pcap_geterr(pcap_t *);
    void pcap_freecode(struct bpf_program *);
    void pcap_close(pcap_t *);
    int pcap_offline_filter(struct bpf_program *, struct pcap_pkthdr *, unsigned char *);
""")


class FilterError(ValueError):
    """The expression cannot be used; the message is libpcap's."""


def _library() -> Any:
    try:
        return _ffi.dlopen(LIBRARY)
    except OSError as error:
        raise FilterError(f"{LIBRARY} is missing: apt install libpcap0.8 ({error})") from error


def compile_filter(expression: str, snap: int = CONST["TAP_SNAP_MOST"]) -> np.ndarray:
    """Return an expression's program, tap_instruction[n]; an empty one takes every packet.

    Raises FilterError, with what libpcap says.
    """
    if not expression.strip():
        return np.zeros(0, INSTRUCTION)
    library = _library()
    handle = library.pcap_open_dead(ETHERNET, snap)
    program: Any = _ffi.new("struct bpf_program *")
    try:
        if library.pcap_compile(handle, program, expression.encode(), 1, 0xFFFFFFFF) < 0:
            said: Any = _ffi.string(library.pcap_geterr(handle))
            raise FilterError(f"filter {expression!r}: {said.decode(errors='replace')}")
        count = int(program.bf_len)
        if count > MOST:
            raise FilterError(f"filter {expression[:60]!r}: {count} instructions, limit {MOST}")
        raw = bytes(_ffi.buffer(program.bf_insns, count * INSTRUCTION.itemsize))
        library.pcap_freecode(program)
        return np.frombuffer(raw, INSTRUCTION).copy()
    finally:
        library.pcap_close(handle)


def accepts(program: np.ndarray, packet: bytes, length: int | None = None) -> bool:
    """Whether libpcap's own machine takes a packet. length: on the wire, if more than is there."""
    if not len(program):
        return True
    library = _library()
    code = _ffi.from_buffer("struct bpf_insn[]", program.data)
    whole = _ffi.new("struct bpf_program *", {"bf_len": len(program), "bf_insns": code})
    header = _ffi.new("struct pcap_pkthdr *", {"caplen": len(packet), "len": length or len(packet)})
    return bool(library.pcap_offline_filter(whole, header, _ffi.from_buffer(packet)))
