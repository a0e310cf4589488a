"""The rows that this rank holds, among those of all ranks. Suffixes: N points here, M requested rows, D dims."""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.row_kernels import row_peaks
from rb_gpu.learn.streaming import chunks
from rb_gpu.learn.workers import Workers


class Shard:
    """Points x (N, D) float32, on the host or the device, and weights (N,) float32 on the device.

    first is the global number of the first row here and count the number of rows on all ranks; outside this process
    rows are known by their global number. budget: bytes of host points that may be copied to the device at once.
    engine: what sums them on a device, triton or torch.
    """

    def __init__(
        self, x_ND: Tensor, weight_N: Tensor, ranks: Ranks, budget: int | None = None, engine: str = "torch"
    ) -> None:
        self.x_ND, self.weight_N, self.ranks, self.budget, self.engine = x_ND, weight_N, ranks, budget, engine
        self.first, self.count = ranks.place(len(x_ND))

    @property
    def device(self) -> torch.device:
        """Where weights, labels and centroids are."""
        return self.weight_N.device

    def here(self, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the global rows (M,) are here (M,) bool, and their local positions (M,), 0 for the others."""
        local_M = rows_M - self.first
        here_M = (local_M >= 0) & (local_M < len(self.x_ND))
        return here_M, torch.where(here_M, local_M, 0)

    def points(self, rows_M: Tensor) -> Tensor:
        """The points (M, D) of these global rows, on the device."""
        if self.ranks.size == 1:
            return self.x_ND[rows_M.to(self.x_ND.device)].to(self.device)
        here_M, local_M = self.here(rows_M)
        out_MD = torch.zeros(len(rows_M), self.x_ND.shape[1], dtype=self.x_ND.dtype, device=self.device)
        out_MD[here_M] = self.x_ND[local_M[here_M].to(self.x_ND.device)].to(self.device)
        return self.ranks.total(out_MD)

    def values(self, of_N: Tensor, rows_M: Tensor) -> Tensor:
        """The entries (M,) at these global rows of a tensor over the points (N,)."""
        here_M, local_M = self.here(rows_M)
        out_M = torch.zeros(len(rows_M), dtype=of_N.dtype, device=of_N.device)
        out_M[here_M] = of_N[local_M[here_M]]
        return self.ranks.total(out_M)

    def first_of_each(self, clock_N: Tensor, labels_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The point (K, D) of each label with the least clock (N,) float64, and which labels have a finite clock."""
        least_K = torch.full((k,), torch.inf, dtype=clock_N.dtype, device=clock_N.device)
        least_K.scatter_reduce_(0, labels_N, clock_N, "amin")
        least_K = self.ranks.joined(least_K[None]).amin(0)
        won_N = (clock_N == least_K[labels_N]) & torch.isfinite(clock_N)
        rows_N = torch.arange(self.first, self.first + len(won_N), device=won_N.device)
        row_K = torch.full((k,), -1, device=won_N.device)
        row_K.scatter_reduce_(0, labels_N, torch.where(won_N, rows_N, -1), "amax")
        row_K = self.ranks.joined(row_K[None]).amax(0)
        return self.points(row_K.clamp(min=0)), row_K >= 0

    def sample(self, count: int) -> Tensor:
        """About `count` evenly spaced points (S, D) of all ranks."""
        step = max(1, self.count // count)
        return self.ranks.joined(self.x_ND[-self.first % step :: step]).to(self.device)


def peaks(x_ND: Tensor, crew: Workers | None, device: torch.device, budget: int | None = None) -> tuple[Tensor, Tensor]:
    """The largest |coordinate| and the norm of each row (N,) float32, on the device; NaN or inf in x propagates."""
    peak_N, norm_N = torch.empty(2, len(x_ND), dtype=torch.float32, device=device).unbind()
    if crew is None:
        for tile, x_TD in chunks(x_ND, 2 * x_ND.shape[1], device, budget=budget):
            peak_N[tile], norm_N[tile] = x_TD.abs().amax(1), x_TD.norm(dim=1)
        return peak_N, norm_N
    arrays = (x_ND.numpy(), x_ND.numpy().view("int32"))
    outputs = (peak_N.numpy().view("int32"), norm_N.numpy())
    crew.each(len(x_ND), 2048, lambda _worker, start, stop: row_peaks(*arrays, start, stop, *outputs))
    return peak_N, norm_N
