"""Several processes on disjoint rows of one table, in the order of their ranks; alone, every call is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rb_gpu.errors import RbGpuError


class Ranks:
    """One process among those that share the points. Every rank must make the same calls in the same order."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place and returned; exact for integers."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, value: float) -> float:
        """The largest over all ranks."""
        return max(self.each(value))

    def sum_of(self, value: float) -> float:
        """The sum over all ranks, added in the order of the ranks."""
        return sum(self.each(value))

    def place(self, count: int) -> tuple[int, int]:
        """How many rows the ranks before this one hold, and how many all of them do."""
        counts = [int(c) for c in self.each(count)]
        return sum(counts[: self.rank]), sum(counts)

    def joined(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all ranks, in their order."""
        if self.size == 1:
            return rows
        parts: list[Tensor | None] = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat([part for part in parts if part is not None]).to(rows.device)

    def of_first(self, value: Any) -> Any:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def each(self, value: float) -> list[float]:
        """The value of every rank, in their order."""
        if self.size == 1:
            return [value]
        values: list[float] = [0.0] * self.size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def launched(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started (NCCL on GPUs, one each; gloo on CPUs), or this process alone.

    Raises RbGpuError where another rank ends early.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank()
    try:
        yield Ranks(rank, size)
    except RuntimeError as error:
        if "Connection" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise RbGpuError(
            f"rank {rank} of {size} lost another rank ({str(error).splitlines()[0]}); the messages of the one that "
            "ended first say why; nothing was published"
        ) from error
    finally:
        dist.destroy_process_group()
