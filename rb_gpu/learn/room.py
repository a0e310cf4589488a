"""Allocates the embeddings of a table: in memory, or in a memory-mapped file that the system pages in and out.

A file is used beyond the memory budget, and for embeddings that the processes of one node share. It is unlinked once it
is open, so that a killed job leaves nothing. Suffixes: N rows, D dims, M kept rows.
"""

from __future__ import annotations

import errno
import logging
import os
import tempfile
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rb_gpu.errors import DataError
from rb_gpu.learn.blocks import Matrix
from rb_gpu.learn.devices import free_memory
from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.row_kernels import permute_rows

log = logging.getLogger(__name__)

# default share of the free memory for embeddings: as much again is left to the system's cache
MEMORY_SHARE = 0.5
MOVE_ROWS = 4096


@dataclass(frozen=True)
class Room:
    """Allocates matrices. budget: bytes of one that may lie in memory; None: half of what is free. scratch: the folder
    for files; None: the system's temporary folder. ranks: the processes of this node, which must make the same calls;
    each then sees the whole matrix, and only the first of them reorders its rows.
    """

    budget: int | None = None
    scratch: str | None = None
    ranks: Ranks = field(default_factory=Ranks)

    def matrix(self, rows: int, dim: int) -> Matrix:
        """An uninitialised float32 matrix (rows, dim). Raises DataError where there is no room for its file."""
        size = 4 * rows * dim
        budget = int(MEMORY_SHARE * free_memory()) if self.budget is None else self.budget
        if size <= budget and self.ranks.size == 1:
            return np.empty((rows, dim), np.float32)
        folder = self.scratch or tempfile.gettempdir()
        try:
            with self._file(folder, size) as file:
                mapped = np.memmap(file, np.float32, "r+", shape=(rows, dim))
        except OSError as error:
            reason = "not enough free space" if error.errno == errno.ENOSPC else error.strerror
            raise DataError(
                f"device.scratch={folder} cannot take {size / 2**30:.2f} GiB of embeddings, which exceed "
                f"device.memory_budget={budget} or are shared by processes ({reason}); name another folder, or raise "
                "the budget"
            ) from error
        if self.ranks.rank == 0:
            log.info("%.2f GiB of embeddings lie in a file in %s", size / 2**30, folder)
        return np.asarray(mapped)

    def _file(self, folder: str, size: int) -> IO[bytes]:
        """An unlinked file of `size` bytes, the same one in every rank."""
        if self.ranks.size == 1:
            file: IO[bytes] = tempfile.TemporaryFile(prefix="rb_gpu-", dir=folder)  # noqa: SIM115 - as below
            _reserve(file, size)
            return file
        if self.ranks.rank == 0:
            descriptor, name = tempfile.mkstemp(prefix="rb_gpu-", dir=folder)
            file = os.fdopen(descriptor, "r+b")
            _reserve(file, size)
            self.ranks.of_first(name)
        else:
            name = self.ranks.of_first(None)
            file = open(name, "r+b")  # noqa: PTH123, SIM115 - the caller closes it
        self.ranks.wait()
        if self.ranks.rank == 0:
            os.unlink(name)  # noqa: PTH108
        return file

    def keep(self, x_ND: Matrix, rows_M: npt.NDArray[np.int64]) -> Matrix:
        """Moves the rows (M,), ascending, to the front in place, as a copy would double the memory; returns a view."""
        kept = len(rows_M)
        if kept and rows_M[-1] != kept - 1:
            if self.ranks.rank == 0:
                to_front(x_ND, rows_M)
            self.ranks.wait()
        return x_ND[:kept]

    def sort(self, x_ND: Matrix, order_N: npt.NDArray[np.int64]) -> None:
        """Reorders rows in place so that row order[i] comes to position i; rows already in place are not moved."""
        if self.ranks.rank == 0:
            permute_rows(x_ND, order_N.copy(), np.empty(x_ND.shape[1], np.float32))
        self.ranks.wait()


def to_front(array: npt.NDArray[Any], rows_M: npt.NDArray[np.int64]) -> None:
    """Moves the rows (M,), which must ascend, to the front, in place."""
    for start in range(0, len(rows_M), MOVE_ROWS):
        array[start : min(start + MOVE_ROWS, len(rows_M))] = array[rows_M[start : start + MOVE_ROWS]]


def _reserve(file: IO[bytes], size: int) -> None:
    """Allocates the disk space now: writing to a map of a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)
