"""Consolidation, the levels above the leaves, and pruning.

Suffixes: P leaves, D dims, T leaves of a tile.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from rb_gpu.learn.devices import tiles
from rb_gpu.learn.linkage import Complete, Merges, Ward, join_nearest

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]

# more than rounding can take from or add to a cosine in float32, at up to 4,096 dims
FLOAT32_SLACK = 1e-4
# leaves of a part whose distances are held at once: 72 MB
WHOLE = 3000


def unit_rows(x_PD: Matrix) -> Matrix:
    """Rows scaled to norm 1; a row of norm 0 stays 0."""
    norm = np.linalg.norm(x_PD, axis=1, keepdims=True)
    return np.asarray(x_PD / np.maximum(norm, np.finfo(np.float32).tiny), dtype=np.float32)


def consolidate(centroids_PD: Matrix, threshold: float, device: torch.device) -> Rows:
    """The merged leaf of each leaf (P,), numbered by first member: complete linkage on cosine, cut at `threshold`.

    Every pair inside a merged leaf has cosine > threshold, so that no chain forms. Complete linkage never joins two
    leaves that no chain of close pairs connects, so each connected part is linked by itself, and no P x P matrix is
    held even where all leaves hang together. A threshold of 1 merges none.
    """
    label_P = np.arange(len(centroids_PD))
    if threshold >= 1:
        return label_P
    part_P = _parts(torch.from_numpy(unit_rows(centroids_PD)).to(device), threshold)
    order = np.argsort(part_P, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(part_P[order])) + 1):
        if len(members) > 1:
            unit = centroids_PD[members].astype(np.float64)
            unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
            label_P[members] = members[_linked(unit, threshold, device)]
    return np.unique(label_P, return_inverse=True)[1].astype(np.int64)


def _parts(unit_PD: torch.Tensor, threshold: float) -> Rows:
    """(P,) the part of each leaf: pairs with a cosine over the threshold, or just under it, are in one."""
    leaves = len(unit_PD)
    part_P = np.arange(leaves)
    for tile in tiles(leaves, leaves, unit_PD.device):
        first, second = torch.nonzero(unit_PD[tile] @ unit_PD.T > threshold - FLOAT32_SLACK).T.cpu().numpy()
        first, second = part_P[first + tile.start], part_P[second]
        apart = first != second
        if apart.any():
            joins = coo_array((np.ones(apart.sum()), (first[apart], second[apart])), shape=(leaves, leaves))
            part_P = connected_components(joins, directed=False)[1][part_P]
    return part_P


def _linked(unit_PD: Floats, threshold: float, device: torch.device) -> Rows:
    """(P,) the first member of each leaf's cluster, of leaves of norm 1 that may all hang together."""
    if len(unit_PD) > WHOLE:
        clusters = Complete(torch.from_numpy(unit_PD).to(device), threshold)
        join_nearest(clusters, len(unit_PD))
        return clusters.label_P
    distance = np.clip(1.0 - unit_PD @ unit_PD.T, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="complete")
    _, first, group_P = np.unique(
        fcluster(tree, np.nextafter(1.0 - threshold, 0.0), criterion="distance"), return_index=True, return_inverse=True
    )
    return first[group_P]


def level_counts(leaves: int, counts: object) -> list[int]:
    """Patterns at levels 1 to 3: as configured, or leaves^(3/4), ^(1/2), ^(1/4); never more than the level below."""
    wanted = list(counts) if isinstance(counts, (list, tuple)) else [round(leaves**s) for s in (0.75, 0.5, 0.25)]
    below, out = leaves, []
    for count in wanted:
        below = max(1, min(count, below))
        out.append(below)
    return out


def build_hierarchy(
    centroids_PD: Matrix, support_P: npt.NDArray[np.float64], counts: list[int], device: torch.device
) -> list[Rows]:
    """For each level from the leaves up, the row of each node's parent one level above; the last has counts[-1] nodes.

    Ward's linkage with leaves weighted by support, cut at the given non-increasing counts.
    """
    leaves = len(centroids_PD)
    ward = Ward(centroids_PD.astype(np.float64), support_P.astype(np.float64), device)
    merges = join_nearest(ward, leaves)
    labels = [np.arange(leaves), *(cut(merges, leaves, count) for count in counts)]
    parents = []
    for below, above in pairwise(labels):
        _, first = np.unique(below, return_index=True)
        parents.append(above[first])
    return parents


def cut(merges: Merges, leaves: int, count: int) -> Rows:
    """Labels (P,) of the `count` clusters that are left when the most expensive merges are undone."""
    joined = leaves - count
    graph = coo_array((np.ones(joined), (merges.left[:joined], merges.right[:joined])), shape=(leaves, leaves))
    _, label = connected_components(graph, directed=False)
    return np.asarray(label, dtype=np.int64)


def prune(
    support_P: npt.NDArray[np.int64], confidence_P: npt.NDArray[np.float64], min_support: int, min_confidence: float
) -> npt.NDArray[np.bool_]:
    """Which leaves stay (P,). Levels are built from what stays, so that no parent keeps a child that is gone."""
    return (support_P >= min_support) & (confidence_P >= min_confidence)
