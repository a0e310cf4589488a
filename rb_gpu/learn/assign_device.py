"""The nearest centroid of every point on a GPU, which favours regular work: by Triton or by matrix products in torch.

The GPU counterpart of `assign.Assignment`. engine=triton gives the exact labels (triton_assign.py). engine=torch may
choose centroid c over the nearer one b where half their squared distances to x differ by at most
(2D + 8)·2^-24·(||x||² + max(||b||², ||c||²)), with norms about the middle; this is the rounding error of float32
products. Points may lie on the host while the rest is on the device: they are then streamed in chunks (streaming.py),
so that data larger than the GPU's memory still fit.

Suffixes: N points, K centroids, D dims, T points of one tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rb_gpu.learn.distances import lower_distances
from rb_gpu.learn.streaming import chunks


class DeviceAssignment:
    """labels (N,) int64 and d2 (N,) float32 on the device: each point's nearest centroid so far; initially -1 and inf.

    x_ND: (N, D) float32 on the host or the device, never modified. middle_D: a point in the middle of the data, on the
    device. budget: bytes of host points that may be copied to the device at once. engine: triton or torch. precision:
    of Triton's coarse products.
    """

    def __init__(
        self,
        x_ND: Tensor,
        middle_D: Tensor,
        budget: int | None = None,
        engine: str = "torch",
        precision: str = "tf32",
    ) -> None:
        self.x_ND, self.middle_D, self.budget = x_ND, middle_D, budget
        self.engine, self.precision = engine, precision
        self.device = middle_D.device
        self.labels_N = torch.full((len(x_ND),), -1, dtype=torch.int64, device=self.device)
        self.d2_N = torch.full((len(x_ND),), torch.inf, dtype=torch.float32, device=self.device)

    def reset(self) -> None:
        """Discards labels and distances."""
        self.labels_N.fill_(-1)
        self.d2_N.fill_(torch.inf)

    def lower(self, centroids_KD: Tensor, first: int) -> None:
        """Lowers labels and distances by the centroids (K, D) float32 from row `first` on; earlier ones are done."""
        held = (self.x_ND, self.middle_D, self.d2_N, self.labels_N)
        if self.engine == "triton":
            # only CUDA builds of torch ship triton
            from rb_gpu.learn.triton_assign import lower_exactly

            lower_exactly(*held, centroids_KD, first, self.precision, self.budget)
        else:
            lower_distances(*held, centroids_KD[first:], first, self.budget)

    def assign(self, centroids_KD: Tensor, moved_K: Tensor | None = None) -> None:
        """Assigns to the nearest of these centroids (K, D) float32; moved_K is ignored, as it saves nothing here."""
        self.reset()
        self.lower(centroids_KD, 0)

    def settle(self, centroids_KD: Tensor) -> None:
        """Does nothing: d2 always belongs to the current centroids."""

    def nearer_halves(self, halves_2KD: Tensor, half_N: Tensor, d2_N: Tensor) -> None:
        """Writes the nearer of the halves 2l and 2l + 1 of each point's cluster l, and its squared distance."""
        for tile, x_TD in chunks(self.x_ND, 4 * self.x_ND.shape[1], self.device, budget=self.budget):
            left_T = 2 * self.labels_N[tile]
            left_d2_T = (x_TD - halves_2KD[left_T]).square().sum(1)
            right_d2_T = (x_TD - halves_2KD[left_T + 1]).square().sum(1)
            half_N[tile] = left_T + (right_d2_T < left_d2_T)
            d2_N[tile] = torch.minimum(left_d2_T, right_d2_T)
