"""xdp/abi.h as numpy dtypes, constants and texts.

Rule: nothing here restates a number; all is read from abi.h.

Theory. cffi parses the header's text (a subset of C without directives) and knows every offset.
From it come numpy dtypes with the same offsets, which numba takes as records, and the constants
and enumerations that Python and kernels use. The comment behind an enumerator of `enum reason` is
its text in metrics and on the command line.
"""

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cffi
import numpy as np

HEADER = Path(__file__).with_name("abi.h")

_SCALARS = {
    "__u8": "uint8_t",
    "__u16": "uint16_t",
    "__u32": "uint32_t",
    "__u64": "uint64_t",
}
_NUMPY = {"uint8_t": "u1", "uint16_t": "<u2", "uint32_t": "<u4", "uint64_t": "<u8", "char": "S1"}


def _declarations(text: str) -> str:
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for name, standard in _SCALARS.items():
        body = re.sub(rf"\b{name}\b", standard, body)
    return body


def _constants(text: str) -> dict[str, int]:
    found = re.findall(r"^#define\s+(\w+)\s+(\d+)\b", text, re.MULTILINE)
    return {name: int(value) for name, value in found}


def _enums(ffi: cffi.FFI, text: str) -> dict[str, dict[str, int]]:
    names = re.findall(r"^enum\s+(\w+)\s*\{", text, re.MULTILINE)
    return {name: dict(ffi.typeof(f"enum {name}").relements) for name in names}


def _field(ffi: cffi.FFI, kind) -> tuple:
    if kind.kind == "array":
        base = _field(ffi, kind.item)
        if kind.item.cname == "char":
            return (f"S{kind.length}", ())
        return (base[0], (kind.length, *base[1]))
    if kind.kind == "struct":
        return (_dtype(ffi, kind), ())
    return (_NUMPY[kind.cname], ())


def _dtype(ffi: cffi.FFI, kind) -> np.dtype:
    names, formats, offsets = [], [], []
    for name, field in kind.fields:
        base, shape = _field(ffi, field.type)
        names.append(name)
        formats.append((base, shape) if shape else base)
        offsets.append(field.offset)
    layout: Any = {
        "names": names,
        "formats": formats,
        "offsets": offsets,
        "itemsize": ffi.sizeof(kind),
    }
    return np.dtype(layout)


_text = HEADER.read_text()
_ffi = cffi.FFI()
_ffi.cdef(_declarations(_text))

CONST = MappingProxyType(_constants(_text))
ENUM = MappingProxyType(_enums(_ffi, _text))
DTYPE = MappingProxyType(
    {
        name: _dtype(_ffi, _ffi.typeof(f"struct {name}"))
        for name in re.findall(r"^struct\s+(\w+)\s*\{", _text, re.MULTILINE)
    }
)
REASON_TEXT = MappingProxyType(
    {
        int(number): words.strip()
        for number, words in re.findall(
            r"^\s+REASON_\w+\s*=\s*(\d+),\s*/\*\s*(.*?)\s*\*/", _text, re.MULTILINE
        )
    }
)
"""Number of a reason -> its text."""


def value(enumerator: str) -> int:
    """Return the number of an enumerator by its C name; KeyError when abi.h has none."""
    for members in ENUM.values():
        if enumerator in members:
            return members[enumerator]
    raise KeyError(f"xdp/abi.h declares no enumerator {enumerator!r}")


def reason_text(number: int) -> str:
    """Return the text of a reason, or `reason N` for one that abi.h does not name."""
    return REASON_TEXT.get(number, f"reason {number}")
