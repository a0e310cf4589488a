"""Checks the bytes of an index.faiss before Faiss reads them, since Faiss trusts its input, even to open other files.

The layouts are those of faiss/impl/index_write.cpp for the four kinds that a job writes: IndexFlatIP, IndexIVFFlat over
an IndexFlatIP, IndexHNSWSQ and IndexHNSWCagra. Anything else is refused.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

# largest breadth of a search (nprobe, efSearch); larger ones take memory out of proportion
MAX_BREADTH = 2**16
MAX_LEVELS = 64
BITS_8 = 0
FLOAT32 = 0


def check_index(content: Any, leaves: int, dim: int) -> None:
    """Raises ValueError unless `content` is an inner-product index of that many leaves and dims which refers to nothing
    outside its own content.
    """
    reader = _Reader(content)
    kind = reader.code()
    if kind == "IxFI":
        _flat(reader, leaves, dim)
    elif kind == "IwFl":
        _inverted_file(reader, leaves, dim)
    elif kind == "IHNs":
        _header(reader, leaves, dim)
        _graph(reader, leaves)
        _bytes(reader, leaves, dim)
    elif kind == "IHc2":
        _cagra(reader, leaves, dim)
    else:
        raise ValueError(f"it begins with {kind!r}, which no job writes")
    if reader.at != len(content):
        raise ValueError("it is longer than its index")


class _Reader:
    """Reads one field after another; every length is compared with what is left before anything is allocated for it."""

    def __init__(self, content: Any) -> None:
        self._content, self.at = content, 0

    def take(self, layout: str) -> Any:
        """One number, by its struct code: i int32, q int64, f float32, B byte."""
        width = struct.calcsize("<" + layout)
        self._need(width)
        value = struct.unpack_from("<" + layout, self._content, self.at)[0]
        self.at += width
        return value

    def code(self) -> str:
        """The four characters that name a type."""
        self._need(4)
        self.at += 4
        return bytes(self._content[self.at - 4 : self.at]).decode("latin-1")

    def array(self, dtype: str, count: int) -> npt.NDArray[Any]:
        """The next `count` numbers, as a view."""
        width = np.dtype(dtype).itemsize
        require(0 <= count <= len(self._content) // width, "a length is over the file's")
        self._need(count * width)
        values = np.frombuffer(self._content, dtype, count, self.at) if count else np.empty(0, dtype)
        self.at += count * width
        return values

    def vector(self, dtype: str) -> npt.NDArray[Any]:
        """A length, and that many numbers."""
        return self.array(dtype, self.take("q"))

    def _need(self, width: int) -> None:
        require(self.at + width <= len(self._content), "it is truncated")


def require(ok: bool | np.bool_, what: str) -> None:
    """Raises ValueError with the message `what` unless ok."""
    if not ok:
        raise ValueError(what)


def _header(reader: _Reader, leaves: int, dim: int) -> None:
    found = reader.take("i"), reader.take("q")
    require(found == (dim, leaves), f"it holds {found[1]} patterns of {found[0]} dims, the bank {leaves} of {dim}")
    reader.take("q"), reader.take("q")  # unused
    # 0 is Faiss's METRIC_INNER_PRODUCT
    trained, metric = reader.take("B"), reader.take("i")
    require(trained == 1 and metric == 0, "it is not trained, or not for inner products")


def _flat(reader: _Reader, leaves: int, dim: int) -> None:
    _header(reader, leaves, dim)
    vectors = reader.vector("<f4")
    require(len(vectors) == leaves * dim, f"it holds {len(vectors)} numbers, not {leaves} x {dim}")
    require(np.isfinite(vectors).all(), "a vector is not finite")


def _inverted_file(reader: _Reader, leaves: int, dim: int) -> None:
    _header(reader, leaves, dim)
    nlist, nprobe = reader.take("q"), reader.take("q")
    require(1 <= nlist <= leaves and 1 <= nprobe <= MAX_BREADTH, f"nlist={nlist} or nprobe={nprobe} is out of bounds")
    require(reader.code() == "IxFI", "its quantizer is not flat")
    _flat(reader, nlist, dim)
    require(reader.take("B") == 0 and len(reader.vector("<i8")) == 0, "it has a direct map")
    require(reader.code() == "ilar", "its lists are not in the file")
    require((reader.take("q"), reader.take("q")) == (nlist, 4 * dim), "its lists are of other vectors")
    require(reader.code() == "full", "its lists are sparse")
    sizes = reader.vector("<u8")
    require(
        len(sizes) == nlist and (sizes <= leaves).all() and sizes.sum() == leaves, "its lists do not hold every leaf"
    )
    seen = np.zeros(leaves, dtype=bool)
    for size in sizes.tolist():
        require(np.isfinite(reader.array("<f4", size * dim)).all(), "a vector is not finite")
        rows = reader.array("<i8", size)
        require(((rows >= 0) & (rows < leaves)).all(), "a list points outside")
        seen[rows] = True
    require(seen.all(), "its lists do not hold every leaf")


def _cagra(reader: _Reader, leaves: int, dim: int) -> None:
    """A graph built on a GPU over float32 vectors. Without upper levels, every search would start at random."""
    _header(reader, leaves, dim)
    fixed_degree, base_only = reader.take("B"), reader.take("B")
    entries, numbers = reader.take("i"), reader.take("i")
    ok = fixed_degree <= 1 and base_only == 0 and entries >= 1 and numbers == FLOAT32
    require(ok, "it has no upper levels, or its vectors are not float32")
    _graph(reader, leaves)
    require(reader.code() == "IxFI", "its vectors are not float32")
    _flat(reader, leaves, dim)


def _graph(reader: _Reader, leaves: int) -> None:
    probability, links = reader.vector("<f8"), reader.vector("<i4").astype(np.int64)
    levels, offsets = reader.vector("<i4").astype(np.int64), reader.vector("<u8")
    neighbours = reader.vector("<i4")
    entry, top, breadth_built, breadth, beam = (reader.take("i") for _ in range(5))
    # links[l]: number of neighbours that a node has on all levels below l
    sized = 1 <= len(links) - 1 <= MAX_LEVELS and len(probability) == len(links) - 1
    require(sized and links[0] == 0 and (np.diff(links) > 0).all(), "its levels are out of order")
    require(
        len(levels) == leaves and ((levels >= 1) & (levels < len(links))).all(), "a node's levels are out of bounds"
    )
    ends = np.cumsum(links[levels])
    fits = len(offsets) == leaves + 1 and offsets[0] == 0 and (offsets[1:] == ends.astype(np.uint64)).all()
    require(fits and len(neighbours) == ends[-1], "its neighbours are not where its levels say")
    require(((neighbours >= -1) & (neighbours < leaves)).all(), "a neighbour points outside")
    require(
        0 <= entry < leaves and 0 <= top == levels.max() - 1 and levels[entry] == top + 1, "its entry is not a top node"
    )
    _check_upper_levels(neighbours, levels, links, ends)
    require(1 <= breadth <= MAX_BREADTH and breadth_built >= 1 and beam >= 1, "its breadth is out of bounds")


def _bytes(reader: _Reader, leaves: int, dim: int) -> None:
    require(reader.code() == "IxSQ", "its vectors are not in 8 bits")
    _header(reader, leaves, dim)
    kind, _, _ = reader.take("i"), reader.take("i"), reader.take("f")
    require(kind == BITS_8 and (reader.take("q"), reader.take("q")) == (dim, dim), "its vectors are not in 8 bits")
    ranges = reader.vector("<f4")
    require(len(ranges) == 2 * dim and np.isfinite(ranges).all(), "its ranges are not finite")
    require(len(reader.vector("|u1")) == leaves * dim, f"it does not hold {leaves} x {dim} numbers")


def _check_upper_levels(
    neighbours: npt.NDArray[Any], levels: npt.NDArray[Any], links: npt.NDArray[Any], ends: npt.NDArray[Any]
) -> None:
    """A neighbour on a level must itself be on that level, because Faiss continues from it to its neighbours there."""
    starts = ends - links[levels]
    for level in range(1, int(levels.max())):
        nodes = np.flatnonzero(levels > level)
        places = starts[nodes, None] + np.arange(links[level], links[level + 1])
        found = neighbours[places]
        require((levels[found[found >= 0]] > level).all(), "a neighbour is missing on its level")
