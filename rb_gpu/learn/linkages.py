"""Ward's linkage and complete linkage: float32 with proven error bounds where that suffices, else float64.

Suffixes: P leaves, A living clusters (Ward) or their leaves (Complete), C living clusters, G queried clusters,
L entries of a list, J joins, R rows of a tile, D dims.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from rb_gpu.learn.devices import tiles
from rb_gpu.learn.linkage import LISTED

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# merged-away clusters are removed from the arrays once they exceed this share
DEAD = 0.25
# columns per group: only groups with a small minimum are searched column by column
GROUP = 64
# the least weight, as a share of the largest, and the least bound that float32 represents without loss
LEAST = 1e-30


class Ward:
    """Ward's linkage (Ward 1963) of weighted points: joining a and b costs w_a·w_b / (w_a + w_b)·‖c_a − c_b‖².

    x_PD: the leaves; weight_P: their weights, > 0. Takes O(P²·D) time and O(P·D) memory.
    """

    at_once = 8
    of_both: np.ufunc = np.minimum

    def __init__(self, x_PD: Floats, weight_P: Floats, device: torch.device) -> None:
        # centring changes no distance and reduces rounding
        centre_AD = x_PD - x_PD.mean(0)
        weight_P = np.maximum(weight_P, np.finfo(np.float64).tiny)
        # scale by powers of two, which is exact, to about 1: float32 then represents the squares
        self._unit = 2.0 ** np.ceil(np.log2(float(np.abs(centre_AD).max()) or 1.0))
        self._heaviest = 2.0 ** np.ceil(np.log2(weight_P.max()))
        self._centre_AD = torch.from_numpy(centre_AD / self._unit).to(device)
        self._weight_A = torch.from_numpy(weight_P / self._heaviest).to(device)
        self._coarse_AD = self._centre_AD.float()
        self._exact_only = bool(self._weight_A.min() < LEAST)
        self._norm2_A = (self._centre_AD**2).sum(1)
        self._slot_A, self._row_S = np.arange(len(x_PD)), np.arange(len(x_PD))

    def lists(self, slots_G: Rows, exact: bool) -> tuple[Rows, Floats, Floats]:
        """See Linkage."""
        exact = exact or self._exact_only
        x_AD = self._centre_AD if exact else self._coarse_AD
        device, entries = x_AD.device, min(LISTED, len(x_AD))
        # |fl(a·b) − a·b| <= D·2^-24·(‖a‖² + ‖b‖²) / 2 (Higham 2002, 3.1); twice that, plus the other roundings
        error = 0.0 if exact else (x_AD.shape[1] + 16) * 2.0**-23
        norm2_A = ((1.0 - error) * self._norm2_A).to(x_AD.dtype)
        inverse_A = (1.0 / self._weight_A).to(x_AD.dtype)
        near_GL = np.empty((len(slots_G), entries), dtype=np.int64)
        low_GL, rest_G = np.empty((len(slots_G), entries)), np.full(len(slots_G), np.inf)
        for tile in tiles(len(slots_G), len(x_AD), device):
            rows = torch.from_numpy(self._row_S[slots_G[tile]]).to(device)
            low_RA = x_AD[rows] @ x_AD.T
            low_RA.mul_(-2.0).add_(norm2_A).add_(norm2_A[rows, None]).div_(inverse_A[rows, None] + inverse_A)
            low, column = least(low_RA, entries + 1)
            low = torch.where(low < LEAST, 0.0, low.double()).cpu().numpy() * (self._heaviest * self._unit**2)
            near_GL[tile] = self._slot_A[column[:, :entries].cpu().numpy()]
            low_GL[tile] = low[:, :entries]
            if low.shape[1] > entries:
                rest_G[tile] = low[:, entries]
        return near_GL, low_GL, rest_G

    def cost(self, slots_G: Rows, others_G: Rows) -> Floats:
        """See Linkage."""
        device = self._centre_AD.device
        cost_G = np.empty(len(slots_G))
        for tile in tiles(len(slots_G), self._centre_AD.shape[1], device):
            a, b = (torch.from_numpy(self._row_S[slots[tile]]).to(device) for slots in (slots_G, others_G))
            w_a, w_b = self._weight_A[a], self._weight_A[b]
            d2 = ((self._centre_AD[a] - self._centre_AD[b]) ** 2).sum(1)
            cost_G[tile] = (d2 / (1.0 / w_a + 1.0 / w_b)).cpu().numpy()
        return np.asarray(cost_G * (self._heaviest * self._unit**2))

    def join(self, kept_J: Rows, gone_J: Rows) -> None:
        """See Linkage."""
        device = self._centre_AD.device
        a, b = (torch.from_numpy(self._row_S[slots]).to(device) for slots in (kept_J, gone_J))
        w_a, w_b = self._weight_A[a, None], self._weight_A[b, None]
        self._centre_AD[a] = (w_a * self._centre_AD[a] + w_b * self._centre_AD[b]) / (w_a + w_b)
        self._coarse_AD[a] = self._centre_AD[a].float()
        self._weight_A[a] = (w_a + w_b)[:, 0]
        self._norm2_A[a] = (self._centre_AD[a] ** 2).sum(1)
        self._norm2_A[b] = torch.inf
        dead = torch.isinf(self._norm2_A)
        if int(dead.sum()) > DEAD * len(dead):
            self._centre_AD, self._coarse_AD, self._weight_A, self._norm2_A = (
                x[~dead] for x in (self._centre_AD, self._coarse_AD, self._weight_A, self._norm2_A)
            )
            self._slot_A = self._slot_A[~dead.cpu().numpy()]
            self._row_S[self._slot_A] = np.arange(len(self._slot_A))


class Complete:
    """Complete linkage by cosine: two clusters are as similar as their least similar leaves, and may join only if that
    exceeds `threshold`.

    unit_PD: the leaves, of norm 1. A cost is one minus the cosine. Takes O(P·D) memory.
    """

    at_once = 1
    of_both: np.ufunc = np.maximum

    def __init__(self, unit_PD: Floats, threshold: float, device: torch.device) -> None:
        self._unit_PD, self._threshold, self._device = unit_PD, threshold, device
        self._members = list(np.arange(len(unit_PD))[:, None])
        self._lives_S = np.ones(len(unit_PD), dtype=bool)
        self._arrange()

    def labels(self) -> Rows:
        """(P,) the slot of each leaf's cluster."""
        label_P = np.empty(len(self._unit_PD), dtype=np.int64)
        for slot in np.flatnonzero(self._lives_S):
            label_P[self._members[slot]] = slot
        return label_P

    def _arrange(self) -> None:
        """Orders leaves as columns: first one leaf of every cluster, largest clusters first, then a second leaf of each
        cluster that has one, and so on, so that the minimum over a cluster is a minimum of slices.
        """
        slots = np.flatnonzero(self._lives_S)
        sizes = np.array([len(self._members[slot]) for slot in slots])
        order = np.argsort(-sizes, kind="stable")
        self._slot_C, sizes = slots[order], sizes[order]
        self._widths = [int((sizes > layer).sum()) for layer in range(int(sizes[0]))]
        self._leaf_A = np.concatenate(
            [[self._members[slot][layer] for slot in self._slot_C[:width]] for layer, width in enumerate(self._widths)]
        )
        self._coarse_AD = self._rows(self._leaf_A, exact=False)

    def _rows(self, leaves: Rows, exact: bool) -> torch.Tensor:
        unit = self._unit_PD[leaves]
        return torch.from_numpy(unit if exact else unit.astype(np.float32)).to(self._device)

    def lists(self, slots_G: Rows, exact: bool) -> tuple[Rows, Floats, Floats]:
        """See Linkage."""
        if self._lives_S.sum() < len(self._slot_C):
            self._arrange()
        x_AD = self._rows(self._leaf_A, exact) if exact else self._coarse_AD
        entries = min(LISTED, len(self._slot_C))
        # |fl(a·b) − a·b| <= D·2^-24·‖a‖·‖b‖ (Higham 2002, 3.1), plus the rounding of a and b
        error = 0.0 if exact else (x_AD.shape[1] + 4) * 2.0**-24
        near_GL = np.empty((len(slots_G), entries), dtype=np.int64)
        low_GL, rest_G = np.empty((len(slots_G), entries)), np.full(len(slots_G), np.inf)
        for part in tiles(len(slots_G), len(x_AD), self._device):
            best = self._least(slots_G[part], x_AD)
            cosine, column = least(best.neg_(), entries + 1)
            low = np.maximum(1.0 + cosine.double().cpu().numpy() - error, 0.0)
            low[low >= 1.0 - self._threshold] = np.inf
            near_GL[part] = self._slot_C[column[:, :entries].cpu().numpy()]
            low_GL[part] = low[:, :entries]
            if low.shape[1] > entries:
                rest_G[part] = low[:, entries]
        return near_GL, low_GL, rest_G

    def _least(self, slots_G: Rows, x_AD: torch.Tensor) -> torch.Tensor:
        """(G, C) the least cosine between any leaf of a slot's cluster and any leaf of a column's cluster."""
        rows = np.concatenate([self._members[slot] for slot in slots_G])
        group = np.repeat(np.arange(len(slots_G)), [len(self._members[slot]) for slot in slots_G])
        exact = x_AD.dtype == torch.float64
        if len(rows) == len(slots_G):
            return self._layered(self._rows(rows, exact) @ x_AD.T)
        lowest_GA = torch.full((len(slots_G), len(x_AD)), torch.inf, dtype=x_AD.dtype, device=self._device)
        for tile in tiles(len(rows), len(x_AD), self._device):
            cosine_RA = self._rows(rows[tile], exact) @ x_AD.T
            inside, first = np.unique(group[tile], return_index=True)
            for one, start, stop in zip(inside, first, [*first[1:], len(cosine_RA)], strict=True):
                torch.minimum(lowest_GA[one], cosine_RA[start:stop].amin(0), out=lowest_GA[one])
        return self._layered(lowest_GA)

    def _layered(self, least_GA: torch.Tensor) -> torch.Tensor:
        """(G, C) the minimum over the leaves of each cluster, from columns of leaves."""
        best, start = least_GA[:, : self._widths[0]], self._widths[0]
        for width in self._widths[1:]:
            torch.minimum(best[:, :width], least_GA[:, start : start + width], out=best[:, :width])
            start += width
        return best

    def cost(self, slots_G: Rows, others_G: Rows) -> Floats:
        """See Linkage."""
        cosine = [
            (self._unit_PD[self._members[a]] @ self._unit_PD[self._members[b]].T).min()
            for a, b in zip(slots_G, others_G, strict=True)
        ]
        cosine_G = np.array(cosine, dtype=np.float64)
        return np.where(cosine_G > self._threshold, np.maximum(1.0 - cosine_G, 0.0), np.inf)

    def join(self, kept_J: Rows, gone_J: Rows) -> None:
        """See Linkage."""
        for kept, gone in zip(kept_J, gone_J, strict=True):
            self._members[kept] = np.concatenate([self._members[kept], self._members[gone]])
        self._lives_S[gone_J] = False


def least(x_RA: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` least numbers of each row and their columns: only groups with the least minima can contain them."""
    columns = x_RA.shape[1]
    groups = columns // GROUP
    if groups <= 2 * count:
        return x_RA.topk(min(count, columns), largest=False)
    whole = x_RA[:, : groups * GROUP].view(-1, GROUP, groups)
    near = whole.amin(1).topk(count, largest=False).indices
    inside = (near[:, None, :] + groups * torch.arange(GROUP, device=x_RA.device)[:, None]).flatten(1)
    rest = torch.arange(groups * GROUP, columns, device=x_RA.device).expand(len(x_RA), -1)
    column = torch.cat([inside, rest], 1)
    low, place = x_RA.gather(1, column).topk(count, largest=False)
    return low, column.gather(1, place)
