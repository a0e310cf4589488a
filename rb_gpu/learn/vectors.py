"""How CPU kernels are compiled, and vector operations that numba does not generate by itself.

numba's cache tracks only the file that defines a kernel: after a change here, in `products` or in `kernels`, touch the
files of the kernels that call the changed code too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

log = logging.getLogger(__name__)

# numbers of one vector; numbers compared in one step, whose results are the bits of one uint64
WIDTH, LANES = 16, 64
# typed as Any: callers pass values, while the decorated functions are written in terms of numba types
intrinsic: Callable[[Any], Any] = extending.intrinsic
alloca: Callable[[Any, Any], Any] = cgutils.alloca_once_value
FLOAT, INT = ir.FloatType(), ir.IntType(64)
FLOATS = ir.VectorType(FLOAT, LANES)
# reassociation of sums is allowed, which lets the compiler vectorise them; NaN and infinity keep their meaning
SUMS = {"reassoc", "contract", "nsz"}


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit that caches machine code beside the module or in the user's cache folder, where it is allowed to."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            log.warning("%s is compiled anew in every process: %s", function.__name__, error)
            return numba.njit(nogil=True, **options)(function)

    return decorate


def splat(builder: Any, scalar: Any, kind: Any) -> Any:
    """A vector of type `kind` whose elements all equal the scalar."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), places)


def called(builder: Any, name: str, result: Any, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """Calls the LLVM function of that name."""
    kinds = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kinds, name)
    return builder.call(function, arguments, fastmath=flags)


def least_of(builder: Any, floats: Any) -> Any:
    """The least element of a vector of LANES, none of which is NaN."""
    return called(builder, f"llvm.vector.reduce.fmin.v{LANES}f32", FLOAT, [floats], ("nnan",))


def sum_of(builder: Any, floats: Any) -> Any:
    """The sum of a vector's elements, in any order."""
    start = ir.Constant(FLOAT, -0.0)
    return called(builder, f"llvm.vector.reduce.fadd.v{floats.type.count}f32", FLOAT, [start, floats], ("reassoc",))


def address(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    """A pointer to the address `offset` bytes after base."""
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


@intrinsic
def lowest_bit(_context: Any, mask: Any) -> Any:
    """The position of the lowest set bit; the mask must not be 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate
