"""What a shared regression left of other rows holds an echo of a row's own outcome.

A second regression, of what the first one left, hears it though the row itself is left out: those near a row of high
outcome seem lower than they are. So it foretells too little of the row, the weaker its ridge the less, and ridges that
are far too strong seem the best.
Suffixes: N rows of a regression, G eigenvectors of all slopes and a constant, H those of one slope and a constant, L
ridges, S slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rb_gpu.learn.ridge import Ridge


def echoes(shared: Sequence[Ridge], share_SL: Tensor, own: Sequence[Ridge], index_N: Tensor) -> list[Tensor]:
    """(N, L) of each slope of `own`: by how much more it would foretell of a row, had the first regression not seen the
    row's query either; in shares of what that left of the query.

    shared: the first regression's slopes, share_SL their weights. own: the second's, of the rows index_N. Without the
    queries of both rows, the first leaves of one row what it left without its query, plus h / (1 − h') times what it
    left of the other (h the hat matrix's element of the two rows, h' its diagonal's of the one; by the update of an
    inverse, Cook & Weisberg 1982, terms of h² apart).
    """
    # a correction, whose products are most of what a regression costs: single precision is enough of it
    flat = (1.0 / shared[0].weight_N.sum()).view(1)
    scores_NG = _with_constant([ridge.scores_NE[index_N] for ridge in shared])
    mixed = [ridge.shrunk_EL @ share_L for ridge, share_L in zip(shared, share_SL, strict=True)]
    hat_NG = scores_NG * torch.cat([*mixed, flat])
    itself_N = (hat_NG * scores_NG).sum(1)
    kept_NL = [ridge.kept_NL[index_N] for ridge in shared]
    kept_N = torch.stack([one_NL @ share_L for one_NL, share_L in zip(kept_NL, share_SL, strict=True)]).sum(0)
    found = []
    left_NG, right_GN = hat_NG.float(), scores_NG.T.float()
    hat_NN = left_NG @ right_GN if len(left_NG) < left_NG.shape[1] else None
    for ridge in own:
        weight_N, own_NH = ridge.weight_N / kept_N, _with_constant([ridge.scores_NE])
        said_NH = (weight_N[:, None] * own_NH).float()
        heard_NH = (left_NG @ (right_GN @ said_NH) if hat_NN is None else hat_NN @ said_NH).double()
        others_NH = heard_NH - (ridge.of_query(weight_N) * itself_N)[:, None] * own_NH
        constant_L = (1.0 / ridge.weight_N.sum()).expand(1, ridge.shrunk_EL.shape[1])
        share_NL = (others_NH * own_NH) @ torch.cat([ridge.shrunk_EL, constant_L])
        found.append(shared[0].whole_N[index_N, None] * share_NL / ridge.kept_NL)
    return found


def _with_constant(parts: Sequence[Tensor]) -> Tensor:
    """Columns of all parts and one of ones."""
    return torch.cat([*parts, torch.ones_like(parts[0][:, :1])], 1)
