"""The house decorators, and the few machine operations that numba does not offer.

Rule: every compiled function is made by `kernel` or `inline` of this file, never by bare njit.

Theory. A kernel takes arrays and numbers, gives arrays and numbers, and does not allocate, raise,
log or read a clock. `_nrt=False` takes numba's reference counting away: counting the arrays of a
NamedTuple at every call of a helper cost 1.4 us a packet (decision 1). `inline` functions are
inlined by LLVM (alwaysinline), so a helper may take the whole Batch or Tables at no cost. `outline`
functions are called: they take numbers only (a tuple of arrays would be copied at each call), and
keep what is rare out of the way of what is not. Neither can be called from Python (compiler.py).
Arithmetic is kept in int64: numba promotes uint64 + int64 to float64, so uint64 is used for
address halves and hashes only, and only with other uint64.

numba is imported here, in rows.py and compiler.py, and nowhere else: it reads the cache folder's
name when it is imported, so `cache.settle` must run first.

Loads from packets are unaligned and big-endian; all go through here. Addresses of memory are plain
int64 numbers (Umem.address + offset), which keeps array descriptors out of the loops.
"""

from dataplane.kernels import cache

cache.settle()

from llvmlite import ir  # noqa: E402
from numba import njit, types  # noqa: E402
from numba.core import cgutils  # noqa: E402
from numba.extending import intrinsic  # noqa: E402

from dataplane.kernels.compiler import HelperCompiler  # noqa: E402

_OPTIONS = {
    "nogil": True,
    "boundscheck": False,
    "error_model": "numpy",
    "_nrt": False,
    "no_cfunc_wrapper": True,  # an entry for C: nobody uses it
}
_HELPER = {**_OPTIONS, "no_cpython_wrapper": True, "pipeline_class": HelperCompiler}

sched_yield = types.ExternalFunction("sched_yield", types.intc())  # sched_yield(2)


def kernel(function):
    """Compile a function that Python calls: cached, without the GIL, without reference counts."""
    return njit(cache=True, **_OPTIONS)(function)


def inline(function):
    """Compile a helper of kernels; LLVM inlines it into each caller."""
    return njit(forceinline=True, **_HELPER)(function)


def outline(function):
    """Compile a helper that is called, not inlined; arguments are numbers."""
    return njit(**_HELPER)(function)


def _load(bits: int, swap: bool):
    width = ir.IntType(bits)

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], width.as_pointer())
        value = builder.load(pointer, align=1)
        if swap:
            value = builder.bswap(value)
        return builder.zext(value, ir.IntType(64)) if bits < 64 else value

    return generate


def _store(bits: int, swap: bool):
    width = ir.IntType(bits)

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], width.as_pointer())
        value = builder.trunc(args[1], width) if bits < 64 else args[1]
        if swap:
            value = builder.bswap(value)
        builder.store(value, pointer, align=1)
        return context.get_dummy_value()

    return generate


@intrinsic
def load8(typing, address):
    """Byte at an address, as int64."""
    return types.int64(types.int64), _load(8, False)


@intrinsic
def load16be(typing, address):
    """Big-endian 16 bits at an address, as int64 in host order."""
    return types.int64(types.int64), _load(16, True)


@intrinsic
def load32be(typing, address):
    """Big-endian 32 bits at an address, as int64 in host order."""
    return types.int64(types.int64), _load(32, True)


@intrinsic
def load64be(typing, address):
    """Big-endian 64 bits at an address, as uint64 in host order."""
    return types.uint64(types.int64), _load(64, True)


@intrinsic
def load32(typing, address):
    """Native 32 bits at an address, as int64."""
    return types.int64(types.int64), _load(32, False)


@intrinsic
def load64(typing, address):
    """Native 64 bits at an address, as int64."""
    return types.int64(types.int64), _load(64, False)


@intrinsic
def store8(typing, address, value):
    """Store the low byte of value."""
    return types.void(types.int64, types.int64), _store(8, False)


@intrinsic
def store16be(typing, address, value):
    """Store the low 16 bits of value, big-endian."""
    return types.void(types.int64, types.int64), _store(16, True)


@intrinsic
def store32be(typing, address, value):
    """Store the low 32 bits of value, big-endian."""
    return types.void(types.int64, types.int64), _store(32, True)


@intrinsic
def store64be(typing, address, value):
    """Store 64 bits (a uint64 address half), big-endian."""
    return types.void(types.int64, types.uint64), _store(64, True)


@intrinsic
def store32(typing, address, value):
    """Store the low 32 bits of value in native order."""
    return types.void(types.int64, types.int64), _store(32, False)


@intrinsic
def store64(typing, address, value):
    """Store 64 bits in native order."""
    return types.void(types.int64, types.int64), _store(64, False)


@intrinsic
def load32_acquire(typing, address):
    """Atomic load, acquire, of a native 32-bit word, as int64 (ring indices)."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        return builder.zext(builder.load_atomic(pointer, "acquire", 4), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def store32_release(typing, address, value):
    """Atomic store, release, of the low 32 bits of value."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(32).as_pointer())
        builder.store_atomic(builder.trunc(args[1], ir.IntType(32)), pointer, "release", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def load64_acquire(typing, address):
    """Atomic load, acquire, of a native 64-bit word, as int64 (generations, stop words)."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def store64_release(typing, address, value):
    """Atomic store, release, of 64 bits."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.store_atomic(args[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _compare_and_swap(bits: int):
    width = ir.IntType(bits)

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], width.as_pointer())
        old, new = (builder.trunc(arg, width) if bits < 64 else arg for arg in args[1:])
        done = builder.cmpxchg(pointer, old, new, "acq_rel", "acquire")
        return builder.extract_value(done, 1)

    return generate


@intrinsic
def swap32(typing, address, old, new):
    """Store `new` where `old` stands, atomically, in a native 32-bit word; False: it did not."""
    return types.boolean(types.int64, types.int64, types.int64), _compare_and_swap(32)


@intrinsic
def swap64(typing, address, old, new):
    """Store `new` where `old` stands, atomically, in a native 64-bit word; False: it did not."""
    return types.boolean(types.int64, types.int64, types.int64), _compare_and_swap(64)


def _atomic_add(bits: int):
    word = ir.IntType(bits)

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], word.as_pointer())
        number = args[1] if bits == 64 else builder.trunc(args[1], word)
        old = builder.atomic_rmw("add", pointer, number, "monotonic")
        return old if bits == 64 else builder.zext(old, ir.IntType(64))

    return generate


@intrinsic
def add32(typing, address, value):
    """Add to a native 32-bit word, atomically; return what stood there."""
    return types.int64(types.int64, types.int64), _atomic_add(32)


@intrinsic
def add64(typing, address, value):
    """Add to a native 64-bit word, atomically; return what stood there."""
    return types.int64(types.int64, types.int64), _atomic_add(64)


@intrinsic
def match8(typing, address, tag):
    """Compare the upper halves of eight 64-bit words (one cache line) with a 32-bit tag.

    Bits 0-7 of the result: words that match; bits 8-15: words that are 0.
    """

    def generate(context, builder, signature, args):
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        vector, half = ir.VectorType(i64, 8), ir.VectorType(i32, 8)
        words = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=64)
        tag = builder.trunc(args[1], i32)
        wanted = ir.Constant(half, ir.Undefined)
        for n in range(8):
            wanted = builder.insert_element(wanted, tag, ir.Constant(i32, n))
        shift = ir.Constant(vector, [32] * 8)
        upper = builder.trunc(builder.lshr(words, shift), half)
        same = builder.bitcast(builder.icmp_unsigned("==", upper, wanted), i8)
        none = builder.icmp_unsigned("==", words, ir.Constant(vector, [0] * 8))
        empty = builder.zext(builder.bitcast(none, i8), i64)
        return builder.or_(builder.zext(same, i64), builder.shl(empty, ir.Constant(i64, 8)))

    return types.int64(types.int64, types.int64), generate


@intrinsic
def lowest_bit(typing, value):
    """Index of the lowest set bit of a nonzero int64."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def fence(typing):
    """Full barrier: between publishing ring entries and reading the kernel's need-wakeup flag."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fence_release(typing):
    """Barrier: no store behind it is seen before one in front of it. No instruction on x86."""

    def generate(context, builder, signature, args):
        builder.fence("release")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(typing, address):
    """Ask for the cache line of an address, for reading and writing soon."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], cgutils.voidptr_t)
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def copy32(typing, target, source):
    """Copy 32 bytes as one vector load and store."""

    def generate(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(64), 4)
        value = builder.load(builder.inttoptr(args[1], vector.as_pointer()), align=1)
        builder.store(value, builder.inttoptr(args[0], vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def highest_bit(typing, value):
    """Index of the highest set bit of a nonzero uint64, as int64."""

    def generate(context, builder, signature, args):
        zeros = builder.ctlz(args[0], ir.Constant(ir.IntType(1), 1))
        return builder.sub(ir.Constant(ir.IntType(64), 63), zeros)

    return types.int64(types.uint64), generate


@inline
def fold16(total):
    """Fold a one's complement sum of 16-bit words (int64, below 2**48) to 16 bits (RFC 1071)."""
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


@inline
def sum16(address, length):
    """One's complement sum, not folded, of `length` bytes as big-endian 16-bit words (RFC 1071)."""
    total = 0
    end = address + length
    while address + 8 <= end:
        total += load32be(address) + load32be(address + 4)
        address += 8
    while address + 2 <= end:
        total += load16be(address)
        address += 2
    if address < end:
        total += load8(address) << 8
    return total
