"""Classic BPF: the machine that pcap filters are compiled for, over a packet in memory.

Rule: a program that `check` has accepted ends, and reads and writes nothing but the packet and the
scratch words, whatever the packet says.

Theory. libpcap compiles an expression; its program runs in the worker, so that only what fits is
copied. The machine is that of the BSD packet filter (McCanne and Jacobson, 1993; filter.rst in the
kernel's documentation): an accumulator, an index, 16 words, jumps forward only. A load beyond the
bytes that are there rejects the packet, as everywhere. All numbers are 32 bits, kept in int64.
About 5 ns an instruction.
"""

import numpy as np

from dataplane.kernels.house import (
    inline,
    load8,
    load16be,
    load32,
    load32be,
    load64,
    outline,
    store64,
)

WORDS = 16  # of scratch memory
MASK = 0xFFFFFFFF
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
SIZE_HALF, SIZE_BYTE = 0x08, 0x10
IMM, ABS, IND, MEM, LEN, MSH = 0x00, 0x20, 0x40, 0x60, 0x80, 0xA0
ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, NEG, MOD, XOR = range(0x00, 0xB0, 0x10)
JA, JEQ, JGT, JGE, JSET = range(0x00, 0x50, 0x10)
SOURCE_X, RETURN_A, TXA = 0x08, 0x10, 0x80


@inline
def _compute(op, a, operand):
    """A <- A op operand; a division by zero is the caller's business."""
    if op == ADD:
        return (a + operand) & MASK
    if op == SUB:
        return (a - operand) & MASK
    if op == MUL:
        return (a * operand) & MASK
    if op == DIV:
        return a // operand
    if op == MOD:
        return a % operand
    if op == AND:
        return a & operand
    if op == OR:
        return a | operand
    if op == XOR:
        return a ^ operand
    if op == LSH:
        return (a << operand) & MASK if operand < 32 else 0
    if op == RSH:
        return a >> operand if operand < 32 else 0
    return -a & MASK


@inline
def _holds(op, a, operand):
    """Whether a conditional jump is taken."""
    if op == JEQ:
        return a == operand
    if op == JGT:
        return a > operand
    if op == JGE:
        return a >= operand
    return a & operand != 0


@inline
def _load(at, code):
    """What a load of the code's size finds at a memory address."""
    if code & SIZE_BYTE:
        return load8(at)
    if code & SIZE_HALF:
        return load16be(at)
    return load32be(at)


@inline
def _width(code):
    if code & SIZE_BYTE:
        return 1
    return 2 if code & SIZE_HALF else 4


@outline
def accepts(program, count, at, captured, length, scratch):
    """Return what a checked program says of a packet: bytes to keep, 0: not this one.

    program: memory address of tap_instruction[count]; at: of the packet's `captured` bytes, of
    `length` in all; scratch: of int64[WORDS].
    """
    a = np.int64(0)
    x = np.int64(0)
    pc = np.int64(0)
    while pc < count:
        here = program + pc * 8
        code = load8(here)
        k = load32(here + 4)
        kind = code & 7
        mode = code & 0xE0
        operand = x if code & SOURCE_X else k
        pc += 1
        if kind == LD or kind == LDX:
            value = k
            if mode == ABS or mode == IND:
                place = k + (x if mode == IND else 0)
                if place > MASK or place + _width(code) > captured:
                    return np.int64(0)
                value = _load(at + place, code)
            elif mode == MSH:
                if k >= captured:
                    return np.int64(0)
                value = (load8(at + k) & 0xF) << 2
            elif mode == MEM:
                value = load64(scratch + k * 8)
            elif mode == LEN:
                value = length
            if kind == LD:
                a = value
            else:
                x = value
        elif kind == ST or kind == STX:
            store64(scratch + k * 8, a if kind == ST else x)
        elif kind == ALU:
            op = code & 0xF0
            if (op == DIV or op == MOD) and operand == 0:
                return np.int64(0)
            a = _compute(op, a, operand)
        elif kind == JMP:
            op = code & 0xF0
            if op == JA:
                pc += k
            elif _holds(op, a, operand):
                pc += load8(here + 2)
            else:
                pc += load8(here + 3)
        elif kind == RET:
            return a if code & RETURN_A else k
        elif code & TXA:
            a = x
        else:
            x = a
    return np.int64(0)


def check(program: np.ndarray) -> None:
    """Accept a program, tap_instruction[n]. Raises ValueError with the instruction's number.

    Every path ends: jumps lead forward and to an instruction, the last one returns.
    """
    count = len(program)
    if count and int(program[-1]["code"]) & 7 != RET:
        raise ValueError(f"instruction {count - 1}, the last, does not return")
    for number, one in enumerate(program):
        code, k = int(one["code"]), int(one["k"])
        kind = code & 7
        if code not in _CODES:
            raise ValueError(f"instruction {number} has the unknown code {code:#x}")
        if kind in (ST, STX) or (kind in (LD, LDX) and code & 0xE0 == MEM):
            if k >= WORDS:
                raise ValueError(f"instruction {number} uses word {k} of {WORDS}")
        if kind == JMP:
            jumps = [k] if code & 0xF0 == JA else [int(one["jump_true"]), int(one["jump_false"])]
            if number + 1 + max(jumps) >= count:
                raise ValueError(f"instruction {number} jumps beyond the end")
        if kind == ALU and code & 0xF0 in (DIV, MOD) and not code & SOURCE_X and k == 0:
            raise ValueError(f"instruction {number} divides by zero")


def _codes() -> frozenset[int]:
    sizes = (0x00, SIZE_HALF, SIZE_BYTE)
    loads = {LD | mode | size for mode in (ABS, IND) for size in sizes}
    loads |= {LD | IMM, LD | MEM, LD | LEN, LDX | IMM, LDX | MEM, LDX | LEN}
    loads |= {LDX | MSH | SIZE_BYTE, ST, STX, RET, RET | RETURN_A, MISC, MISC | TXA}
    sources = (0, SOURCE_X)
    loads |= {ALU | op | source for op in range(ADD, XOR + 1, 0x10) for source in sources}
    loads |= {JMP | op | source for op in (JEQ, JGT, JGE, JSET) for source in sources}
    return frozenset((loads | {JMP | JA}) - {ALU | NEG | SOURCE_X})


_CODES = _codes()
