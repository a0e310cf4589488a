"""The columns of design section 4: their bounds, and decoding of Arrow arrays to NumPy. Suffixes: N rows, D dims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rb_gpu.errors import DataError
from rb_gpu.params import MAX_COUNT, MAX_TEMPERATURE

NULL_TIER, UNKNOWN_TIER = -1, -2
MAX_INT64 = 2**63 - 1
# far below what an artifact can hold (bank_data.MAX_CELL), which would be refused only after all is learned
MAX_COST = 1e24


@dataclass(frozen=True)
class Column:
    """One column of the contract: NumPy dtype, least and largest value, and whether nulls are allowed."""

    dtype: type
    least: float = -np.inf
    largest: float = np.inf
    nullable: bool = False
    open_below: bool = False
    unit: str = ""

    def outside(self, array: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which values are out of bounds."""
        below = array <= self.least if self.open_below else array < self.least
        return np.asarray(below | (array > self.largest))

    def holds(self, array: npt.NDArray[Any]) -> bool:
        """Whether all values are within the bounds, in two passes that write nothing. False for an empty array."""
        if len(array) == 0:
            return False
        least, largest = array.min(), array.max()  # NaN if any value is
        above = least > self.least if self.open_below else least >= self.least
        return bool(above and largest <= self.largest)

    @property
    def bounds(self) -> str:
        """The bounds and the unit, for messages."""
        return f"{'(' if self.open_below else '['}{self.least}, {self.largest}]{self.unit}"


CONTRACT: dict[str, Column] = {
    "id": Column(np.uint64),
    "query_id": Column(np.uint64),
    "ef_search": Column(np.int64, 1, MAX_COUNT),
    "n_probes": Column(np.int64, 1, MAX_COUNT),
    "context_tokens": Column(np.int64, 1, MAX_COUNT),
    "temperature": Column(np.float32, 0, MAX_TEMPERATURE),
    "precision": Column(np.float32, 0, 1),
    "recall": Column(np.float32, 0, 1),
    "latency_us": Column(np.int64, 0, MAX_INT64),
    "cost": Column(np.float32, 0, MAX_COST),
    "rating": Column(np.int8, 1, 5, nullable=True),
    # the years 1 to 9999: timestamps in milliseconds fall outside
    "timestamp": Column(np.int64, -62_135_596_800, 253_402_300_799, unit=" in UTC seconds"),
    "propensity": Column(np.float32, 0, 1, open_below=True),
    "session": Column(np.uint64, nullable=True),
}
FEATURE = Column(np.float32)


def rule_of(name: str) -> Column:
    """The rule of a column: the contract's, or else that of a numeric feature."""
    return CONTRACT.get(name, FEATURE)


def embedding_dim(kind: pa.DataType, source: str) -> int | None:
    """The dimension D that the embedding column's type fixes; None for lists. Raises DataError for other types."""
    if pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type) and kind.list_size > 0:
        return int(kind.list_size)
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width > 0 and kind.byte_width % 4 == 0:
        return int(kind.byte_width // 4)
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_floating(kind.value_type):
        return None
    raise DataError(
        f"{source}: query_embedding is {kind}; store fixed_size_list or list of half, float or double, "
        "or fixed_size_binary of 4 bytes a dimension"
    )


def list_dim(column: pa.Array) -> int | None:
    """The most common length in a column of lists; None where every row is null or empty."""
    lengths = pc.drop_null(pc.list_value_length(column)).to_numpy(zero_copy_only=False)
    values, count = np.unique(lengths[lengths > 0], return_counts=True)
    return int(values[count.argmax()]) if len(values) else None


def decode_embeddings(column: pa.Array, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """(N, D) float32, and which rows have D values (N,); other rows are zero. Nulls inside a row become NaN.

    The matrix shares the column's memory where that is float32 and no row is null.
    """
    n = len(column)
    kind = column.type
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_fixed_size_list(kind):
        if pa.types.is_fixed_size_binary(kind):
            buffer = column.buffers()[1] if n else b""
            offset = column.offset * 4 * dim if n else 0
            matrix = np.frombuffer(buffer, np.float32, count=n * dim, offset=offset).reshape(n, dim)
        else:
            # .values ignores the slice and the nulls, so rows stay aligned; .flatten() would drop null rows
            matrix = _matrix(column.values.slice(column.offset * dim, n * dim), dim)
        if column.null_count == 0:
            return matrix, np.ones(n, dtype=bool)
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        return np.where(valid[:, None], matrix, np.float32(0)), valid
    right = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False) == dim
    if right.all():
        return _matrix(column.flatten(), dim), right
    out = np.zeros((n, dim), np.float32)
    out[right] = _matrix(column.filter(pa.array(right)).flatten(), dim)
    return out, right


def _matrix(flat: pa.Array, dim: int) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite, and the row thus a bad one
        matrix: npt.NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return matrix.reshape(-1, dim)


def decode_numbers(column: pa.Array, dtype: type, where: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """(N,) numbers, and which of them are null or not finite (set to 0). They are not yet cast to an integer `dtype`,
    which could hide a fraction or wrap around.

    Signed ids are reinterpreted as unsigned 64 bits; decimals are read as doubles, but not as ids. Raises DataError on
    a type that is not numeric.
    """
    if pa.types.is_dictionary(column.type):  # a pandas category
        column = column.dictionary_decode()
    if pa.types.is_decimal(column.type) and dtype is not np.uint64:  # what SQL engines make of a literal such as 0.25
        column = pc.cast(column, pa.float64())
    kind = column.type
    is_float = pa.types.is_floating(kind)
    if dtype is np.uint64 and not pa.types.is_integer(kind):
        raise DataError(f"{where} is {kind}; store ids as uint64")
    if not (is_float or pa.types.is_integer(kind)):
        raise DataError(f"{where} is {kind}; store it as a number")
    missing = _nulls(column)
    array = np.asarray(_filled(column).to_numpy(zero_copy_only=False))
    if dtype is np.uint64:
        return array.astype(np.uint64, copy=False), missing
    if dtype is np.float32:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
    if is_float:
        missing = missing | ~np.isfinite(array)
        array = np.where(missing, 0, array) if missing.any() else array
    return array, missing


def _nulls(column: pa.Array) -> npt.NDArray[np.bool_]:
    if column.null_count == 0:
        return np.zeros(len(column), dtype=bool)
    nulls: npt.NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
    return nulls


def _filled(column: pa.Array) -> pa.Array:
    return pc.fill_null(column, 0) if column.null_count else column


def decode_times(column: pa.Array, where: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(N,) UTC seconds, and which are null (0). Raises DataError on a type that is neither timestamp nor integer."""
    if pa.types.is_timestamp(column.type):
        column = pc.cast(column, pa.timestamp("s", column.type.tz), safe=False)
    elif not pa.types.is_integer(column.type):
        raise DataError(f"{where} is {column.type}; store a timestamp, or integer UTC seconds")
    elif pa.types.is_uint64(column.type):  # clip: beyond int64 it would wrap around to a time in the distant past
        column = pc.min_element_wise(column, pa.scalar(MAX_INT64, pa.uint64()), skip_nulls=False)
    seconds = _filled(pc.cast(column, pa.int64(), safe=False))
    return seconds.to_numpy(zero_copy_only=False), _nulls(column)


def decode_tiers(column: pa.Array, names: list[str], fixed: bool, where: str) -> npt.NDArray[np.int32]:
    """(N,) codes into `names`, which grows unless fixed; NULL_TIER for null or empty names, UNKNOWN_TIER for others."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string_view(kind):  # Polars writes Arrow files with this type
        column = pc.cast(column, pa.string())
    elif not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where} is {column.type}; store the tier's name as a string")
    encoded = column if pa.types.is_dictionary(column.type) else pc.dictionary_encode(column)
    try:
        local = encoded.dictionary.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} holds {error.object!r}, which is not UTF-8; store the tier's name in it") from error
    code = np.full(len(local) + 1, NULL_TIER, np.int32)
    for i, name in enumerate(local):
        if name in names:
            code[i] = names.index(name)
        elif name and not fixed:
            names.append(name)
            code[i] = len(names) - 1
        elif name:
            code[i] = UNKNOWN_TIER
    indices = pc.fill_null(pc.cast(encoded.indices, pa.int64()), len(local))
    return np.asarray(code[indices.to_numpy(zero_copy_only=False)])
