"""What compiles a kernel for the CPU, and the vectors that numba does not write by itself.

numba's cache knows a kernel's own file alone: who changes what is called here, in `products` or in `kernels` must touch
the files of those who call it too.
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

# numbers of one vector; numbers that are compared in one step: the answers are the bits of one uint64
WIDTH, LANES = 16, 64
# what it makes is called with values, not with the types that its functions are written for
intrinsic: Callable[[Any], Any] = extending.intrinsic
alloca: Callable[[Any, Any], Any] = cgutils.alloca_once_value
FLOAT, INT = ir.FloatType(), ir.IntType(64)
FLOATS = ir.VectorType(FLOAT, LANES)
# sums may be taken in any order, which is what lets a compiler use vectors; NaN and infinity keep their meaning
SUMS = {"reassoc", "contract", "nsz"}


def compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit that keeps its machine code beside the module, or where a user's caches lie, where it may."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            log.warning("%s is compiled anew in every process: %s", function.__name__, error)
            return numba.njit(nogil=True, **options)(function)

    return decorate


def splat(builder: Any, scalar: Any, kind: Any) -> Any:
    """A vector of that kind, all of whose numbers are the scalar."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), places)


def called(builder: Any, name: str, result: Any, arguments: list[Any], flags: tuple[str, ...] = ()) -> Any:
    """What LLVM's function of that name says of the arguments."""
    kinds = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kinds, name)
    return builder.call(function, arguments, fastmath=flags)


def least_of(builder: Any, floats: Any) -> Any:
    """The least number of a vector of LANES, none of which is NaN."""
    return called(builder, f"llvm.vector.reduce.fmin.v{LANES}f32", FLOAT, [floats], ("nnan",))


def sum_of(builder: Any, floats: Any) -> Any:
    """The sum of a vector, in any order."""
    start = ir.Constant(FLOAT, -0.0)
    return called(builder, f"llvm.vector.reduce.fadd.v{floats.type.count}f32", FLOAT, [start, floats], ("reassoc",))


def address(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    """A pointer to what lies so many bytes after the base."""
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


@intrinsic
def lowest_bit(_context: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set; the mask is not 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), generate
