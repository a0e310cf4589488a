"""Agglomerative linkage of up to 65,536 leaves without a matrix of their distances.

Two clusters that are each other's nearest may join at once, whatever the others do, where the linkage is reducible: a
cluster that two others made is no nearer to a third than the nearer one of them was (Bruynooghe 1978, Murtagh 1983). So
many pairs join in one round, and the nearest clusters of many are found by one matrix product.

Suffixes: P leaves, S slots (a cluster lives in the slot of its first leaf), A clusters or leaves that live, G clusters
asked about, T rows of a tile, D dims.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.devices import tiles

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# clusters that no longer live are left out once they are more than this share
DEAD = 0.25


class Clusters(Protocol):
    """A reducible linkage. nearest: for slots (G,), the slot of the nearest cluster and what joining it costs, -1 where
    no cluster may join. join: of pairs (G,), the first slot takes the second one's cluster in.
    """

    def nearest(self, slots_G: Rows) -> tuple[Rows, Floats]: ...  # noqa: D102

    def join(self, kept_G: Rows, gone_G: Rows) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Merges:
    """A dendrogram: at step i the clusters of leaves left[i] and right[i] join at height[i], the cost of it."""

    left: Rows
    right: Rows
    height: Floats


def join_nearest(clusters: Clusters, leaves: int) -> Merges:
    """Joins mutual nearest clusters until none may join; steps in the order of their heights.

    The steps, sorted, are those of the greedy algorithm. A cluster whose nearest one has joined another is asked again
    only once a third one waits for its answer: its own partner can only have gone farther away.
    """
    near_S, cost_S = np.full(leaves, -1), np.full(leaves, np.inf)
    known_S, alive_S = np.zeros(leaves, dtype=bool), np.ones(leaves, dtype=bool)
    steps: list[tuple[Rows, Rows, Floats]] = []
    asked = np.arange(leaves)
    while len(asked):
        near_S[asked], cost_S[asked] = clusters.nearest(asked)
        known_S[asked] = True
        own = np.flatnonzero(known_S & (near_S >= 0))
        to = near_S[own]
        mutual = own[(own < to) & known_S[to] & (near_S[to] == own)]
        waited_for = np.unique(to[~known_S[to]])
        if not len(mutual) and not len(waited_for):
            waited_for = np.flatnonzero(alive_S & ~known_S)
            if not len(waited_for) and len(own):
                # a circle of costs that differ by rounding alone
                mutual = own[[cost_S[own].argmin()]]
        kept, gone = np.minimum(mutual, near_S[mutual]), np.maximum(mutual, near_S[mutual])
        steps.append((kept, gone, cost_S[mutual]))
        clusters.join(kept, gone)
        joined_S = np.zeros(leaves, dtype=bool)
        joined_S[kept] = joined_S[gone] = True
        known_S[own[joined_S[own] | joined_S[to]]] = False
        alive_S[gone], near_S[gone] = False, -1
        asked = np.concatenate([kept, waited_for])
    left, right, height = (np.concatenate(column) for column in zip(*steps, strict=True))
    order = np.argsort(height, kind="stable")
    return Merges(left[order], right[order], height[order])


class Ward:
    """Ward's linkage (Ward 1963) of weighted points: joining a and b costs w_a·w_b / (w_a + w_b)·‖c_a − c_b‖².

    x_PD: the leaves. weight_P: theirs, > 0. O(P²·D) time, O(P·D) memory.
    """

    def __init__(self, x_PD: Floats, weight_P: Floats, device: torch.device) -> None:
        # distances stay, and rounding shrinks, where the origin lies amid the points
        self._centre_AD = torch.from_numpy(x_PD - x_PD.mean(0)).to(device)
        self._weight_A = torch.from_numpy(np.maximum(weight_P, np.finfo(np.float64).tiny)).to(device)
        self._norm2_A = (self._centre_AD**2).sum(1)
        self._slot_A, self._row_S = np.arange(len(x_PD)), np.arange(len(x_PD))

    def nearest(self, slots_G: Rows) -> tuple[Rows, Floats]:
        """See Clusters."""
        device = self._centre_AD.device
        near_G, cost_G = np.full(len(slots_G), -1), np.full(len(slots_G), np.inf)
        inverse_A = 1.0 / self._weight_A
        for tile in tiles(len(slots_G), len(self._slot_A), device):
            rows = torch.from_numpy(self._row_S[slots_G[tile]]).to(device)
            cost_TA = torch.addmm(self._norm2_A, self._centre_AD[rows], self._centre_AD.T, alpha=-2.0)
            cost_TA.add_(self._norm2_A[rows, None]).clamp_(min=0.0)
            cost_TA.div_(inverse_A[rows, None] + inverse_A)
            cost_TA[torch.arange(len(rows), device=device), rows] = torch.inf
            least, column = cost_TA.min(1)
            cost_G[tile] = least.cpu().numpy()
            near_G[tile] = np.where(np.isfinite(cost_G[tile]), self._slot_A[column.cpu().numpy()], -1)
        return near_G, cost_G

    def join(self, kept_G: Rows, gone_G: Rows) -> None:
        """See Clusters."""
        device = self._centre_AD.device
        a, b = (torch.from_numpy(self._row_S[slots]).to(device) for slots in (kept_G, gone_G))
        w_a, w_b = self._weight_A[a, None], self._weight_A[b, None]
        self._centre_AD[a] = (w_a * self._centre_AD[a] + w_b * self._centre_AD[b]) / (w_a + w_b)
        self._weight_A[a] = (w_a + w_b)[:, 0]
        self._norm2_A[a] = (self._centre_AD[a] ** 2).sum(1)
        self._norm2_A[b] = torch.inf
        dead = torch.isinf(self._norm2_A)
        if int(dead.sum()) > DEAD * len(dead):
            self._centre_AD, self._weight_A, self._norm2_A = (
                x[~dead] for x in (self._centre_AD, self._weight_A, self._norm2_A)
            )
            self._slot_A = self._slot_A[~dead.cpu().numpy()]
            self._row_S[self._slot_A] = np.arange(len(self._slot_A))


class Complete:
    """Complete linkage by cosine: two clusters are as near as their least similar leaves, and join over `threshold`.

    unit_PD: the leaves, of norm 1. label_P: the slot of each leaf's cluster. Clusters that have none to join leave the
    others' sight, since none can come nearer. O(P·D) memory; time is that of a product of all leaves of the clusters
    asked about with all leaves that are left.
    """

    def __init__(self, unit_PD: torch.Tensor, threshold: float) -> None:
        self._unit_PD, self._threshold = unit_PD, threshold
        self.label_P = np.arange(len(unit_PD))
        self._left_P = np.ones(len(unit_PD), dtype=bool)

    def nearest(self, slots_G: Rows) -> tuple[Rows, Floats]:
        """See Clusters; the cost is one minus the cosine."""
        device = self._unit_PD.device
        leaves_A = np.flatnonzero(self._left_P)
        leaves_A = leaves_A[np.argsort(self.label_P[leaves_A], kind="stable")]
        slots, starts = np.unique(self.label_P[leaves_A], return_index=True)
        stops = np.append(starts[1:], len(leaves_A))
        unit_AD = self._unit_PD[torch.from_numpy(leaves_A).to(device)]
        near_G, cost_G = np.full(len(slots_G), -1), np.full(len(slots_G), np.inf)
        for part in tiles(len(slots_G), len(slots), device):
            own = np.searchsorted(slots, slots_G[part])
            rows = np.concatenate([np.arange(starts[one], stops[one]) for one in own])
            group = np.repeat(np.arange(len(own)), stops[own] - starts[own])
            least = np.full((len(own), len(slots)), np.inf)
            for tile in tiles(len(rows), len(leaves_A), device):
                cosine = (unit_AD[torch.from_numpy(rows[tile]).to(device)] @ unit_AD.T).cpu().numpy()
                inside, first = np.unique(group[tile], return_index=True)
                if len(first) < len(cosine):
                    cosine = np.minimum.reduceat(cosine, first, axis=0)
                if len(starts) < len(leaves_A):
                    cosine = np.minimum.reduceat(cosine, starts, axis=1)
                here = least[inside[0] : inside[-1] + 1]
                np.minimum(here, cosine, out=here)
            least[np.arange(len(own)), own] = -np.inf
            column = least.argmax(1)
            best = least[np.arange(len(own)), column]
            over = best > self._threshold
            near_G[part] = np.where(over, slots[column], -1)
            cost_G[part] = np.where(over, 1.0 - best, np.inf)
        self._left_P &= ~np.isin(self.label_P, slots_G[near_G < 0])
        return near_G, cost_G

    def join(self, kept_G: Rows, gone_G: Rows) -> None:
        """See Clusters."""
        takes_S = np.arange(len(self.label_P))
        takes_S[gone_G] = kept_G
        self.label_P = takes_S[self.label_P]
