"""One rank of test_distributed: runs k-means on this rank's rows for each case. Rank 0 writes the joint result; in the
case "die", rank 1 exits instead.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from pretend import pretended

from rb_gpu.learn.distributed import Ranks, launched
from rb_gpu.learn.kmeans import kmeans


def main() -> None:
    k, seed, *cases = sys.argv[1:]
    # gloo replaces NCCL for ranks on simulated GPUs
    with launched(torch.device("cpu")) as ranks:
        for case in cases:
            metric, device, folder = case.split(":", 2)
            with pretended() if device == "cuda" else nullcontext():
                share(ranks, Path(folder), int(k), metric, int(seed), device)


def share(ranks: Ranks, folder: Path, k: int, metric: str, seed: int, device: str) -> None:
    if folder.name == "die" and ranks.rank == 1:
        os._exit(7)
    data = np.load(folder / "data.npz")
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
        np.savez(
            folder / "out.npz", centroids=result.centroids, labels=labels, inertia=result.inertia, n_iter=result.n_iter
        )


if __name__ == "__main__":
    main()
