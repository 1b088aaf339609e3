"""Tables and columns as kernels see them: one address each.

Rule: a kernel gets addresses; the arrays behind them are kept alive by whoever called it.

Theory. numba passes an array as seven numbers, and a tuple of arrays as seven times its length,
through every helper; a worker's tables and columns were a thousand arguments, which took minutes to
compile. A `Rows` is passed as one: `t.peers[row].identity` reads a field through it and
`t.peers.address` is its memory address. The columns of a vector are one record with an array for
each (`columns`), passed as one address; they are a cache line longer than the vector, so that the
same packet's entries do not all fall into the same few cache sets. Nothing is checked: an index
outside is as fatal as in C.
"""

import functools
import hashlib
import operator
from typing import Any

from dataplane.kernels import cache

cache.settle()

import numpy as np  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba import types  # noqa: E402
from numba.core import errors  # noqa: E402
from numba.core.typing.templates import AttributeTemplate  # noqa: E402
from numba.extending import (  # noqa: E402
    NativeValue,
    infer_getattr,
    lower_builtin,
    lower_getattr,
    models,
    register_model,
    type_callable,
    typeof_impl,
    unbox,
)
from numba.np import numpy_support  # noqa: E402

PAD = 8  # entries that a column is longer than the vector: a cache line


class Rows:
    """A one-dimensional, contiguous array whose address kernels get."""

    def __init__(self, array: np.ndarray) -> None:
        """array: of any dtype that numba knows; more dimensions are taken as one."""
        assert array.flags.c_contiguous, "rows must lie side by side"
        self.array = array.reshape(-1)
        self.address = array.ctypes.data
        self.kind = _type_of(array.dtype)  # numba asks for it at every call

    def __getitem__(self, key: Any) -> Any:
        """As the array's."""
        return self.array[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """As the array's."""
        self.array[key] = value

    def __len__(self) -> int:
        return len(self.array)


class RowsType(types.Type):
    """numba's type of Rows of an element type."""

    def __init__(self, element: types.Type) -> None:
        """element: a Record or a number."""
        self.element = element
        # A record's name spells out all of its fields: 20 KB for some, at each call, in each symbol
        digest = hashlib.blake2s(str(element).encode(), digest_size=8).hexdigest()
        super().__init__(name=f"Rows({digest})")


@typeof_impl.register(Rows)
def _typeof(value: Rows, context: object) -> RowsType:
    return value.kind


@functools.cache
def _type_of(dtype: Any) -> RowsType:
    """Return the type of Rows of a dtype; numba takes a millisecond for a large one."""
    return RowsType(numpy_support.from_dtype(dtype))


@register_model(RowsType)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.IntType(64))


@unbox(RowsType)
def _unbox(kind, value, c):
    address = c.pyapi.object_getattr_string(value, "address")
    native = c.pyapi.long_as_longlong(address)
    c.pyapi.decref(address)
    return NativeValue(native)


@type_callable(operator.getitem)
def _type_getitem(context):
    def typer(rows, row):
        if isinstance(rows, RowsType) and isinstance(row, types.Integer):
            return rows.element
        return None

    return typer


@type_callable(operator.setitem)
def _type_setitem(context):
    def typer(rows, row, value):
        if isinstance(rows, RowsType) and isinstance(row, types.Integer):
            return types.void
        return None

    return typer


@infer_getattr
class _Attributes(AttributeTemplate):
    key = RowsType

    def resolve_address(self, rows):
        return types.int64


@lower_getattr(RowsType, "address")
def _lower_address(context, builder, kind, value):
    return value


def _place(context, builder, kind, address, row, row_type):
    """Memory address of a row, as a pointer to what is stored there."""
    row = context.cast(builder, row, row_type, types.int64)
    stored = context.get_data_type(kind.element)
    size = context.get_abi_sizeof(stored)
    moved = builder.add(address, builder.mul(row, ir.Constant(ir.IntType(64), size)))
    return builder.inttoptr(moved, stored.as_pointer())


@lower_builtin(operator.getitem, RowsType, types.Integer)
def _lower_getitem(context, builder, sig, args):
    kind, row_type = sig.args
    place = _place(context, builder, kind, args[0], args[1], row_type)
    if isinstance(kind.element, types.Record):
        return builder.bitcast(place, context.get_value_type(kind.element))
    return context.unpack_value(builder, kind.element, place)


@lower_builtin(operator.setitem, RowsType, types.Integer, types.Any)
def _lower_setitem(context, builder, sig, args):
    kind, row_type, value_type = sig.args
    if isinstance(kind.element, types.Record):
        raise errors.TypingError("a row is changed field by field")
    place = _place(context, builder, kind, args[0], args[1], row_type)
    value = context.cast(builder, args[2], value_type, kind.element)
    context.pack_value(builder, kind.element, value, place)
    return context.get_dummy_value()


def columns(names: dict[str, tuple[str, int]]) -> np.dtype:
    """Return the dtype of a record of columns. names: name -> (dtype, length)."""
    return np.dtype(
        [
            (name, kind, (length + PAD if length > 1 else 1,))
            for name, (kind, length) in names.items()
        ]
    )
