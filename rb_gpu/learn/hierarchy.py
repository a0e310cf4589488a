"""Consolidation of similar leaves, the hierarchy levels above them, and pruning.

Suffixes: P leaves, D dims.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rb_gpu.learn.linkage import Merges, join_nearest
from rb_gpu.learn.linkages import Complete, Ward

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float32]


def unit_rows(x_PD: Matrix) -> Matrix:
    """Rows scaled to norm 1; a row of norm 0 stays 0."""
    norm = np.linalg.norm(x_PD, axis=1, keepdims=True)
    return np.asarray(x_PD / np.maximum(norm, np.finfo(np.float32).tiny), dtype=np.float32)


def consolidate(centroids_PD: Matrix, threshold: float, device: torch.device) -> Rows:
    """The merged leaf of each leaf (P,), numbered by first member: complete linkage on cosine, cut at `threshold`.

    Every pair inside a merged leaf has cosine > threshold, so no chains form. No P x P matrix is held. A threshold of 1
    merges nothing.
    """
    label_P = np.arange(len(centroids_PD))
    if threshold < 1:
        unit_PD = centroids_PD.astype(np.float64)
        unit_PD /= np.maximum(np.linalg.norm(unit_PD, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        clusters = Complete(unit_PD, threshold, device)
        join_nearest(clusters, len(unit_PD))
        label_P = clusters.labels()
    return np.unique(label_P, return_inverse=True)[1].astype(np.int64)


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
    """For each level from the leaves up, each node's parent as a row of the next level; the last has counts[-1] nodes.

    Uses Ward's linkage with leaves weighted by support, cut at the given non-increasing counts.
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
    """Which leaves to keep (P,). Levels are built from the kept leaves only, so no parent has a pruned child."""
    return (support_P >= min_support) & (confidence_P >= min_confidence)
