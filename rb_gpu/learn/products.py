"""Products of a few points with 64 centroids at a time, left in a core's first-level cache.

int8 codes are multiplied exactly where the processor has instructions for it (Intel's AMX tiles, VNNI); float32 works
everywhere. numba selects by the points' dtype: int8 means AMX, uint8 (offset by 128) VNNI, float32 the general case.
Suffixes: C centroids padded to whole blocks of LANES, P dims of a code padded to whole steps of the product.
"""

from __future__ import annotations

import ctypes
import logging
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from torch import Tensor

from rb_gpu.learn.vectors import FLOAT, INT, LANES, WIDTH, address, alloca, called, intrinsic, splat

log = logging.getLogger(__name__)

# points per call; points per step of the products other than AMX's
GROUP, POINTS = 32, 4
_target: Callable[[], Any] = cpu_target.target_context.codegen
FEATURES = frozenset(_target().magic_tuple()[2].split(","))
VECTORS = 2 if "+avx512f" in FEATURES else 1
# rows of an AMX tile and bytes of each row: the hardware's maximum
_ROWS, _BYTES = 16, 64
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA): Linux grants the tile registers only on request
_ARCH_PRCTL, _ASK, _TILES = 158, 0x1023, 18
_BYTE = ir.IntType(8)
_NUMBERS = {torch.float32: FLOAT, torch.uint8: ir.IntType(32)}


@dataclass(frozen=True)
class Product:
    """How codes are multiplied: `depth` dims per step, the dtype of points' codes, and the value that represents 0."""

    name: str
    depth: int
    code: torch.dtype
    zero: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def integers(self) -> bool:
        """Whether codes are integers from -127 to 127 with a scale."""
        return self.code != torch.float32

    def padded(self, width: int) -> int:
        """Stored dims of a code of this width."""
        return -(-width // self.depth) * self.depth


# most dims of a code whose product cannot overflow 32 bits
MOST_DIMS = 2**31 // 127**2
FLOAT32 = Product("float32", 1, torch.float32)
VNNI = Product("int8 (VNNI)", 4, torch.uint8, 128)
AMX = Product("int8 (AMX)", _BYTES, torch.int8)


@cache
def integer_product() -> Product | None:
    """The fastest exact int8 product that both this processor and numba's target support; None if there is none."""
    if {"+amx-int8", "+avx512f"} <= FEATURES and sys.platform == "linux" and platform.machine() == "x86_64":
        if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK, _TILES) == 0:
            return AMX
        log.warning("Linux refuses the tile registers that AMX needs (arch_prctl): int8 products will take longer")
    return VNNI if "+avx512vnni" in FEATURES else None


def columns_of(code_CP: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """Codes (C, P) of centroids as columns (C / WIDTH, P / beside, WIDTH, beside), where integers have four dims side
    by side; and the initial value of each sum (C,), which cancels the points' zero offset and is 0 except for VNNI.
    """
    if product is VNNI:
        code_CP = (code_CP ^ product.zero).view(torch.int8)
    beside = 4 if product.integers else 1
    columns = code_CP.view(-1, WIDTH, code_CP.shape[1] // beside, beside).transpose(1, 2).contiguous()
    if product.zero > 0:
        return columns, code_CP.sum(1, dtype=torch.int32) * -product.zero
    return columns, torch.zeros(len(code_CP), dtype=torch.int32 if product.integers else torch.float32)


def _bytes(count: int) -> Any:
    return ir.Constant(INT, count)


def _add(builder: Any, code: torch.dtype, total: Any, point: Any, column: Any) -> Any:
    """Adds the products of a point's dims with a column's to total."""
    if code == torch.float32:
        return builder.fadd(total, builder.fmul(point, column, flags=("contract",)), flags=("contract",))
    return called(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, [total, point, column])


def _summed(builder: Any, code: torch.dtype, vectors: int, places: list[Any], steps: Any) -> list[list[Any]]:
    """The initial sums of `vectors` vectors plus their products with POINTS points, as vectors of WIDTH per point.

    places: addresses of points, columns and initial sums, then the stride in bytes between points and between vectors'
    columns. steps: of the product. All are 64-bit integers.
    """
    x, columns, begin, x_step, c_step = places
    vector = ir.VectorType(_NUMBERS[code], WIDTH)
    begun = [builder.load(place, align=4) for place in _spread(builder, begin, _bytes(4 * WIDTH), vectors, vector)]
    sums = [[alloca(builder, ir.Constant(vector, [0] * WIDTH)) for _ in begun] for _ in range(POINTS)]
    for row in sums:
        for value, place in zip(begun, row, strict=True):
            builder.store(value, place)
    with cgutils.for_range(builder, steps, intp=INT) as loop:
        here = builder.add(columns, builder.mul(loop.index, _bytes(4 * WIDTH)))
        parts = [builder.load(place, align=4) for place in _spread(builder, here, c_step, vectors, vector)]
        here = builder.add(x, builder.mul(loop.index, _bytes(4)))
        for point, row in zip(_spread(builder, here, x_step, POINTS, vector.element), sums, strict=True):
            repeated = splat(builder, builder.load(point, align=4), vector)
            for part, place in zip(parts, row, strict=True):
                builder.store(_add(builder, code, builder.load(place), repeated, part), place)
    return [[builder.load(place) for place in row] for row in sums]


def _spread(builder: Any, base: Any, step: Any, count: int, kind: Any) -> list[Any]:
    """`count` addresses from base on, a step apart."""
    return [address(builder, base, builder.mul(step, _bytes(i)), kind) for i in range(count)]


def write_sums(builder: Any, code: torch.dtype, vectors: int, places: list[Any], steps: Any) -> None:
    """Writes sums (see `_summed`); places ends with the address of out and the bytes of one of its rows."""
    *places, out, o_step = places
    for i, row in enumerate(_summed(builder, code, vectors, places, steps)):
        start = builder.add(out, builder.mul(o_step, _bytes(i)))
        for value, to in zip(row, _spread(builder, start, _bytes(4 * WIDTH), vectors, row[0].type), strict=True):
            builder.store(value, to, align=4)


def write_below(builder: Any, vectors: int, places: list[Any], steps: Any) -> None:
    """Writes one bit per float32 sum (see `_summed`): whether it is at most its point's limit. places ends with the
    addresses of limits and of out and the bytes of one row of out.
    """
    *places, limits, out, o_step = places
    bits = ir.IntType(WIDTH)
    for i, row in enumerate(_summed(builder, torch.float32, vectors, places, steps)):
        start = builder.add(out, builder.mul(o_step, _bytes(i)))
        limit = builder.load(address(builder, limits, _bytes(4 * i), FLOAT), align=4)
        for value, to in zip(row, _spread(builder, start, _bytes(WIDTH // 8), vectors, bits), strict=True):
            below = builder.fcmp_ordered("<=", value, splat(builder, limit, value.type))
            builder.store(builder.bitcast(below, bits), to, align=2)


def _write_tiles(builder: Any, x: Any, x_step: Any, columns: Any, c_step: Any, out: Any, steps: Any) -> None:
    """The products of GROUP points with two vectors of centroids, by AMX: two tiles for each, four for the sums."""

    def tile(name: str, *arguments: Any) -> None:
        wanted = [ir.Constant(_BYTE, a) if isinstance(a, int) else a for a in arguments]
        called(builder, f"llvm.x86.{name}", ir.VoidType(), wanted)

    def place(base: Any, offset: Any) -> Any:
        return address(builder, base, offset, _BYTE)

    for total in range(4):
        tile("tilezero", total)
    lower = builder.mul(x_step, _bytes(_ROWS))
    with cgutils.for_range(builder, steps, intp=INT) as loop:
        here = builder.mul(loop.index, _bytes(_BYTES))
        there = builder.mul(loop.index, _bytes(_ROWS * _BYTES))
        tile("tileloadd64", 4, place(x, here), x_step)
        tile("tileloadd64", 6, place(columns, there), _bytes(_BYTES))
        tile("tdpbssd", 0, 4, 6)
        tile("tileloadd64", 7, place(builder.add(columns, c_step), there), _bytes(_BYTES))
        tile("tdpbssd", 1, 4, 7)
        tile("tileloadd64", 5, place(builder.add(x, lower), here), x_step)
        tile("tdpbssd", 2, 5, 6)
        tile("tdpbssd", 3, 5, 7)
    for total, offset in enumerate((0, _BYTES, 4 * LANES * _ROWS, 4 * LANES * _ROWS + _BYTES)):
        tile("tilestored64", total, place(out, _bytes(offset)), _bytes(4 * LANES))


@intrinsic
def begin_products(_context: Any, sample: Any) -> Any:
    """Must precede the first `group_products` of a thread; sample: a number of the points' dtype."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> None:
        if sample == types.int8:
            # palette 1; then for each of eight tiles the bytes of a row, then its rows (Intel SDM, LDTILECFG)
            shape = bytes([1]) + bytes(15) + bytes([_BYTES, 0]) * 8 + bytes(16) + bytes([_ROWS] * 8) + bytes(8)
            kind = ir.ArrayType(_BYTE, len(shape))
            place = alloca(builder, ir.Constant(kind, bytearray(shape)))
            builder.store(ir.Constant(kind, bytearray(shape)), place)
            pointer = builder.bitcast(place, _BYTE.as_pointer())
            called(builder, "llvm.x86.ldtilecfg", ir.VoidType(), [pointer])

    return types.void(sample), generate


@intrinsic
def end_products(_context: Any, sample: Any) -> Any:
    """Must follow the last `group_products` of a thread."""

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> None:
        if sample == types.int8:
            called(builder, "llvm.x86.tilerelease", ir.VoidType(), [])

    return types.void(sample), generate


@intrinsic
def group_products(
    _context: Any, sample: Any, count: Any, x: Any, x_step: Any, columns: Any, c_step: Any, begin: Any, out: Any,
) -> Any:  # fmt: skip
    """Writes products of GROUP points at x, of which `count` matter, with the LANES centroids of these columns, to out
    (GROUP, LANES); see `write_sums`. x_step is also the number of bytes of a code.
    """
    code = {types.int8: torch.int8, types.uint8: torch.uint8, types.float32: torch.float32}[sample]
    signature = types.void(sample, *[types.uintp] * 7)

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> None:
        _, count, x, x_step, columns, c_step, begin, out = arguments
        if code == torch.int8:
            steps = builder.udiv(x_step, _bytes(_BYTES))
            for half in range(0, LANES, 2 * WIDTH):
                at = builder.add(columns, builder.mul(c_step, _bytes(half // WIDTH)))
                _write_tiles(builder, x, x_step, at, c_step, builder.add(out, _bytes(4 * half)), steps)
            return
        vectors = LANES // WIDTH if code == torch.uint8 else VECTORS
        groups = builder.udiv(builder.add(count, _bytes(POINTS - 1)), _bytes(POINTS))
        with cgutils.for_range(builder, groups, intp=INT) as loop:
            point = builder.add(x, builder.mul(builder.mul(loop.index, x_step), _bytes(POINTS)))
            to = builder.add(out, builder.mul(loop.index, _bytes(POINTS * 4 * LANES)))
            for v in range(0, LANES // WIDTH, vectors):
                past, at = _bytes(4 * WIDTH * v), builder.add(columns, builder.mul(c_step, _bytes(v)))
                places = [point, at, builder.add(begin, past), x_step, c_step, builder.add(to, past), _bytes(4 * LANES)]
                write_sums(builder, code, vectors, places, builder.udiv(x_step, _bytes(4)))

    return signature, generate
