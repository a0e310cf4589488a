"""Consolidation, the levels above the leaves, and pruning.

Suffixes: P leaves, D dims, M merged leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from rb_gpu.learn.devices import tiles

Rows = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]


def unit_rows(x_PD: Matrix) -> Matrix:
    """Rows scaled to norm 1; a row of norm 0 stays 0."""
    norm = np.linalg.norm(x_PD, axis=1, keepdims=True)
    return np.asarray(x_PD / np.maximum(norm, np.finfo(np.float32).tiny), dtype=np.float32)


def consolidate(centroids_PD: Matrix, threshold: float, device: torch.device) -> Rows:
    """The merged leaf of each leaf (P,), numbered by first member: complete linkage on cosine, cut at `threshold`.

    Every pair inside a merged leaf has cosine > threshold, so that no chain forms. Complete linkage never joins two
    leaves that no chain of close pairs connects, so each connected part is linked by itself and no P x P matrix is held
    unless all leaves hang together. A threshold of 1 merges none.
    """
    if threshold >= 1:
        return np.arange(len(centroids_PD))
    unit = torch.from_numpy(unit_rows(centroids_PD)).to(device)
    firsts, seconds = [], []
    for tile in tiles(len(unit), len(unit), device):
        close = torch.nonzero(unit[tile] @ unit.T > threshold)
        close[:, 0] += tile.start
        pairs = close[close[:, 0] < close[:, 1]].cpu().numpy()
        firsts.append(pairs[:, 0])
        seconds.append(pairs[:, 1])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    n = len(centroids_PD)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    _, part = connected_components(graph, directed=False)
    label = np.full(n, -1, dtype=np.int64)
    order = np.argsort(part, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
        label[members] = members[0]
        if len(members) > 2:
            inside = unit[torch.from_numpy(members).to(device)].double().cpu().numpy()
            distance = np.clip(1.0 - inside @ inside.T, 0.0, 2.0)
            np.fill_diagonal(distance, 0.0)
            tree = linkage(squareform(distance, checks=False), method="complete")
            cut = fcluster(tree, np.nextafter(1.0 - threshold, 0.0), criterion="distance")
            for group in np.unique(cut):
                label[members[cut == group]] = members[cut == group].min()
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def level_counts(leaves: int, counts: object) -> list[int]:
    """Patterns at levels 1 to 3: as configured, or leaves^(3/4), ^(1/2), ^(1/4); never more than the level below."""
    wanted = list(counts) if isinstance(counts, (list, tuple)) else [round(leaves**s) for s in (0.75, 0.5, 0.25)]
    below, out = leaves, []
    for count in wanted:
        below = max(1, min(count, below))
        out.append(below)
    return out


def build_hierarchy(centroids_PD: Matrix, support_P: npt.NDArray[np.float64], counts: list[int]) -> list[Rows]:
    """For each level from the leaves up, the row of each node's parent one level above; the last has counts[-1] nodes.

    Ward's linkage (Ward 1963) with leaves weighted by support, cut at the given non-increasing counts.
    """
    labels = [np.arange(len(centroids_PD))]
    merges = ward(centroids_PD.astype(np.float64), support_P.astype(np.float64))
    labels += [cut(merges, len(centroids_PD), count) for count in counts]
    parents = []
    for below, above in pairwise(labels):
        _, first = np.unique(below, return_index=True)
        parents.append(above[first])
    return parents


@dataclass(frozen=True)
class Merges:
    """A dendrogram: at step i the clusters of leaves left[i] and right[i] join at height[i] (inertia gained)."""

    left: Rows
    right: Rows
    height: npt.NDArray[np.float64]


def ward(x_PD: npt.NDArray[np.float64], weight_P: npt.NDArray[np.float64]) -> Merges:
    """Weighted Ward linkage by nearest-neighbour chains (Murtagh 1983): O(P²·D) time, O(P·D) memory.

    Joining a and b costs w_a·w_b / (w_a + w_b)·||c_a − c_b||². Ward's cost is reducible, so that the chain's merges,
    sorted by height, are those of the greedy algorithm.
    """
    n = len(x_PD)
    centre, weight = x_PD.copy(), np.maximum(weight_P.copy(), np.finfo(np.float64).tiny)
    norm2 = np.einsum("pd,pd->p", centre, centre)
    alive = np.ones(n, dtype=bool)
    left, right = np.empty(max(n - 1, 0), np.int64), np.empty(max(n - 1, 0), np.int64)
    height = np.empty(max(n - 1, 0))
    chain: list[int] = []
    for step in range(n - 1):
        if not chain:
            chain.append(int(alive.argmax()))
        while True:
            top = chain[-1]
            d2 = np.maximum(norm2 + norm2[top] - 2.0 * (centre @ centre[top]), 0.0)
            cost = np.where(alive, weight * weight[top] / (weight + weight[top]) * d2, np.inf)
            cost[top] = np.inf
            near = int(cost.argmin())
            if len(chain) > 1 and cost[chain[-2]] <= cost[near]:
                near = chain[-2]
                break
            chain.append(near)
        a, b = sorted((chain.pop(), chain.pop()))
        left[step], right[step], height[step] = a, b, cost[near]
        total = weight[a] + weight[b]
        centre[a] = (weight[a] * centre[a] + weight[b] * centre[b]) / total
        weight[a], norm2[a], alive[b] = total, centre[a] @ centre[a], False
    order = np.argsort(height, kind="stable")
    return Merges(left[order], right[order], height[order])


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
