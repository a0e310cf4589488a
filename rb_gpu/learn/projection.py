"""Places the patterns' centroids, and a sample of their queries, on a plane of two principal axes, for the report.

Suffixes: Q queries, S sampled queries, P leaves, D dims, A axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]

SAMPLE_QUERIES = 2000
# axes beyond the two wanted, so that the subspace iteration converges fast, and its rounds
SPARE_AXES, ROUNDS = 6, 16


@dataclass(frozen=True)
class Projection:
    """centroids_P2, queries_S2: float32 coordinates on the two axes. leaf_S: the leaf of each sampled query. share: the
    fraction of the sampled queries' variance along the two axes, 0 to 1; NaN where they do not vary.

    A centroid of cosine k-means is only a direction, and the mean of its queries is the shorter the more they spread.
    All centroids are therefore drawn at one length, fitted by least squares to the sampled queries, so that patterns
    lie among their queries.
    """

    centroids_P2: Matrix
    queries_S2: Matrix
    leaf_S: Rows
    share: float


def project(
    x_QD: Matrix, label_Q: Rows, centroids_PD: Matrix, support_P: Rows, seed: int, device: torch.device
) -> Projection:
    """Projects on the principal components of the centroids (P, D), weighted by their support; computed on the device.

    These show what distinguishes patterns; the components of the queries would mostly show what patterns share. At most
    SAMPLE_QUERIES of the queries that have a leaf (label_Q >= 0) are drawn at random.
    """
    drawn = torch.Generator().manual_seed(seed)
    members = np.flatnonzero(label_Q >= 0)
    order = torch.randperm(len(members), generator=drawn)[:SAMPLE_QUERIES].numpy()
    sample = np.sort(members[order])
    weight_P = torch.from_numpy(support_P / support_P.sum()).to(device, torch.float32)
    # a copy: the bank's own arrays may be read-only
    centroids = torch.tensor(centroids_PD, device=device, dtype=torch.float32)
    queries = torch.tensor(x_QD[sample], device=device, dtype=torch.float32)
    size = queries.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    # squares of very large or small coordinates are no float32 numbers
    queries, centroids = queries / size, centroids / size
    own_SD = centroids[torch.from_numpy(label_Q[sample]).to(device)]
    centroids *= (queries * own_SD).sum() / own_SD.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    middle_D = weight_P @ centroids
    axes_D2 = principal_axes(weight_P.sqrt()[:, None] * (centroids - middle_D), drawn)
    placed = (queries - middle_D) @ axes_D2
    total = float((queries - queries.mean(0)).square().sum())
    along = float((placed - placed.mean(0)).square().sum())
    return Projection(
        centroids_P2=(size * ((centroids - middle_D) @ axes_D2)).cpu().numpy(),
        queries_S2=(size * placed).cpu().numpy(),
        leaf_S=label_Q[sample],
        share=along / total if total > 0 else float("nan"),
    )


def principal_axes(x_PD: Tensor, drawn: torch.Generator) -> Tensor:
    """(D, 2) the two leading right singular vectors of x, each with its largest entry positive.

    Subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4). Where D is 1 the second axis is 0.
    """
    dims = x_PD.shape[1]
    axes_DA = torch.randn(dims, min(dims, 2 + SPARE_AXES), generator=drawn, dtype=torch.float32).to(x_PD)
    for _ in range(ROUNDS):
        axes_DA = torch.linalg.qr(x_PD.T @ (x_PD @ axes_DA)).Q
    inside = x_PD @ axes_DA
    turn = torch.linalg.eigh(inside.T @ inside).eigenvectors.flip(1)
    axes_D2 = x_PD.new_zeros(dims, 2)
    found = (axes_DA @ turn)[:, :2]
    largest = found.gather(0, found.abs().argmax(0, keepdim=True))
    axes_D2[:, : found.shape[1]] = found * largest.sign()
    return axes_D2
