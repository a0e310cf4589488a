"""Run by torchrun in test_distributed: k-means on this rank's rows; rank 0 writes what all ranks found, joined."""

from __future__ import annotations

import sys

import numpy as np
import torch
import torch.distributed as dist

from rb_gpu.learn.distributed import Ranks
from rb_gpu.learn.kmeans import kmeans


def main() -> None:
    source, out, k, metric, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    data = np.load(source)
    # ranks hold different numbers of rows
    edges = np.linspace(0, 1, ranks.size + 1) ** 1.3 * len(data["x"])
    rows = slice(int(edges[ranks.rank]), int(edges[ranks.rank + 1]))
    result = kmeans(
        torch.from_numpy(data["x"][rows]), k, metric=metric, seed=seed, weight=data["weight"][rows], n_init=2,
        device="cpu", ranks=ranks,
    )  # fmt: skip
    labels = ranks.joined(result.labels)
    if ranks.rank == 0:
        np.savez(out, centroids=result.centroids, labels=labels, inertia=result.inertia, n_iter=result.n_iter)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
