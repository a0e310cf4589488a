"""Reads a safetensors file as NumPy views of its bytes, without copies and without trusting its header, and writes one.

The format: github.com/huggingface/safetensors, section Format. Its own loader copies every array, which would defeat a
memory map, and its own writer aligns arrays so that a product over the map is a fifth slower.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_HEADER_BYTES = 2**20
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CACHE_LINE = 64


def no_constant(name: str) -> Any:
    """Refuses NaN and Infinity in json.loads, because they are no JSON. Raises ValueError."""
    raise ValueError(f"{name} is not JSON")


def tensors_content(arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str] | None = None) -> bytes:
    """The content of a file of these arrays, readable by `map_tensors` and by safetensors; it depends on the arguments
    alone.

    Arrays of 4-byte numbers whose size is a multiple of CACHE_LINE, such as most matrices of embeddings, begin at a
    cache line of the mapped file. Raises ValueError for a dtype that safetensors has no name for.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    parts, wide, end = [], 0, 0
    # widest dtype first, so that all are aligned to their own width; then those that fill whole cache lines, before any
    # that would shift them off one
    for name in sorted(arrays, key=lambda n: (-arrays[n].itemsize, arrays[n].nbytes % CACHE_LINE > 0, n)):
        array = arrays[name]
        code = CODES.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise ValueError(f"array {name} is of {array.dtype}, which safetensors has no name for")
        header[name] = {"dtype": code, "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        parts.append(array.astype(DTYPES[code], copy=False).tobytes())
        end += array.nbytes
        wide = end if array.itemsize == 8 else wide
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + wide) % CACHE_LINE)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def map_tensors(content: Any) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a file by name, as read-only views of `content` (bytes or a memory map).

    Raises ValueError if the header is damaged, or if its arrays do not tile the rest of the file exactly.
    """
    size = len(content)
    length = int.from_bytes(content[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError("the header is longer than the file, or than any that a job writes")
    try:
        header = json.loads(bytes(content[8 : 8 + length]), parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    header.pop("__metadata__", None)
    arrays = {}
    end = 0
    for name, (dtype, shape, start, stop) in sorted(
        ((name, _entry(name, entry)) for name, entry in header.items()), key=lambda item: item[1][2:]
    ):
        count = math.prod(shape)
        if start != end or stop - start != count * dtype.itemsize or stop > size - 8 - length:
            raise ValueError(f"array {name} of shape {shape} is not where the header says")
        if (8 + length + start) % dtype.itemsize:
            raise ValueError(f"array {name} is not aligned to its {dtype.itemsize} bytes")
        array = np.frombuffer(content, dtype, count, 8 + length + start) if count else np.empty(0, dtype)
        if sys.byteorder == "big":
            array = array.astype(dtype.newbyteorder("="))
        arrays[name] = array.reshape(shape)
        arrays[name].flags.writeable = False
        end = stop
    if end != size - 8 - length:
        raise ValueError("the file is longer than its arrays")
    return arrays


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Dtype, shape, start and stop of an array. Raises ValueError unless they are valid."""
    try:
        dtype, shape, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the header's entry for {name!r} is damaged") from None
    if len(shape) > 8 or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise ValueError(f"the header's entry for {name!r} is damaged")
    return dtype, shape, start, stop
