"""Run in test_distributed: k-means on this rank's rows; rank 0 writes what all found, or rank 1 dies of it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import numpy as np
import torch
from pretend import pretended

from rb_gpu.learn.distributed import Ranks, launched
from rb_gpu.learn.kmeans import kmeans


def main() -> None:
    source, out, k, metric, seed, device = sys.argv[1:]
    # gloo stands in for NCCL where they pretend to be on GPUs
    with launched(torch.device("cpu")) as ranks, pretended() if device == "cuda" else nullcontext():
        share(ranks, np.load(source), out, int(k), metric, int(seed), device)


def share(ranks: Ranks, data: dict[str, np.ndarray], out: str, k: int, metric: str, seed: int, device: str) -> None:
    if out == "die" and ranks.rank == 1:
        os._exit(7)
    # ranks hold different numbers of rows
    edges = np.linspace(0, 1, ranks.size + 1) ** 1.3 * len(data["x"])
    rows = slice(int(edges[ranks.rank]), int(edges[ranks.rank + 1]))
    start = torch.from_numpy(data["start"]) if "start" in data else "k-means++"
    result = kmeans(
        torch.from_numpy(data["x"][rows]), k, start, metric=metric, seed=seed, weight=data["weight"][rows], n_init=2,
        device=device, ranks=ranks, engine="auto" if device == "cpu" else "torch",
    )  # fmt: skip
    labels = ranks.joined(result.labels)
    if ranks.rank == 0:
        np.savez(out, centroids=result.centroids, labels=labels, inertia=result.inertia, n_iter=result.n_iter)


if __name__ == "__main__":
    main()
