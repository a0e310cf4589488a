"""The k-means contestants of the suite gpu, ours and others': each runs a number of iterations from the same start.

Each takes x_ND (N, D) and start_KD (K, D), both float32, and returns the centroids (K, D).

Suffixes: N points, K centroids, D dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rb_gpu.learn.kmeans import kmeans

# ours: engine, precision of its coarse products, and the precision whose peak product rate it is compared with
ENGINES = (
    ("torch", "ieee", "fp32"),
    ("triton", "tf32", "tf32"),
    ("triton", "bf16", "bf16"),
    ("triton", "ieee", "fp32"),
)


def ours(engine: str, precision: str, budget: int | None) -> Callable[[Tensor, Tensor, int], Tensor]:
    """rb_gpu.learn.kmeans as a contestant. budget: bytes of points that may be on the device, None for no limit."""

    def fit(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Tensor:
        found = kmeans(
            x_ND, len(start_KD), init=start_KD, max_iter=iterations, epsilon=0.0, device=start_KD.device.type,
            memory_budget=budget, engine=engine, precision=precision,
        )  # fmt: skip
        centroids: Tensor = found.centroids
        return centroids.to(start_KD.device)

    return fit


def faiss(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Tensor:
    """faiss.Kmeans on all points, on the GPU if start_KD is there. Raises ImportError if this Faiss has no GPU code."""
    import faiss as library

    on_gpu = start_KD.device.type == "cuda"
    if on_gpu and not hasattr(library, "StandardGpuResources"):
        raise ImportError("this Faiss has no GPU code", name="faiss-gpu")
    model = library.Kmeans(
        x_ND.shape[1], len(start_KD), niter=iterations, gpu=on_gpu, max_points_per_centroid=10**9,
        min_points_per_centroid=1,
    )  # fmt: skip
    model.train(x_ND.cpu().numpy(), init_centroids=start_KD.cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(model.centroids)).to(start_KD.device)


def flash_kmeans(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Tensor:
    """flash_kmeans.batch_kmeans_Euclid with a batch of one; it overwrites its start, so that it gets a copy."""
    from flash_kmeans import batch_kmeans_Euclid

    _, centroids, _ = batch_kmeans_Euclid(
        x_ND[None], len(start_KD), max_iters=iterations, tol=0.0, init_centroids=start_KD[None].clone()
    )
    found: Tensor = centroids[0]
    return found


def cuvs(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Tensor:
    """cuvs.cluster.kmeans.fit; it overwrites its start, so that it gets a copy."""
    from cuvs.cluster.kmeans import KMeansParams, fit

    params = KMeansParams(n_clusters=len(start_KD), init_method="Array", max_iter=iterations, tol=0.0)
    centroids: Any = fit(params, x_ND, centroids=start_KD.clone()).centroids
    return torch.as_tensor(centroids, device=start_KD.device)


PEERS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"faiss": faiss, "flash-kmeans": flash_kmeans, "cuVS": cuvs}
