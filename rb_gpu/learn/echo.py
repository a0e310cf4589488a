"""Corrects the leave-one-out residuals of a regression that is fitted to the residuals of another one.

The first regression was fitted with the row's own outcome, of which its residuals of other rows hold an echo: next to a
row with a high outcome they are too low. The second regression learns from these residuals even though the row itself
is left out, and so predicts too little for the row. A weaker ridge hears more of the echo, so that without a correction
ridges that are far too strong would appear to be the best.
Suffixes: N rows of a regression, G eigenvectors of all slopes and a constant, H those of one slope and a constant, L
ridges, S slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rb_gpu.learn.ridge import Ridge


def echoes(shared: Sequence[Ridge], share_SL: Tensor, own: Sequence[Ridge], index_N: Tensor) -> list[Tensor]:
    """(N, L) per slope of `own`: how much more the second regression would predict for a row if the first one had not
    seen the row's query either, in multiples of the first one's residual of that query.

    shared: the first regression's slopes, share_SL their weights. own: the second regression's slopes, fitted on the
    rows index_N. With the queries of two rows i and j left out, the first regression's residual of j is that without
    j's query plus h_ij / (1 − h_jj) times the residual of i (h the hat matrix; by the update of an inverse, Cook &
    Weisberg 1982, neglecting terms of h²).
    """
    # these products are most of the cost of a regression; for a mere correction single precision is enough
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
    """The columns of all parts, and a column of ones."""
    return torch.cat([*parts, torch.ones_like(parts[0][:, :1])], 1)
