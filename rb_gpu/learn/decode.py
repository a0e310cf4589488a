"""Arrow embedding columns of every kind in the contract to float32 matrices. Suffixes: N rows, D dims."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rb_gpu.errors import DataError


def embedding_dim(column: pa.Array, source: str) -> int:
    """D of a column: what its type fixes, or the most common length of its lists. Raises DataError on another type."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) and _is_float(kind.value_type):
        return int(kind.list_size)
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width % 4 == 0:
        return int(kind.byte_width // 4)
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_float(kind.value_type):
        lengths = pc.drop_null(pc.list_value_length(column)).to_numpy(zero_copy_only=False)
        if len(lengths) == 0:
            raise DataError(f"{source}: query_embedding is null in every row; export the embeddings")
        return int(np.bincount(lengths).argmax())
    raise DataError(
        f"{source}: query_embedding is {kind}; store fixed_size_list or list of half, float or double, "
        "or fixed_size_binary of 4 bytes a dimension"
    )


def _is_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind))


def decode_embeddings(column: pa.Array, dim: int, source: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """(N, D) float32, and which rows have D values (N,); the others are zero. Nulls inside a row come out as NaN."""
    n = len(column)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    kind = column.type
    if pa.types.is_fixed_size_binary(kind):
        if kind.byte_width != 4 * dim:
            raise DataError(f"{source}: query_embedding has {kind.byte_width // 4} dimensions, not {dim}")
        raw = np.frombuffer(column.buffers()[1], np.float32, count=n * dim, offset=column.offset * 4 * dim)
        return np.where(valid[:, None], raw.reshape(n, dim), np.float32(0)), valid
    if pa.types.is_fixed_size_list(kind):
        # .values ignores both the slice and the nulls, which keeps rows aligned where .flatten() would drop null rows
        flat = column.values.slice(column.offset * dim, n * dim)
        return _matrix(flat, n, dim, valid), valid
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    right = lengths == dim
    out = np.zeros((n, dim), np.float32)
    out[right] = _matrix(column.filter(pa.array(right)).flatten(), int(right.sum()), dim, None)
    return out, right


def _matrix(flat: pa.Array, n: int, dim: int, valid: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float32]:
    matrix: npt.NDArray[np.float32] = flat.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(n, dim)
    if valid is not None and not valid.all():
        matrix = np.where(valid[:, None], matrix, np.float32(0))
    return matrix
