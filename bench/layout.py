"""xdp/bpf/generator.h as numpy dtypes and constants.

Rule: nothing here restates a number of the header.

Theory. As xdp/abi.py does for the product: cffi knows the offsets, numpy gets them. The maps of
the generator are mapped memory, so a structure is written and read without a system call.
"""

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cffi
import numpy as np

HEADER = Path(__file__).resolve().parents[1] / "xdp" / "bpf" / "generator.h"
_C = {"__u8": "uint8_t", "__u16": "uint16_t", "__u32": "uint32_t", "__u64": "uint64_t"}
_NUMPY = {"uint8_t": "u1", "uint16_t": "<u2", "uint32_t": "<u4", "uint64_t": "<u8"}


def _format(kind: Any) -> Any:
    if kind.kind == "array":
        return (_format(kind.item), (kind.length,))
    return _dtype(kind) if kind.kind == "struct" else _NUMPY[kind.cname]


def _dtype(kind: Any) -> np.dtype:
    fields = [(name, _format(field.type), field.offset) for name, field in kind.fields]
    names, formats, offsets = map(list, zip(*fields, strict=True))
    size = _ffi.sizeof(kind)
    layout: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": size}
    return np.dtype(layout)


_text = HEADER.read_text()
_body = "\n".join(line for line in _text.splitlines() if not line.startswith("#"))
for _name, _standard in _C.items():
    _body = re.sub(rf"\b{_name}\b", _standard, _body)
_ffi = cffi.FFI()
_ffi.cdef(_body)

LIMITS = MappingProxyType(
    {name: int(n) for name, n in re.findall(r"^#define\s+(\w+)\s+(\d+)\b", _text, re.MULTILINE)}
)
LAYOUT = MappingProxyType(
    {
        name: _dtype(_ffi.typeof(f"struct {name}"))
        for name in re.findall(r"^struct\s+(\w+)\s*\{", _text, re.MULTILINE)
    }
)
