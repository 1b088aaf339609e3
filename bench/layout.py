"""The headers of the benchmark's BPF programs as numpy dtypes and constants.

Rule: nothing here restates a number of a header.

Theory. As xdp/abi.py does for the product: cffi knows the offsets, numpy gets them. The maps of
the generator are mapped memory, so a structure is written and read without a system call.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cffi
import numpy as np

BPF = Path(__file__).resolve().parents[1] / "xdp" / "bpf"
_C = {"__u8": "uint8_t", "__u16": "uint16_t", "__u32": "uint32_t", "__u64": "uint64_t"}
_NUMPY = {"uint8_t": "u1", "uint16_t": "<u2", "uint32_t": "<u4", "uint64_t": "<u8"}


def declared(header: str) -> tuple[Mapping[str, int], Mapping[str, np.dtype]]:
    """Return the numbers and the structures of a header of the BPF programs, by name."""
    whole = (BPF / header).read_text()
    body = "\n".join(line for line in whole.splitlines() if not line.startswith("#"))
    for name, standard in _C.items():
        body = re.sub(rf"\b{name}\b", standard, body)
    ffi = cffi.FFI()
    ffi.cdef(body)
    limits = re.findall(r"^#define\s+(\w+)\s+(\d+)\b", whole, re.MULTILINE)
    structures = re.findall(r"^struct\s+(\w+)\s*\{", whole, re.MULTILINE)
    return (
        MappingProxyType({name: int(number) for name, number in limits}),
        MappingProxyType({name: _dtype(ffi, ffi.typeof(f"struct {name}")) for name in structures}),
    )


def _format(ffi: Any, kind: Any) -> Any:
    if kind.kind == "array":
        return (_format(ffi, kind.item), (kind.length,))
    return _dtype(ffi, kind) if kind.kind == "struct" else _NUMPY[kind.cname]


def _dtype(ffi: Any, kind: Any) -> np.dtype:
    fields = [(name, _format(ffi, field.type), field.offset) for name, field in kind.fields]
    names, formats, offsets = map(list, zip(*fields, strict=True))
    size = ffi.sizeof(kind)
    layout: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": size}
    return np.dtype(layout)


LIMITS, LAYOUT = declared("generator.h")
