"""Several processes on disjoint rows of one table, ordered by rank; in a single process every call is the identity."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rb_gpu.errors import RbGpuError

# how long a rank waits for one that reads from a slower disk; torchrun notices at once if that one has died
PATIENCE = timedelta(hours=2)

Value = TypeVar("Value")


class Ranks:
    """One process among those that share the points. Every rank must make the same calls in the same order.

    group: the process group, if it is not all processes; lead: the global rank of its first process.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, lead: int = 0) -> None:
        self.rank, self.size, self._group, self._lead = rank, size, group, lead

    def of_node(self) -> Ranks:
        """The ranks that torchrun started on this machine, which see the same files and the same memory."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.size == 1 or local == self.size:
            return self
        groups = [
            dist.new_group(list(range(lead, lead + local)), backend="gloo") for lead in range(0, self.size, local)
        ]
        node = self.rank // local
        return Ranks(self.rank % local, local, groups[node], node * local)

    def share(self, count: int) -> slice:
        """The share of `count` rows that is this rank's, where every rank has all of them."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, computed in place and returned; exact for integers."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def largest(self, value: float) -> float:
        """The largest over all ranks."""
        return max(self.gathered(value))

    def sum_of(self, value: float) -> float:
        """The sum over all ranks, added in rank order."""
        return sum(self.gathered(value))

    def place(self, count: int) -> tuple[int, int]:
        """How many rows the lower ranks hold together, and how many all ranks hold."""
        counts = self.gathered(count)
        return sum(counts[: self.rank]), sum(counts)

    def joined(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all ranks, in rank order."""
        if self.size == 1:
            return rows
        return torch.cat(self.gathered(rows.cpu())).to(rows.device)

    def of_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, self._lead, self._group)
        return values[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all ranks, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self._group)
        return values

    def wait(self) -> None:
        """Blocks until every rank has called it."""
        if self.size > 1:
            dist.barrier(self._group)


@contextmanager
def launched(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started (NCCL between GPUs, one each; gloo between CPUs), or this process alone.

    Raises RbGpuError where another rank ends early.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Python objects and host tensors always use gloo: NCCL would route them through a GPU, or refuse them
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    rank = dist.get_rank()
    try:
        yield Ranks(rank, size)
    except RuntimeError as error:
        if "Connection" not in str(error) and not isinstance(error, dist.DistError):
            raise
        raise RbGpuError(
            f"rank {rank} of {size} lost another rank ({str(error).splitlines()[0]}); the log of the rank that "
            "ended first says why; nothing was published"
        ) from error
    finally:
        dist.destroy_process_group()
